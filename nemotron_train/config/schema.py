"""Every user knob, as a typed dataclass field. No torch, no logic.

`recipes/` fills these classes through Hydra. `plan.derive` computes derived values (divisibility,
steps, ranks) and never writes them back into these classes. `MISSING` marks a knob that a recipe
must set. Knob names include the unit. No knob uses `None` or `-1` to mean "choose automatically".
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from nemotron_train.config.gpu import GpuConfig
from nemotron_train.config.grpo import GrpoConfig
from nemotron_train.config.guard import GuardConfig


class Dtype(StrEnum):
    """Data type of parameters and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class GemmFormat(StrEnum):
    """Storage format of both operands of a matrix product, from lowest to highest precision."""

    nvfp4 = "nvfp4"  # 4-bit E2M1, one scale per 16 elements and one per tensor
    mxfp8 = "mxfp8"  # 8-bit E4M3, one power-of-two scale per 32 elements
    bf16 = "bf16"
    float32 = "float32"

    @property
    def is_block_scaled(self) -> bool:
        """Whether blocks of elements share a scale (NVFP4 and MXFP8)."""
        return self in (GemmFormat.nvfp4, GemmFormat.mxfp8)


class ProbeFormat(StrEnum):
    """A format whose rounding error telemetry measures for products computed in another format."""

    none = "none"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


class LinearKind(StrEnum):
    """The part of the model that a linear belongs to, for `PrecisionRule.layer_type`."""

    any = "any"
    mamba = "mamba"
    attention = "attention"
    moe = "moe"  # routed and shared experts, latent projections
    mtp_projection = "mtp_projection"


class Backend(StrEnum):
    """The implementation of products in block-scaled formats."""

    auto = "auto"  # native on a Blackwell data-center GPU with Transformer Engine, else emulated
    native = "native"  # Transformer Engine kernels; an error if they are not available
    emulated = "emulated"  # the same formats in PyTorch, on any device


class DecayStyle(StrEnum):
    """Shape of the learning-rate decay."""

    linear = "linear"
    cosine = "cosine"
    minus_sqrt = "minus_sqrt"


class DataKind(StrEnum):
    """The source of the training data."""

    embedded = "embedded"  # source code of the Python standard library, built on first use
    prepared = "prepared"  # folders written by `nemotron-train data prepare`


@dataclass
class AttentionConfig:
    """Grouped-query attention without positional embedding."""

    heads: int = MISSING
    key_value_heads: int = MISSING
    head_dim: int = MISSING


@dataclass
class MambaConfig:
    """Mamba-2 mixer (arXiv 2405.21060). The inner width is heads x head_dim."""

    heads: int = MISSING
    head_dim: int = MISSING
    state_size: int = MISSING
    groups: int = MISSING  # groups of heads that share B and C
    conv_kernel_size: int = 4
    chunk_size: int = 128  # tokens per chunk of the SSD algorithm; changes speed, not the result
    dt_min: float = 0.001  # the initial dt is drawn log-uniformly from [dt_min, dt_max]
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4  # lower bound of the initial dt
    dt_limit_min: float = 0.0  # dt is clamped to [dt_limit_min, dt_limit_max] after softplus
    dt_limit_max: float = float("inf")
    A_init_min: float = 1.0  # the initial A is drawn uniformly from [A_init_min, A_init_max]
    A_init_max: float = 16.0


@dataclass
class MoeConfig:
    """Mixture of experts; a LatentMoE (arXiv 2601.18089) if `latent_size` > 0."""

    experts: int = MISSING
    experts_per_token: int = MISSING
    expert_hidden_size: int = MISSING
    shared_expert_hidden_size: int = MISSING  # 0: no shared expert
    latent_size: int = 0  # input and output width of routed experts; 0: hidden_size
    router_scaling_factor: float = 1.0  # factor on the routing weights of the chosen experts
    router_bias_update_rate: float = 1e-3  # step size of the load-balancing expert bias
    load_balance_loss_coefficient: float = 1e-4  # sequence-wise auxiliary loss


@dataclass
class MtpConfig:
    """Multi-token prediction: one block with shared weights, applied `depths` times."""

    depths: int = 0  # number of extra tokens predicted; 0: no multi-token prediction
    pattern: str = "*E"  # layers of the block, in the letters of model.pattern, without |
    loss_scale: float = 0.3  # each depth's loss is multiplied by loss_scale / depths


@dataclass
class ModelConfig:
    """The model: the pattern of its layers, their sizes, and the initialization."""

    name: str = MISSING
    pattern: str = MISSING  # M: Mamba-2, *: attention, E: mixture of experts, |: pipeline stage
    hidden_size: int = MISSING
    vocab_size: int = MISSING
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    norm_epsilon: float = 1e-5
    init_std: float = MISSING  # standard deviation of the initial weights


