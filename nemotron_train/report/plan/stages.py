"""`plan`'s table of pipeline stages: which rank holds which layers, and how balanced they are.

Owns: the text. Does not own: the split into stages (`plan.architecture.stages`), printing
(`report.plan.table`).
"""

from collections.abc import Iterator, Sequence

from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.stages import flops_by_rank, imbalance, stages

STAGE_COLUMNS = ("stage", "pipeline rank", "layers", "pattern", "share")


def stage_rows(config: Config) -> Iterator[Sequence[str]]:
    """One row per stage; `share` is its share of the model's FLOPs."""
    all_stages = stages(config)
    total_flops = sum(stage.flops for stage in all_stages)
    for number, stage in enumerate(all_stages):
        first, last = stage.first_layer, stage.first_layer + len(stage.pattern) - 1
        before = "embedding, " if number == 0 else ""
        after = ""
        if number == len(all_stages) - 1:
            after = ", multi-token prediction" * (config.model.mtp.depths > 0) + ", output"
        yield (
            str(number),
            str(stage.rank),
            f"{first}–{last}" if last > first else str(first),
            f"{before}{stage.pattern}{after}",
            f"{stage.flops / total_flops:.1%}",
        )


def balance_lines(config: Config) -> Iterator[str]:
    """Lines below the table: the imbalance of the stages, and of the ranks if each has several
    stages."""
    cuts = stages(config)
    by = "cut where model.pattern has |" if "|" in config.model.pattern else "balanced by FLOPs"
    yield f"{by}: the largest stage has {imbalance([s.flops for s in cuts]):.2f} x the mean FLOPs"
    if config.parallel.virtual_pipeline > 1:
        yield (
            f"a rank runs {config.parallel.virtual_pipeline} stages in turn (interleaved 1F1B); "
            f"the busiest has {imbalance(flops_by_rank(config)):.2f} x the mean"
        )
