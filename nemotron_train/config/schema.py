"""Every knob a user can turn, as typed dataclass fields. No torch, no logic.

`recipes/` fills these classes through Hydra. What follows from them (divisibility, steps,
ranks) is `derive`'s business, so nothing here is ever written back. `MISSING` marks a knob that
a recipe must set; a name carries its unit. There is no `None` or `-1` for «you decide».
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class GemmFormat(StrEnum):
    """How both operands of a matrix product are stored, from the lowest precision up."""

    nvfp4 = "nvfp4"  # 4-bit E2M1, a scale for 16 elements and one for the tensor
    mxfp8 = "mxfp8"  # 8-bit E4M3, a power-of-two scale for 32 elements
    bf16 = "bf16"
    float32 = "float32"

    @property
    def is_block_scaled(self) -> bool:
        """Whether blocks of elements share a scale: NVFP4 and MXFP8."""
        return self in (GemmFormat.nvfp4, GemmFormat.mxfp8)


class ProbeFormat(StrEnum):
    """A format whose losses telemetry measures where a product is computed in another one."""

    none = "none"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


class LinearKind(StrEnum):
    """Where a linear lies, for `PrecisionRule.layer_type`."""

    any = "any"
    mamba = "mamba"
    attention = "attention"
    moe = "moe"  # routed and shared experts, latent projections
    mtp_projection = "mtp_projection"


class Backend(StrEnum):
    """What computes the products in block formats."""

    auto = "auto"  # native on a Blackwell data-center GPU with Transformer Engine, else emulated
    native = "native"  # Transformer Engine's kernels, or no run
    emulated = "emulated"  # the same formats in plain PyTorch, on any device


class DecayStyle(StrEnum):
    linear = "linear"
    cosine = "cosine"
    minus_sqrt = "minus_sqrt"


class DataKind(StrEnum):
    embedded = "embedded"  # the Python standard library's own source, built on first use
    prepared = "prepared"  # folders written by `nemotron-train data prepare`


@dataclass
class AttentionConfig:
    """Grouped-query attention without positional embedding."""

    heads: int = MISSING
    key_value_heads: int = MISSING
    head_dim: int = MISSING


@dataclass
class MambaConfig:
    """Mamba-2 mixer (arXiv 2405.21060). Its inner width is heads x head_dim."""

    heads: int = MISSING
    head_dim: int = MISSING
    state_size: int = MISSING
    groups: int = MISSING
    conv_kernel_size: int = 4
    chunk_size: int = 128  # tokens a chunk of the SSD algorithm; changes speed, not the result
    dt_min: float = 0.001  # initial dt is drawn log-uniformly from [dt_min, dt_max]
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit_min: float = 0.0  # dt is clamped to these limits after softplus
    dt_limit_max: float = float("inf")
    A_init_min: float = 1.0  # A is drawn uniformly from [A_init_min, A_init_max]
    A_init_max: float = 16.0


@dataclass
class MoeConfig:
    """Mixture of experts; with `latent_size` > 0 a LatentMoE (arXiv 2601.18089)."""

    experts: int = MISSING
    experts_per_token: int = MISSING
    expert_hidden_size: int = MISSING
    shared_expert_hidden_size: int = MISSING  # 0: no shared expert
    latent_size: int = 0  # 0: routed experts work at full width
    router_scaling_factor: float = 1.0
    router_bias_update_rate: float = 1e-3
    load_balance_loss_coefficient: float = 1e-4  # sequence-wise auxiliary loss


@dataclass
class MtpConfig:
    """Multi-token prediction: one physical block applied `depths` times with shared weights."""

    depths: int = 0  # 0: no multi-token prediction
    pattern: str = "*E"
    loss_scale: float = 0.3  # divided by `depths` for each depth's loss


@dataclass
class ModelConfig:
    name: str = MISSING
    pattern: str = MISSING  # M Mamba-2, * attention, E mixture of experts; | pipeline stage
    hidden_size: int = MISSING
    vocab_size: int = MISSING
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    norm_epsilon: float = 1e-5
    init_std: float = MISSING


_AS_FORMAT: Any = "${.format}"  # an interpolation: whatever `format` beside it is


@dataclass
class FormatConfig:
    """The format of a linear's three matrix products; each follows `format` unless set itself.

    The switches are NVFP4's and as in Transformer Engine's recipe (arXiv 2509.25149, section 4);
    they mean nothing to a product in another format.
    """

    format: GemmFormat = MISSING
    fprop: GemmFormat = _AS_FORMAT  # y = x W^T
    dgrad: GemmFormat = _AS_FORMAT  # dx = dy W
    wgrad: GemmFormat = _AS_FORMAT  # dW = dy^T x
    weight_2d: bool = True  # weights in 16 x 16 blocks, the same numbers in fprop and dgrad
    hadamard: bool = True  # random Hadamard transform of wgrad's operands
    stochastic_rounding: bool = True  # of the gradients dy


@dataclass
class PrecisionRule(FormatConfig):
    """A format for the linears that meet every condition. Layer numbers are the whole decoder's,
    whatever the pipeline stages, and never an MTP block's."""

    match: str = "*"  # glob over the module path, such as "*.mixer.out_proj" (fnmatch)
    layer_type: LinearKind = LinearKind.any
    first_layers: int = 0  # only the decoder's first n layers; 0: no condition
    last_layers: int = 0  # only the decoder's last n layers; 0: no condition
    last_fraction: float = 0.0  # the same as a share, rounded to whole pairs; 0: no condition
    mtp: bool = False  # true: only the multi-token-prediction block
    experts: bool = False  # true: only routed experts
    optional: bool = False  # true: the model may lack what the rule is for
    enabled: bool = True