_AS_FORMAT: Any = "${.format}"  # an interpolation: the value of `format` in the same class


@dataclass
class FormatConfig:
    """Formats of the three matrix products of a linear; each defaults to `format`.

    The three switches are those of Transformer Engine's NVFP4 recipe (arXiv 2509.25149, section 4).
    They have no effect on products in other formats.
    """

    format: GemmFormat = MISSING
    fprop: GemmFormat = _AS_FORMAT  # y = x W^T
    dgrad: GemmFormat = _AS_FORMAT  # dx = dy W
    wgrad: GemmFormat = _AS_FORMAT  # dW = dy^T x
    weight_2d: bool = True  # quantize weights in 16 x 16 blocks: same values in fprop and dgrad
    hadamard: bool = True  # apply a random Hadamard transform to the operands of wgrad
    stochastic_rounding: bool = True  # round the gradients dy stochastically


@dataclass
class PrecisionRule(FormatConfig):
    """Formats for the linears that meet every condition. Layers are counted over the whole decoder,
    independent of pipeline stages, and without the layers of the MTP block."""

    match: str = "*"  # glob (fnmatch) on the module path, such as "*.mixer.out_proj"
    layer_type: LinearKind = LinearKind.any
    first_layers: int = 0  # only the first n layers of the decoder; 0: no condition
    last_layers: int = 0  # only the last n layers of the decoder; 0: no condition
    last_fraction: float = 0.0  # last_layers as a share, rounded to whole pairs; 0: no condition
    mtp: bool = False  # true: only the multi-token-prediction block
    experts: bool = False  # true: only routed experts
    optional: bool = False  # true: no error if the rule matches no linear of the model
    enabled: bool = True  # false: ignore the rule


@dataclass
class AtLeast:
    """The lowest format allowed for each product: lower formats are raised to it, and higher
    formats stay. `nvfp4` changes nothing."""

    format: GemmFormat = GemmFormat.nvfp4
    fprop: GemmFormat = _AS_FORMAT
    dgrad: GemmFormat = _AS_FORMAT
    wgrad: GemmFormat = _AS_FORMAT


@dataclass
class PrecisionPhase:
    """From the start of this phase to the start of the next, the rules apply with this phase's
    `at_least`. Set at most one of the three start knobs; if none is set, the phase starts at 0."""

    from_tokens: int = 0  # start, in trained tokens
    from_fraction: float = 0.0  # start, as a fraction of train.total_tokens
    with_decay: bool = False  # true: start where the learning-rate decay starts
    at_least: AtLeast = field(default_factory=AtLeast)


@dataclass
class TelemetryConfig:
    """Measurement of the rounding error of every linear's operands, on some steps. It does not
    change the training. docs/metrics.md describes the record."""

    every: int = 0  # steps between measurements; the last step is measured too; 0: never
    probe: ProbeFormat = ProbeFormat.none  # also measure this format where another one is in use


@dataclass
class PrecisionConfig:
    """The precision plan. A linear gets the formats of the first rule whose conditions it meets, in
    the order written, or else `default`. No rule applies to routers (always float32) and to the
    output layer (always in the parameters' dtype)."""

    name: str = MISSING
    parameter_dtype: Dtype = MISSING  # of parameters, activations; master weights stay FP32
    backend: Backend = Backend.auto  # has no effect on a plan without block-scaled formats
    default: FormatConfig = field(default_factory=FormatConfig)  # for linears that no rule matches
    rules: dict[str, PrecisionRule] = field(default_factory=dict)  # name -> rule, in order
    phases: list[PrecisionPhase] = field(default_factory=list)  # in the order in which they start
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


@dataclass
class BlendSource:
    """A folder of prepared data and its weight in the blend (weights are normalized to sum 1)."""

    path: str = MISSING
    weight: float = 1.0


@dataclass
class DataPhase:
    """A blend, and the number of trained tokens from which it is used."""

    from_tokens: int = 0
    blend: list[BlendSource] = field(default_factory=list)


@dataclass
class DataConfig:
    """Training and validation data, and the tokenizer."""

    kind: DataKind = MISSING
    tokenizer: str = MISSING  # folder with tokenizer.json; for kind=embedded it is created there
    phases: list[DataPhase] = field(default_factory=list)  # the first must start at 0 tokens
    validation: list[BlendSource] = field(default_factory=list)  # blend for validation
    embedded_folder: str = "runs/data/python_stdlib"  # where the embedded data are built


@dataclass
class OptimConfig:
    """AdamW with a warmup-stable-decay schedule. Durations are in tokens."""

    peak_learning_rate: float = MISSING
    min_learning_rate: float = MISSING  # at the end of the decay
    warmup_tokens: int = MISSING  # length of the linear warm-up to the peak; 0: no warm-up
    decay_tokens: int = MISSING  # the decay covers the last decay_tokens of the run; 0: no decay
    decay_style: DecayStyle = DecayStyle.minus_sqrt
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad_norm: float = 1.0  # gradients are scaled down to this norm if theirs is larger


