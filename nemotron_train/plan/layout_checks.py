"""Checks of the parallel layout: divisibility, stages, ranks, batches, overlap.

Each violation is a ConfigError: one line with the knob or knobs, the value and what would be valid.
`plan.checks` calls these checks after the checks of single knobs. No torch.
"""

from dataclasses import replace

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, Dtype, ParallelConfig, TrainConfig
from nemotron_train.plan.architecture.layers import LayerKind
from nemotron_train.plan.architecture.stages import stage_pattern


def check_layout(
    config: Config, stages: list[list[LayerKind]], kinds: set[LayerKind], num_ranks: int
) -> None:
    """Raises ConfigError if `config` cannot be distributed over `num_ranks` ranks.

    stages: layers of the pattern, split at `|`; kinds: all kinds of layers in the model, including
    the multi-token-prediction block."""
    _check_split(config, kinds)
    _check_stages(config, stages)
    _check_ranks(config, num_ranks)
    _check_batch(config, num_ranks)


def _check_split(config: Config, kinds: set[LayerKind]) -> None:
    """Check the sizes that each parallel dimension must divide."""
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
        must_divide("model.moe.experts", model.moe.experts, "parallel.expert", parallel.expert)
        must_divide(
            "model.moe.expert_hidden_size",
            model.moe.expert_hidden_size,
            "parallel.expert_tensor",
            parallel.expert_tensor,
        )
    for knob, value in by_tensor:
        must_divide(knob, value, "parallel.tensor", parallel.tensor)
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
        for knob, length in row_lengths(train).items():
            must_divide(knob, length, "parallel.tensor", parallel.tensor)


def _check_context(config: Config, kinds: set[LayerKind]) -> None:
    """Each context-parallel rank gets whole heads of its tensor-parallel rank. Mamba-2 groups and
    key-value heads, which several heads share, are whole on a rank or held by several ranks."""
    model, parallel = config.model, config.parallel
    knob_product, size = "parallel.tensor x parallel.context", parallel.tensor * parallel.context
    shared = []
    if LayerKind.attention in kinds:
        must_divide("model.attention.heads", model.attention.heads, knob_product, size)
        shared.append(("model.attention.key_value_heads", model.attention.key_value_heads))
    if LayerKind.mamba in kinds:
        must_divide("model.mamba.heads", model.mamba.heads, knob_product, size)
        shared.append(("model.mamba.groups", model.mamba.groups))
    for knob, value in shared:
        local = max(1, value // parallel.tensor)
        if local % parallel.context and parallel.context % local:
            raise ConfigError(
                f"{knob}={value} is {local} a tensor-parallel rank, which must be a multiple or a "
                f"divisor of parallel.context={parallel.context}"
            )
    pieces = parallel.context * (parallel.tensor if parallel.sequence else 1)
    knobs = "parallel.context" + (" x parallel.tensor" if parallel.sequence else "")
    for knob, length in row_lengths(config.train).items():
        must_divide(knob, length, knobs, pieces)


def row_lengths(train: TrainConfig) -> dict[str, int]:
    """Knob -> sequence length in tokens, for the normal steps and, if set, the short steps."""
    lengths = {"train.sequence_length": train.sequence_length}
    if train.short_sequence_length:
        lengths["train.short_sequence_length"] = train.short_sequence_length
    return lengths


def _check_key_value_heads(key_value_heads: int, tensor: int) -> None:
    """Each rank holds whole key-value heads, or several ranks share one."""
    if key_value_heads % tensor and tensor % key_value_heads:
        raise ConfigError(
            f"model.attention.key_value_heads={key_value_heads} must be a multiple or a divisor "
            f"of parallel.tensor={tensor}"
        )


def _check_stages(config: Config, stages: list[list[LayerKind]]) -> None:
    """A pattern with `|` must have as many stages as the layout. One without `|` needs at least one
    layer per stage."""
    parallel, pattern = config.parallel, config.model.pattern
    num_required = parallel.pipeline * parallel.virtual_pipeline
    found = len(stages)
    num_layers = sum(map(len, stages))
    knobs = f"parallel.pipeline={parallel.pipeline}"
    if parallel.virtual_pipeline > 1:
        if parallel.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline "
                "above 1: one rank has nobody to interleave its stages with"
            )
        knobs += f" x parallel.virtual_pipeline={parallel.virtual_pipeline}"
    if num_required > num_layers:
        raise ConfigError(
            f"{knobs} is more than the {num_layers} layers of model.pattern={pattern}"
        )
    if found not in (1, num_required):
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
        # UPSTREAM(megatron-core 0.19.2): when it names its state for a checkpoint, its plain
        # optimizer confuses BF16 parameters with those kept in FP32 (A_log, D, dt_bias).
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
    """The training and the validation batch must be whole sequences, and every data-parallel rank
    must get the same number of whole micro-batches."""
    train, parallel = config.train, config.parallel
    data_parallel = num_ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    length = train.sequence_length
    divisor = train.micro_batch_sequences * data_parallel
    rounds = ""
    if (
        parallel.virtual_pipeline > 1
    ):  # interleaved 1F1B needs a multiple of `pipeline` micro-batches
        divisor *= parallel.pipeline
        rounds = f"parallel.pipeline={parallel.pipeline} interleaved micro-batches x "
    for knob in ("global_batch_tokens", "validation_tokens"):
        value = getattr(train, knob)
        must_divide(f"train.{knob}", value, "train.sequence_length", length)
        if value // length % divisor:
            raise ConfigError(
                f"train.{knob}={value} is {value // length} sequences of {length}, which "
                f"{data_parallel} data-parallel rank(s) x {rounds}"
                f"train.micro_batch_sequences={train.micro_batch_sequences} = {divisor} do not "
                f"divide; {_nearest(value, divisor * length)} would do"
            )


def must_divide(knob: str, value: int, divisor_knob: str, divisor: int) -> None:
    """Raises ConfigError unless `value` is a multiple of `divisor`; the message has the nearest
    multiples."""
    if value % divisor:
        raise ConfigError(
            f"{knob}={value} is not a multiple of {divisor_knob}={divisor}; "
            f"{_nearest(value, divisor)} would be"
        )


def _nearest(value: int, divisor: int) -> str:
    lower = value // divisor * divisor
    return f"{lower} or {lower + divisor}" if lower else str(divisor)
