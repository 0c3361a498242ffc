"""`plan`'s table of the memory of a rank, by pipeline rank.

Owns: the text. Does not own: the numbers (`plan.cost.memory`), printing (`report.plan.table`).
"""

from collections.abc import Iterator, Sequence

from nemotron_train.config.quantities import format_bytes
from nemotron_train.config.schema import Config, RecomputeMode
from nemotron_train.plan.cost.memory import RankMemory, rank_memory
from nemotron_train.plan.cost.operators import CPU, GPU
from nemotron_train.plan.derive import Derived

MEMORY_COLUMNS = (
    "pipeline rank",
    "elements",
    "weights",
    "gradients",
    "optimizer",
    "other",
    "kept",
    "in flight",
    "peak, CPU",
    "peak, GPU",
)


def memory_rows(config: Config, derived: Derived) -> Iterator[Sequence[str]]:
    """One row per pipeline rank. All ranks of one pipeline stage hold the same amount."""
    pairs = zip(rank_memory(config, derived, CPU), rank_memory(config, derived, GPU), strict=True)
    for on_cpu, on_gpu in pairs:
        yield _row(on_cpu, on_gpu)


def _row(on_cpu: RankMemory, on_gpu: RankMemory) -> Sequence[str]:
    return (
        str(on_cpu.stage),
        f"{on_cpu.parameters:,}",
        format_bytes(on_cpu.parameter_bytes),
        format_bytes(on_cpu.gradient_bytes),
        format_bytes(on_cpu.optimizer_bytes),
        format_bytes(on_cpu.quantized_bytes + on_cpu.buffer_bytes),
        format_bytes(on_cpu.kept_bytes),
        str(on_cpu.in_flight),
        format_bytes(on_cpu.peak_bytes),
        format_bytes(on_gpu.peak_bytes),
    )


def memory_lines(config: Config, derived: Derived) -> Iterator[str]:
    """Lines below the table: what the columns include and exclude."""
    masters = " and master weights" if derived.parameter_dtype != "float32" else ""
    sharded = "over the replicas" if config.parallel.distributed_optimizer else "on every rank"
    yield (
        f"weights in {derived.parameter_dtype}, gradients in float32; optimizer: two moments"
        f"{masters} in float32, {sharded}"
    )
    yield "other: weights kept quantized by emulated formats, Megatron's buffer of gathered tokens"
    yield f"kept: activations of one micro-batch, with {_recomputation(config)}"
    yield "peaks: live tensors; a CPU's within 10 % of measured ones (benchmarks/memory.py)"
    yield "peak, GPU: the same without what a CPU copies for products and exchanges, not measured"
    saved = max(memory.saved_bytes for memory in rank_memory(config, derived, GPU))
    how = "one tensor at a time (train.async_save=true copies all to the host)"
    if config.train.async_save:
        how = "copied to the host and kept there (train.async_save=true)"
    yield f"a save writes up to {format_bytes(saved)} a rank, {how}"


def _recomputation(config: Config) -> str:
    recompute = config.train.recompute
    modes = {"mamba": recompute.mamba, "attention": recompute.attention, "moe": recompute.moe}
    parts = [f"{mode} of {kind}" for kind, mode in modes.items() if mode != RecomputeMode.off]
    return f"recomputation {', '.join(parts)}" if parts else "no recomputation"