@dataclass
class ParallelConfig:
    """Degrees of parallelism. If `model.pattern` has no |, its layers are split into
    pipeline x virtual_pipeline stages with balanced FLOPs."""

    tensor: int = 1  # tensor-parallel ranks, which split every matrix
    pipeline: int = 1  # pipeline-parallel ranks, which split the layers
    virtual_pipeline: int = 1  # stages per pipeline rank (interleaved 1F1B); 1: plain 1F1B
    context: int = 1  # context-parallel ranks, which split every sequence (docs/parallelism.md)
    expert: int = 1  # expert-parallel ranks, which divide the experts among them
    expert_tensor: int = 1  # ranks that split the hidden width of every expert
    sequence: bool = False  # sequence parallel: shard norms and residuals over the tensor group
    distributed_optimizer: bool = True  # shard optimizer state over the data-parallel ranks
    overlap_gradient_reduce: bool = False  # reduce full buckets during the backward pass
    overlap_parameter_gather: bool = False  # gather parameters during the forward pass
    bucket_parameters: int = 40_000_000  # elements per bucket; has no effect without overlap
    overlap_pipeline: bool = False  # send to the next stage while another model chunk computes


class RecomputeMode(StrEnum):
    """The part of a layer's forward pass that is recomputed in the backward pass. A recipe must
    quote "off": YAML reads the bare word as a boolean."""

    off = "off"
    selective = "selective"  # only the part with large activations that is cheap to compute
    full = "full"  # the whole layer: only its input is stored


@dataclass
class RecomputeConfig:
    """Activation recomputation by kind of layer, including the multi-token-prediction block.
    Gradients stay bitwise identical."""

    mamba: RecomputeMode = RecomputeMode.off  # selective: from in_proj's output to out_proj's input
    attention: RecomputeMode = RecomputeMode.off  # selective: the core attention
    moe: RecomputeMode = RecomputeMode.off  # selective: the routed experts, not the token exchange


@dataclass
class TrainConfig:
    """Length of the run, batches, validation, checkpoints and recomputation."""

    total_tokens: int = MISSING  # the run ends at the first step that reaches this number
    sequence_length: int = MISSING  # tokens per sequence
    global_batch_tokens: int = MISSING  # tokens per optimizer step, over all ranks
    micro_batch_sequences: int = MISSING  # sequences per forward pass of a data-parallel rank
    short_sequence_length: int = 0  # sequences of short steps are cut to this length; 0: none
    short_share: float = 0.0  # share of short steps, spread evenly; a step has only one length
    seed: int = 1234
    threads: int = 0  # CPU threads per rank; 0: the machine's cores divided by its ranks
    rendezvous_seconds: int = 600  # how long a rank waits at the start for the other ranks
    log_every_steps: int = 1
    validate_every_steps: int = 0  # 0: only at the end
    validation_tokens: int = MISSING  # tokens per validation
    save_every_steps: int = 0  # 0: only at the end
    keep_checkpoints: int = 2  # older checkpoints are deleted
    # Parameters and router biases that stay as they are, by their names in checkpoints; * stands
    # for any letters.
    frozen: list[str] = field(default_factory=list)
    mtp_detached: bool = False  # the MTP losses train the MTP block alone
    load_balance_loss: bool = True  # add the routers' sequence-wise auxiliary loss
    async_save: bool = False  # write checkpoints in the background; needs a host copy of the state
    stop_after_steps: int = 0  # save and exit (code 3) after this many steps of a process; 0: never
    stop_after_minutes: float = 0.0  # the same in minutes since the process started; 0: never
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)


@dataclass
class LoggingConfig:
    """Additional destinations of the metrics. The file metrics.jsonl is always written."""

    wandb: bool = False
    wandb_project: str = "nemotron_train"
    wandb_group: str = ""
    tensorboard: bool = False


@dataclass
class Config:
    """The root: one field per Hydra group, and the knobs of the run folder."""

    name: str = MISSING  # name of the run: letters, digits, _ . and -
    folder: str = "runs"  # parent of the run folder, relative to the working directory
    resume: str = ""  # run folder to resume, with its own config.yaml
    branch: str = ""  # RUN_FOLDER@STEP: start a new run from the checkpoint of that step
    fresh_data: bool = False  # with branch: read data from the start; sequence_length may differ
    # With branch: take the weights alone. Tokens, data, learning rate and optimizer begin anew.
    weights_only: bool = False
    switch_precision: bool = False  # allow a resumed run to continue with another precision plan
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
