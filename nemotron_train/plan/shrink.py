"""Reduction of a configuration to a size that CPU ranks of a laptop can train, with all features.

Owns: the reduced sizes, and the features that are preserved: kinds and order of layers, every
parallel dimension above 1, relations between heads, groups, experts and ranks, latent width, shared
expert, multi-token prediction, blends and phases of the data, the optimizer. Does not own: the
checks that use the reduced configuration (`check`). No torch.

Layout faults depend on relations, not on sizes (more ranks than key-value heads, experts over
tensor-parallel ranks, a stage without attention). So degrees above 1 become 2, and relations are
preserved.
"""

import dataclasses
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.gpu import GpuConfig
from nemotron_train.config.guard import GuardConfig
from nemotron_train.config.schema import (
    BlendSource,
    Config,
    DataKind,
    DataPhase,
    Dtype,
    FormatConfig,
    GemmFormat,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    TelemetryConfig,
)
from nemotron_train.plan.derive import derive

DIMENSIONS = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
DEGREE = 2  # of every parallel dimension above 1
WIDTH, HEAD, LATENT, VOCAB, LENGTH = 64, 16, 32, 512, 64
EXPERTS, CHOSEN, DEPTHS, SOURCES, PHASES = 8, 3, 2, 3, 3
BUCKET = 20_000  # parameters per gradient bucket: small enough to give several buckets
BLOCK_OF_HEADS = 32  # Mamba-2 heads per rank under a plan with block-scaled formats
LAYERS = 4  # minimum number of layers, if the pattern has that many
MICRO_BATCHES = 4  # per replica: more than pipeline stages, to reach the pipeline's steady state


@dataclass(frozen=True)
class Shrunk:
    """A reduced configuration. `config` runs on `num_ranks` ranks. `changes` lists (dotted knob,
    old value, new value). `data.*` of `config` refers to folders that the caller must still write:
    `source_folder(folder, number)` for `number` below `sources`."""

    config: Config
    num_ranks: int
    sources: int
    changes: list[tuple[str, Any, Any]]


def source_folder(folder: Path, number: int) -> Path:
    """The folder for the prepared data of source `number` of a reduced configuration."""
    return folder / f"source_{number}"


def shrink(
    config: Config, folder: Path, *, max_ranks: int, steps: int, own_precision: bool
) -> Shrunk:
    """`config` reduced to `steps` optimizer steps on at most `max_ranks` CPU ranks, with data in
    `folder`.

    own_precision: keep the precision plan; otherwise use FP32, so that layouts differ only by the
    rounding of sums. Raises ConfigError if the layout needs more ranks, or if the reduced
    configuration is invalid. Does not check that the full configuration fits its ranks.
    """
    small = deepcopy(config)
    small.resume, small.branch = "", ""
    small.switch_precision = False
    small.fresh_data = small.weights_only = False
    small.logging, small.guard, small.gpu = LoggingConfig(), GuardConfig(), GpuConfig()
    ranks = _shrink_parallel(small.parallel, max_ranks)
    _shrink_model(small.model, small.parallel, config.parallel.tensor * config.parallel.context)
    _shrink_training(small, ranks, steps)
    _shrink_precision(small, own_precision)
    if _has_blocks(small.precision):
        # Each tensor-parallel rank's rows of in_proj must be whole blocks. The last rows are dt,
        # one per head.
        small.model.mamba.heads = BLOCK_OF_HEADS * small.parallel.tensor * small.parallel.context
        small.model.mamba.head_dim = HEAD // 4
    sources = _shrink_data(small, config.train.total_tokens, folder)
    try:
        derive(small, ranks)
    except ConfigError as error:
        raise ConfigError(f"shrunk for a check: {error}") from error
    return Shrunk(small, ranks, sources, _changes(config, small))


def one_rank(config: Config) -> Config:
    """The same training on one rank: the reference for other layouts."""
    unsharded = deepcopy(config)
    unsharded.parallel = ParallelConfig(distributed_optimizer=config.parallel.distributed_optimizer)
    unsharded.model.pattern = config.model.pattern.replace("|", "")
    return unsharded


def alone(config: Config, dimensions: tuple[str, ...], data_parallel: int) -> tuple[Config, int]:
    """`config` with only these dimensions of its layout (they may include "data"), and its number
    of ranks. "virtual_pipeline" implies "pipeline"."""
    partial = one_rank(config)
    partial.parallel = deepcopy(config.parallel)
    kept_dimensions = (
        {*dimensions, "pipeline"} if "virtual_pipeline" in dimensions else {*dimensions}
    )
    for name in DIMENSIONS:
        if name not in kept_dimensions:
            setattr(partial.parallel, name, 1)
    partial.parallel.sequence = config.parallel.sequence and partial.parallel.tensor > 1
    partial.parallel.overlap_pipeline &= partial.parallel.virtual_pipeline > 1
    if partial.parallel.pipeline > 1:
        partial.model.pattern = config.model.pattern
        if partial.model.pattern.count("|") + 1 != num_stages(partial.parallel):
            letters = partial.model.pattern.replace("|", "")
            partial.model.pattern = _cut(letters, num_stages(partial.parallel))
    return partial, smallest_num_ranks(partial.parallel) * (
        data_parallel if "data" in dimensions else 1
    )