@dataclass
class AtLeast:
    """A lower bound on precision for each product: whatever lies below is raised to it, and
    nothing is lowered. `nvfp4` raises nothing."""

    format: GemmFormat = GemmFormat.nvfp4
    fprop: GemmFormat = _AS_FORMAT
    dgrad: GemmFormat = _AS_FORMAT
    wgrad: GemmFormat = _AS_FORMAT


@dataclass
class PrecisionPhase:
    """From its start until the next phase's, the rules hold with `at_least` instead of any
    earlier phase's. The start is given in one of three ways; in none, it is the run's."""

    from_tokens: int = 0
    from_fraction: float = 0.0  # of train.total_tokens
    with_decay: bool = False  # where the learning rate begins to decay
    at_least: AtLeast = field(default_factory=AtLeast)


@dataclass
class TelemetryConfig:
    """What rounding costs the operands of every linear, measured on some steps; it changes no
    number of the training. docs/metrics.md has the record."""

    every: int = 0  # steps, and the last one; 0: never
    probe: ProbeFormat = ProbeFormat.none


@dataclass
class PrecisionConfig:
    """The precision plan. A linear gets the format of the first rule, in the order written,
    whose conditions it meets, or else `default`. Routers and the output layer take part in no
    rule: float32, and the parameters' dtype."""

    name: str = MISSING
    parameter_dtype: Dtype = MISSING  # parameters and activations; master weights stay FP32
    backend: Backend = Backend.auto  # means nothing to a plan without block formats
    default: FormatConfig = field(default_factory=FormatConfig)
    rules: dict[str, PrecisionRule] = field(default_factory=dict)
    phases: list[PrecisionPhase] = field(default_factory=list)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


@dataclass
class BlendSource:
    """One prepared folder and its share of the blend (weights are normalized to sum 1)."""

    path: str = MISSING
    weight: float = 1.0


@dataclass
class DataPhase:
    """The blend in force from `from_tokens` trained tokens on."""

    from_tokens: int = 0
    blend: list[BlendSource] = field(default_factory=list)


@dataclass
class DataConfig:
    kind: DataKind = MISSING
    tokenizer: str = MISSING  # folder that holds tokenizer.json; embedded: written there
    phases: list[DataPhase] = field(default_factory=list)
    validation: list[BlendSource] = field(default_factory=list)
    embedded_folder: str = "runs/data/python_stdlib"  # where the embedded default is built


@dataclass
class OptimConfig:
    """AdamW under a warmup-stable-decay schedule; every horizon is a number of tokens."""

    peak_learning_rate: float = MISSING
    min_learning_rate: float = MISSING
    warmup_tokens: int = MISSING
    decay_tokens: int = MISSING
    decay_style: DecayStyle = DecayStyle.minus_sqrt
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad_norm: float = 1.0


