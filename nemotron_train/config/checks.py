"""Checks across the fields of a configuration; each violation is a ConfigError.

Owns every check that needs more than one field, or a sign. Types and enumerations are checked
when the recipes are composed; what needs the outside world (data folders, tokenizers,
checkpoints, the device) checks itself. No torch.
"""

import re
from dataclasses import fields, replace
from math import inf
from operator import attrgetter

from nemotron_train.config.schema import (
    Config,
    ConfigError,
    DataKind,
    Dtype,
    GuardConfig,
    ModelConfig,
    ParallelConfig,
)
from nemotron_train.model.shape import LayerKind, parse_pattern
from nemotron_train.model.stages import stage_pattern
from nemotron_train.precision.plan import check_plan


def check(config: Config, num_ranks: int) -> None:
    """Raises ConfigError, one line naming the knob or knobs, the value and what would be right,
    at the first thing wrong with `config` on `num_ranks` ranks."""
    _check_signs(config)
    _check_name(config.name)
    stages = parse_pattern(config.model.pattern)
    inside_mtp = []
    if config.model.mtp.depths > 0:
        inside_mtp = parse_pattern(config.model.mtp.pattern, "model.mtp.pattern", False)[0]
    kinds = {kind for stage in [*stages, inside_mtp] for kind in stage}
    _check_model(config.model, kinds)
    _check_split(config, kinds)
    _check_stages(config, stages)
    _check_ranks(config, num_ranks)
    _check_schedule(config)
    _check_data(config)
    _check_batch(config, num_ranks)
    check_plan(config)


_ABOVE_ZERO = (
    "model.hidden_size",
    "model.vocab_size",
    "model.norm_epsilon",
    "model.init_std",
    "model.attention.heads",
    "model.attention.key_value_heads",
    "model.attention.head_dim",
    "model.mamba.heads",
    "model.mamba.head_dim",
    "model.mamba.state_size",
    "model.mamba.groups",
    "model.mamba.conv_kernel_size",
    "model.mamba.chunk_size",
    "model.mamba.dt_min",
    "model.mamba.dt_max",
    "model.mamba.dt_init_floor",
    "model.mamba.A_init_min",
    "model.mamba.A_init_max",
    "model.moe.experts",
    "model.moe.experts_per_token",
    "model.moe.expert_hidden_size",
    "model.moe.router_scaling_factor",
    "optim.peak_learning_rate",
    "optim.epsilon",
    "optim.clip_grad_norm",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.expert",
    "parallel.expert_tensor",
    "parallel.bucket_parameters",
    "train.total_tokens",
    "train.sequence_length",
    "train.global_batch_tokens",
    "train.micro_batch_sequences",
    "train.rendezvous_seconds",
    "train.log_every_steps",
    "train.validation_tokens",
    "train.keep_checkpoints",
    "guard.spike_window",
    "guard.spike_sigmas",
)
_ZERO_OR_MORE = (
    "model.mamba.dt_limit_min",
    "model.moe.shared_expert_hidden_size",
    "model.moe.latent_size",
    "model.moe.router_bias_update_rate",
    "model.moe.load_balance_loss_coefficient",
    "model.mtp.depths",
    "model.mtp.loss_scale",
    "optim.min_learning_rate",
    "optim.warmup_tokens",
    "optim.decay_tokens",
    "optim.weight_decay",
    "train.seed",
    "train.threads",
    "train.validate_every_steps",
    "train.save_every_steps",
    "train.stop_after_steps",
    "train.stop_after_minutes",
    *(f"guard.{knob.name}" for knob in fields(GuardConfig) if knob.type in (int, float)),
)
_BELOW_ONE = ("optim.beta1", "optim.beta2")


def _check_signs(config: Config) -> None:
    """Comparisons are written so that a NaN fails them."""
    for knob in _ABOVE_ZERO:
        value = attrgetter(knob)(config)
        if not 0 < value < inf:
            raise ConfigError(f"{knob}={value}: must be a finite number above 0")
    for knob in _ZERO_OR_MORE:
        value = attrgetter(knob)(config)
        if not 0 <= value < inf:
            raise ConfigError(f"{knob}={value}: must be a finite number, 0 or more")
    for knob in _BELOW_ONE:
        value = attrgetter(knob)(config)
        if not 0 <= value < 1:
            raise ConfigError(f"{knob}={value}: must be at least 0 and below 1")


