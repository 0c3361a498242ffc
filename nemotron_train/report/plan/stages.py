"""`plan`'s table of pipeline stages: who holds which layers, and how evenly the work is cut.

Owns this text; the cut is `plan.architecture.stages`' and printing is `report.plan.table`'s.
"""

from collections.abc import Iterator, Sequence

from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.stages import flops_by_rank, imbalance, stages

STAGE_COLUMNS = ("stage", "pipeline rank", "layers", "pattern", "share")


def stage_rows(config: Config) -> Iterator[Sequence[str]]:
    """One row a stage; `share` is that of the model's FLOPs."""
    found = stages(config)
    whole = sum(stage.flops for stage in found)
    for number, stage in enumerate(found):
        first, last = stage.first_layer, stage.first_layer + len(stage.pattern) - 1
        before = "embedding, " if number == 0 else ""
        after = ""
        if number == len(found) - 1:
            after = ", multi-token prediction" * (config.model.mtp.depths > 0) + ", output"
        yield (
            str(number),
            str(stage.rank),
            f"{first}–{last}" if last > first else str(first),
            f"{before}{stage.pattern}{after}",
            f"{stage.flops / whole:.1%}",
        )


def balance_lines(config: Config) -> Iterator[str]:
    """How uneven the stages are, and the ranks where each holds several."""
    found = stages(config)
    by = "cut where model.pattern has |" if "|" in config.model.pattern else "balanced by FLOPs"
    yield f"{by}: the largest stage has {imbalance([s.flops for s in found]):.2f} x the mean FLOPs"
    if config.parallel.virtual_pipeline > 1:
        yield (
            f"a rank runs {config.parallel.virtual_pipeline} stages in turn (interleaved 1F1B); "
            f"the busiest has {imbalance(flops_by_rank(config)):.2f} x the mean"
        )
