"""Every knob a user can turn, as typed dataclass fields. No torch, no logic.

`recipes/` fills these classes through Hydra. What follows from them (divisibility, steps,
ranks) is `derive`'s business, so nothing here is ever written back. `MISSING` marks a knob that
a recipe must set; a name carries its unit. There is no `None` or `-1` for «you decide».
"""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class ConfigError(ValueError):
    """The configuration or an input is wrong: one line naming the knob, its value and what
    would be right. The command line prints it and exits with 2."""


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


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


@dataclass
class PrecisionConfig:
    name: str = MISSING
    parameter_dtype: Dtype = MISSING  # parameters and activations; master weights stay FP32


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
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence: bool = False  # sequence parallel: shard norms and residuals over the tensor group
    distributed_optimizer: bool = True  # shard optimizer state over the data-parallel ranks


@dataclass
class TrainConfig:
    total_tokens: int = MISSING
    sequence_length: int = MISSING
    global_batch_tokens: int = MISSING
    micro_batch_sequences: int = MISSING
    seed: int = 1234
    threads: int = 0  # CPU threads a rank; 0: the machine's cores divided by its ranks
    log_every_steps: int = 1
    validate_every_steps: int = 0  # 0: only at the end
    validation_tokens: int = MISSING
    save_every_steps: int = 0  # 0: only at the end
    keep_checkpoints: int = 2
    stop_after_steps: int = 0  # end this process early (exit 3), checkpoint saved; 0: never


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
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