def _check_name(name: str) -> None:
    """The name becomes a folder: neither a separator nor the folder above may be in it."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
        raise ConfigError(
            f"name={name}: a run's name is made of letters, digits, '_', '.' and '-' only"
        )


def _check_model(model: ModelConfig, kinds: set[LayerKind]) -> None:
    attention, mamba, moe = model.attention, model.mamba, model.moe
    if LayerKind.attention in kinds:
        _must_divide(
            "model.attention.heads",
            attention.heads,
            "model.attention.key_value_heads",
            attention.key_value_heads,
        )
    if LayerKind.mamba in kinds:
        _must_divide("model.mamba.heads", mamba.heads, "model.mamba.groups", mamba.groups)
        _check_order("model.mamba.dt_min", mamba.dt_min, "model.mamba.dt_max", mamba.dt_max)
        _check_order(
            "model.mamba.A_init_min", mamba.A_init_min, "model.mamba.A_init_max", mamba.A_init_max
        )
        if not mamba.dt_limit_min < mamba.dt_limit_max:
            raise ConfigError(
                f"model.mamba.dt_limit_min={mamba.dt_limit_min} must be below "
                f"model.mamba.dt_limit_max={mamba.dt_limit_max}"
            )
    if LayerKind.moe in kinds:
        _check_order(
            "model.moe.experts_per_token",
            moe.experts_per_token,
            "model.moe.experts",
            moe.experts,
        )


def _check_split(config: Config, kinds: set[LayerKind]) -> None:
    """What each parallel dimension must divide."""
    model, parallel, train = config.model, config.parallel, config.train
    by_tensor: list[tuple[str, int]] = [("model.vocab_size", model.vocab_size)]
    if config.model.mtp.depths > 0:
        by_tensor.append(("model.hidden_size", model.hidden_size))
    if LayerKind.attention in kinds:
        by_tensor.append(("model.attention.heads", model.attention.heads))
    if LayerKind.mamba in kinds:
        by_tensor.append(("model.mamba.heads", model.mamba.heads))
        by_tensor.append(("model.mamba.groups", model.mamba.groups))
    if LayerKind.moe in kinds:
        shared = model.moe.shared_expert_hidden_size
        by_tensor.append(("model.moe.shared_expert_hidden_size", shared))
        _must_divide("model.moe.experts", model.moe.experts, "parallel.expert", parallel.expert)
        _must_divide(
            "model.moe.expert_hidden_size",
            model.moe.expert_hidden_size,
            "parallel.expert_tensor",
            parallel.expert_tensor,
        )
    for knob, value in by_tensor:
        _must_divide(knob, value, "parallel.tensor", parallel.tensor)
    if LayerKind.attention in kinds:
        _check_key_value_heads(model.attention.key_value_heads, parallel.tensor)
    if parallel.context > 1:
        _check_context(config, kinds)
    if LayerKind.moe in kinds and parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} with E layers needs parallel.sequence=true: the "
            "tensor-parallel ranks share the routed tokens out among themselves"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence=true needs parallel.tensor above 1: it shards the sequence over "
            "the tensor-parallel ranks"
        )
    if parallel.sequence:
        _must_divide(
            "train.sequence_length",
            train.sequence_length,
            "parallel.tensor",
            parallel.tensor,
        )


def _check_context(config: Config, kinds: set[LayerKind]) -> None:
    """Each context-parallel rank gets whole heads of its tensor-parallel rank, and what heads
    share (Mamba-2's groups, key-value heads) whole or with other ranks."""
    model, parallel = config.model, config.parallel
    together, size = "parallel.tensor x parallel.context", parallel.tensor * parallel.context
    shared = []
    if LayerKind.attention in kinds:
        _must_divide("model.attention.heads", model.attention.heads, together, size)
        shared.append(("model.attention.key_value_heads", model.attention.key_value_heads))
    if LayerKind.mamba in kinds:
        _must_divide("model.mamba.heads", model.mamba.heads, together, size)
        shared.append(("model.mamba.groups", model.mamba.groups))
    for knob, value in shared:
        here = max(1, value // parallel.tensor)
        if here % parallel.context and parallel.context % here:
            raise ConfigError(
                f"{knob}={value} is {here} a tensor-parallel rank, which must be a multiple or a "
                f"divisor of parallel.context={parallel.context}"
            )
    pieces = parallel.context * (parallel.tensor if parallel.sequence else 1)
    knobs = "parallel.context" + (" x parallel.tensor" if parallel.sequence else "")
    _must_divide("train.sequence_length", config.train.sequence_length, knobs, pieces)


def _check_key_value_heads(key_value_heads: int, tensor: int) -> None:
    """Ranks hold whole key-value heads, or several ranks share one."""
    if key_value_heads % tensor and tensor % key_value_heads:
        raise ConfigError(
            f"model.attention.key_value_heads={key_value_heads} must be a multiple or a divisor "
            f"of parallel.tensor={tensor}"
        )


def _check_stages(config: Config, stages: list[list[LayerKind]]) -> None:
    """Stages written into the pattern must be as many as the layout has; without any the layers
    must suffice for them."""
    parallel, pattern = config.parallel, config.model.pattern
    wanted, found, num_layers = (
        parallel.pipeline * parallel.virtual_pipeline,
        len(stages),
        sum(map(len, stages)),
    )
    knobs = f"parallel.pipeline={parallel.pipeline}"
    if parallel.virtual_pipeline > 1:
        if parallel.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline "
                "above 1: one rank has nobody to interleave its stages with"
            )
        knobs += f" x parallel.virtual_pipeline={parallel.virtual_pipeline}"
    if wanted > num_layers:
        raise ConfigError(
            f"{knobs} is more than the {num_layers} layers of model.pattern={pattern}"
        )
    if found not in (1, wanted):
        model = replace(config.model, pattern=pattern.replace("|", ""))
        proposal = stage_pattern(replace(config, model=model))
        raise ConfigError(
            f"model.pattern={pattern} has {found} pipeline stage(s), separated by |, but {knobs}; "
            f"without | FLOPs decide: '{proposal}'"
        )


def _check_ranks(config: Config, num_ranks: int) -> None:
    parallel = config.parallel
    if num_ranks < 1:
        raise ConfigError(f"the number of ranks is {num_ranks}: must be 1 or more")
    grids = {
        "parallel.tensor x parallel.pipeline x parallel.context": (
            parallel.tensor * parallel.pipeline * parallel.context
        ),
        "parallel.expert x parallel.expert_tensor x parallel.pipeline": (
            parallel.expert * parallel.expert_tensor * parallel.pipeline
        ),
    }
    for knobs, size in grids.items():
        if num_ranks % size:
            raise ConfigError(
                f"{num_ranks} rank(s) cannot be divided by {knobs} = {size}: launch a multiple "
                f"of {size} ranks or make a dimension smaller"
            )
    _check_overlap(parallel)
    dtype = config.precision.parameter_dtype
    if dtype == Dtype.bfloat16 and not parallel.distributed_optimizer:
        # UPSTREAM(megatron-core 0.19.2): its plain optimizer mixes up BF16 parameters and those
        # kept in FP32 (A_log, D, dt_bias) when it names its state for a checkpoint.
        raise ConfigError(
            "parallel.distributed_optimizer=false with precision.parameter_dtype=bfloat16: such a "
            "run could not save a checkpoint; leave the optimizer distributed"
        )


def _check_overlap(parallel: ParallelConfig) -> None:
    if parallel.overlap_parameter_gather and not (
        parallel.distributed_optimizer and parallel.overlap_gradient_reduce
    ):
        raise ConfigError(
            "parallel.overlap_parameter_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.overlap_gradient_reduce=true: it gathers what they cut"
        )
    if parallel.overlap_pipeline and parallel.virtual_pipeline == 1:
        raise ConfigError(
            "parallel.overlap_pipeline=true needs parallel.virtual_pipeline above 1: a rank with "
            "one stage has nothing else to compute while it sends"
        )


def _check_batch(config: Config, num_ranks: int) -> None:
    """Both batches are whole sequences, and every data-parallel rank takes an equal number of
    whole micro batches of them."""
    train, parallel = config.train, config.parallel
    data_parallel = num_ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    length = train.sequence_length
    together = train.micro_batch_sequences * data_parallel
    rounds = ""
    if parallel.virtual_pipeline > 1:  # interleaved stages take micro-batches in whole rounds
        together *= parallel.pipeline
        rounds = f"parallel.pipeline={parallel.pipeline} interleaved micro-batches x "
    for knob in ("global_batch_tokens", "validation_tokens"):
        value = getattr(train, knob)
        _must_divide(f"train.{knob}", value, "train.sequence_length", length)
        if value // length % together:
            raise ConfigError(
                f"train.{knob}={value} is {value // length} sequences of {length}, which "
                f"{data_parallel} data-parallel rank(s) x {rounds}"
                f"train.micro_batch_sequences={train.micro_batch_sequences} = {together} do not "
                f"divide; {_nearest(value, together * length)} would do"
            )


def _check_schedule(config: Config) -> None:
    optim, total = config.optim, config.train.total_tokens
    _check_order(
        "optim.min_learning_rate",
        optim.min_learning_rate,
        "optim.peak_learning_rate",
        optim.peak_learning_rate,
    )
    if optim.warmup_tokens + optim.decay_tokens > total:
        raise ConfigError(
            f"optim.warmup_tokens={optim.warmup_tokens} + "
            f"optim.decay_tokens={optim.decay_tokens} exceed train.total_tokens={total}"
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.kind == DataKind.prepared and not (data.phases and data.validation):
        empty = "data.validation" if data.phases else "data.phases"
        raise ConfigError(f"{empty} is empty: name the folders `data prepare` wrote")
    starts = [phase.from_tokens for phase in data.phases]
    if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
        raise ConfigError(
            f"data.phases: from_tokens are {starts}; they must start at 0 and increase"
        )
    blends = {f"data.phases[{n}].blend": phase.blend for n, phase in enumerate(data.phases)}
    if data.validation:
        blends["data.validation"] = data.validation
    for knob, blend in blends.items():
        if not blend:
            raise ConfigError(f"{knob} is empty: name at least one folder")
        for source in blend:
            if not 0 < source.weight < inf:
                raise ConfigError(
                    f"{knob}: weight={source.weight} of {source.path} must be a finite number "
                    "above 0"
                )


def _check_order(low_knob: str, low: float, high_knob: str, high: float) -> None:
    if not low <= high:
        raise ConfigError(f"{low_knob}={low} must not exceed {high_knob}={high}")


def _must_divide(knob: str, value: int, divisor_knob: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"{knob}={value} is not a multiple of {divisor_knob}={divisor}; "
            f"{_nearest(value, divisor)} would be"
        )


def _nearest(value: int, divisor: int) -> str:
    lower = value // divisor * divisor
    return f"{lower} or {lower + divisor}" if lower else str(divisor)