def dimensions(config: Config, num_ranks: int) -> list[str]:
    """The parallel dimensions above 1 of a layout on `num_ranks` ranks. Includes "data" only if
    there are more replicas than the expert dimensions need."""
    names = [name for name in DIMENSIONS if getattr(config.parallel, name) > 1]
    return names + (["data"] if num_ranks > smallest_num_ranks(config.parallel) else [])


def another_layout(config: Config, num_ranks: int) -> tuple[Config, int]:
    """`config` with a different layout, and its number of ranks: one rank; or two ranks, with the
    experts divided among them, if `config` itself runs on one rank."""
    layout = one_rank(config)
    if num_ranks > 1:
        return layout, 1
    if "E" in layout.model.pattern:
        layout.parallel.expert = DEGREE
    return layout, DEGREE


def smallest_num_ranks(parallel: ParallelConfig) -> int:
    """The smallest number of ranks for the layout: a multiple of the dense and the expert
    groups."""
    dense = parallel.tensor * parallel.context
    expert = parallel.expert * parallel.expert_tensor
    return parallel.pipeline * lcm(dense, expert)


def num_stages(parallel: ParallelConfig) -> int:
    """Number of pipeline stages, including virtual stages."""
    return parallel.pipeline * parallel.virtual_pipeline


def _shrink_parallel(parallel: ParallelConfig, max_ranks: int) -> int:
    for name in DIMENSIONS:
        setattr(parallel, name, min(getattr(parallel, name), DEGREE))
    parallel.bucket_parameters = min(parallel.bucket_parameters, BUCKET)
    ranks = smallest_num_ranks(parallel)
    if ranks > max_ranks:
        raise ConfigError(
            f"--ranks {max_ranks}: the layout, every dimension shrunk to {DEGREE}, needs {ranks}; "
            f"give --ranks {ranks} or leave a dimension out (parallel.KNOB=1)"
        )
    return ranks * DEGREE if ranks * DEGREE <= max_ranks else ranks