@dataclass
class ParallelConfig:
    """The grid of ranks. Where `model.pattern` names no stages with |, its layers are cut into
    pipeline x virtual_pipeline stages of balanced FLOPs."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # stages on each pipeline rank (interleaved 1F1B); 1: plain 1F1B
    context: int = 1  # ranks that share every sequence, a piece each (docs/parallelism.md)
    expert: int = 1
    expert_tensor: int = 1  # ranks that share every expert's hidden width
    sequence: bool = False  # sequence parallel: shard norms and residuals over the tensor group
    distributed_optimizer: bool = True  # shard optimizer state over the data-parallel ranks
    overlap_gradient_reduce: bool = False  # reduce a full bucket while the backward pass goes on
    overlap_parameter_gather: bool = False  # gather a bucket while the forward pass goes on
    bucket_parameters: int = 40_000_000  # elements a bucket; means nothing without overlap
    overlap_pipeline: bool = False  # send to the next stage while another chunk computes


class RecomputeMode(StrEnum):
    """What of a layer's forward pass runs again in its backward pass instead of being kept.
    A recipe must quote "off": YAML takes the bare word for a boolean."""

    off = "off"
    selective = "selective"  # the part that is large to keep and cheap to compute
    full = "full"  # all of it: the layer's input alone is kept


@dataclass
class RecomputeConfig:
    """Activation recomputation of each kind of layer, those of the multi-token-prediction block
    included. Gradients stay the same in every bit."""

    mamba: RecomputeMode = RecomputeMode.off  # selective: from in_proj's output to out_proj's input
    attention: RecomputeMode = RecomputeMode.off  # selective: the core attention
    moe: RecomputeMode = RecomputeMode.off  # selective: the routed experts, not their exchange


@dataclass
class TrainConfig:
    total_tokens: int = MISSING
    sequence_length: int = MISSING
    global_batch_tokens: int = MISSING
    micro_batch_sequences: int = MISSING
    short_sequence_length: int = 0  # rows of the short steps, cut from whole ones; 0: none
    short_share: float = 0.0  # of the steps that are short, spread evenly; a step is never mixed
    seed: int = 1234
    threads: int = 0  # CPU threads a rank; 0: the machine's cores divided by its ranks
    rendezvous_seconds: int = 600  # how long a rank waits for the others to start
    log_every_steps: int = 1
    validate_every_steps: int = 0  # 0: only at the end
    validation_tokens: int = MISSING
    save_every_steps: int = 0  # 0: only at the end
    keep_checkpoints: int = 2
    async_save: bool = False  # write checkpoints beside the training; costs a host copy of them
    stop_after_steps: int = 0  # end this process early (exit 3), checkpoint saved; 0: never
    stop_after_minutes: float = 0.0  # the same, counted from the process's start; 0: never
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)


class NonFinitePolicy(StrEnum):
    """What happens at a step whose loss or gradient is not finite on any rank."""

    stop = "stop"  # exit 1; the last checkpoint stands
    skip = "skip"  # drop the update, go on with the next batch
    roll_back = "roll_back"  # back to the last checkpoint and past the batches since


class SpikePolicy(StrEnum):
    """What happens at a step whose loss or gradient norm lies far above those before it."""

    ignore = "ignore"
    report = "report"
    skip = "skip"
    roll_back = "roll_back"


@dataclass
class GuardConfig:
    """What watches over a run (docs/guard.md). All ranks act alike, at the same step."""

    non_finite: NonFinitePolicy = NonFinitePolicy.stop
    spike: SpikePolicy = SpikePolicy.report
    spike_window: int = 128  # steps looked back on; nothing is judged before half of them
    spike_sigmas: float = 6.0  # standard deviations above the window's mean
    max_skips: int = 10  # updates dropped in a row before the run stops
    max_roll_backs: int = 3  # of one process before the run stops
    health_every: int = 100  # steps between looks at each layer; 0: never
    straggler_every: int = 50  # steps between measures of every rank's time; 0: never
    straggler_ratio: float = 1.5  # times the median rank, three measures in a row: a line
    hang_minutes: float = 10.0  # no step for so long: stacks written, exit 1; 0: never
    crash_loop_starts: int = 3  # starts without progress before no more is tried (exit 4); 0: never
    first_step_minutes: float = 30.0  # the same for a process's first step, which may compile


@dataclass
class LoggingConfig:
    wandb: bool = False
    wandb_project: str = "nemotron_train"
    wandb_group: str = ""
    tensorboard: bool = False


@dataclass
class Config:
    """The root: one field a Hydra group, plus where the run goes."""

    name: str = MISSING  # the run's name; [A-Za-z0-9_.-]+
    folder: str = "runs"  # run folders are made in it, relative to where the user stands
    resume: str = ""  # a run folder to continue with its own config.yaml
    branch: str = ""  # RUN_FOLDER@STEP: a new run from that run's checkpoint of that step
    fresh_data: bool = False  # with `branch`: read the data from its beginning, in other rows too
    switch_precision: bool = False  # let a resumed run go on under another precision plan
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