def _shrink_model(model: ModelConfig, parallel: ParallelConfig, cut_before: int) -> None:
    """Independent sizes become constants. Counts that are divided over ranks keep their relation to
    the number of ranks, which is `cut_before` in the user's layout."""
    cut = parallel.tensor * parallel.context
    model.hidden_size = min(model.hidden_size, WIDTH)
    model.vocab_size = min(model.vocab_size, VOCAB)
    attention, mamba, moe = model.attention, model.mamba, model.moe
    attention.heads, attention.key_value_heads = _heads(
        attention.heads, attention.key_value_heads, cut_before, cut
    )
    mamba.heads, mamba.groups = _heads(mamba.heads, mamba.groups, cut_before, cut)
    attention.head_dim = min(attention.head_dim, HEAD)
    mamba.head_dim, mamba.state_size = min(mamba.head_dim, HEAD), min(mamba.state_size, HEAD)
    mamba.chunk_size = min(mamba.chunk_size, LENGTH // 4)
    moe.experts = min(moe.experts, EXPERTS)
    moe.experts_per_token = min(moe.experts_per_token, CHOSEN, moe.experts)
    moe.expert_hidden_size = min(moe.expert_hidden_size, WIDTH)
    moe.shared_expert_hidden_size = min(moe.shared_expert_hidden_size, WIDTH)
    moe.latent_size = min(moe.latent_size, LATENT)
    model.mtp.depths = min(model.mtp.depths, DEPTHS)
    model.mtp.pattern = _window(model.mtp.pattern, LAYERS)
    stages = num_stages(parallel)
    letters = model.pattern.replace("|", "")
    length = LAYERS + 2 * (stages - 1)
    if len(letters) > length or model.pattern.count("|") != stages - 1:
        model.pattern = _cut(_window(letters, length), stages)


def _heads(heads: int, shared: int, cut_before: int, cut: int) -> tuple[int, int]:
    """Reduced (heads, shared heads); `shared` counts key-value heads or Mamba-2 groups. The number
    of heads is a multiple of `cut`. There are as many shared heads as ranks, or fewer if ranks had
    to share them in the layout of `cut_before` ranks."""
    small = min(shared, cut if cut > 1 else DEGREE) if shared >= cut_before else max(1, cut // 2)
    ratio = min(heads // shared, DEGREE)
    while small * ratio % cut:
        ratio += 1
    return small * ratio, small


def _window(letters: str, length: int) -> str:
    """The first shortest substring of `letters`, at least `length` long, with all their kinds."""
    kinds = set(letters)
    for size in range(min(length, len(letters)), len(letters) + 1):
        for start in range(len(letters) - size + 1):
            if set(letters[start : start + size]) == kinds:
                return letters[start : start + size]
    return letters


def _cut(letters: str, stages: int) -> str:
    """`letters` split by `|` into `stages` non-empty parts."""
    bounds = [len(letters) * stage // stages for stage in range(stages + 1)]
    return "|".join(letters[a:b] for a, b in pairwise(bounds))


def _shrink_training(config: Config, ranks: int, steps: int) -> None:
    train, optim, parallel = config.train, config.optim, config.parallel
    replicas = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    train.sequence_length = min(train.sequence_length, LENGTH)
    if train.short_sequence_length:
        train.short_sequence_length, train.short_share = train.sequence_length // 2, 0.5
    train.micro_batch_sequences = min(train.micro_batch_sequences, 2)
    micro_batches = MICRO_BATCHES if parallel.pipeline > 1 else MICRO_BATCHES // 2
    rows = train.micro_batch_sequences * replicas
    batch = rows * micro_batches * train.sequence_length
    train.global_batch_tokens, train.total_tokens = batch, steps * batch
    train.validation_tokens = batch
    train.validate_every_steps = train.save_every_steps = train.stop_after_steps = 0
    train.stop_after_minutes = 0.0
    train.log_every_steps = 1
    train.threads = 1
    train.keep_checkpoints = 2
    quarter = steps // 4 * batch
    optim.warmup_tokens = min(optim.warmup_tokens, quarter)
    optim.decay_tokens = min(optim.decay_tokens, quarter)


def _shrink_precision(config: Config, own_precision: bool) -> None:
    if not own_precision:
        float32 = GemmFormat.float32
        default = FormatConfig(format=float32, fprop=float32, dgrad=float32, wgrad=float32)
        config.precision = PrecisionConfig(
            name="fp32", parameter_dtype=Dtype.float32, default=default
        )
        return
    precision = config.precision
    precision.telemetry = TelemetryConfig()
    for rule in precision.rules.values():
        rule.optional = True  # the reduced model may lack the layers that it names
        rule.first_layers, rule.last_layers = min(rule.first_layers, 1), min(rule.last_layers, 1)


def _has_blocks(precision: PrecisionConfig) -> bool:
    format_configs = [precision.default, *precision.rules.values()]
    formats = {f for entry in format_configs for f in (entry.fprop, entry.dgrad, entry.wgrad)}
    return bool(formats & {GemmFormat.nvfp4, GemmFormat.mxfp8})


def _shrink_data(config: Config, total_before: int, folder: Path) -> int:
    """Replace the user's data folders by new ones. Keeps blends, weights and each phase's share of
    the run, for the first `SOURCES` folders and `PHASES` phases. Returns the number of sources."""
    data, batch = config.data, config.train.global_batch_tokens
    names: dict[str, str] = {}

    def replaced(blend: list[BlendSource]) -> list[BlendSource]:
        for source in blend:
            if source.path not in names and len(names) < SOURCES:
                names[source.path] = str(source_folder(folder, len(names)))
        return [BlendSource(names[s.path], s.weight) for s in blend if s.path in names]

    phases = data.phases[:PHASES] if data.kind == DataKind.prepared else []
    blends = [replaced(phase.blend) for phase in phases]
    first = next((blend for blend in blends if blend), None)
    first = first or [BlendSource(str(source_folder(folder, 0)), 1.0)]
    starts = [0]
    for phase in phases[1:]:
        share = phase.from_tokens / total_before
        scaled_start = int(share * config.train.total_tokens) // batch * batch
        starts.append(max(starts[-1] + batch, scaled_start))
    shrunk_phases = [(start, blend or first) for start, blend in zip(starts, blends, strict=False)]
    data.phases = [DataPhase(start, blend) for start, blend in shrunk_phases or [(0, first)]]
    data.kind, data.validation = DataKind.prepared, [BlendSource(first[0].path, 1.0)]
    data.tokenizer = str(source_folder(folder, 0) / "tokenizer")
    return max(1, len(names))


def _changes(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
    """All changed knobs of model, layout, training and optimizer, and the name of the plan."""
    changes = []
    for part in ("model", "parallel", "train", "optim"):
        changes += _different(getattr(before, part), getattr(after, part), part)
    if before.precision.name != after.precision.name:
        changes.append(("precision", before.precision.name, after.precision.name))
    return changes


def _different(before: Any, after: Any, knob: str) -> list[tuple[str, Any, Any]]:
    if dataclasses.is_dataclass(before):
        return [
            change
            for field in dataclasses.fields(before)
            for change in _different(
                getattr(before, field.name), getattr(after, field.name), f"{knob}.{field.name}"
            )
        ]
    return [(knob, before, after)] if before != after else []
