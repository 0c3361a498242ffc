"""`plan`'s table of the bytes that a rank passes to collectives per step, by group and kind.

Owns: the text. Does not own: the numbers (`plan.cost.communication`), printing
(`report.plan.table`).
"""

from collections.abc import Iterator, Sequence

from nemotron_train.config.quantities import format_bytes
from nemotron_train.config.schema import Config
from nemotron_train.plan.cost.communication import Traffic, rank_traffic
from nemotron_train.plan.derive import Derived
from nemotron_train.report.plan.ranks import axes

TRAFFIC_SIZES = ("bytes", "least")


def traffic_columns(config: Config) -> Sequence[str]:
    """Column headings. With pipeline parallelism the ranks differ, so there are two sizes per row:
    the largest and the smallest."""
    sizes = TRAFFIC_SIZES if config.parallel.pipeline > 1 else TRAFFIC_SIZES[:1]
    return ("group", "collective", "of", "ranks", *sizes)


def traffic_rows(config: Config, derived: Derived) -> Iterator[Sequence[str]]:
    """One row per group, collective and purpose."""
    sizes = {axis.name: axis.size for axis in axes(config, derived)}
    sizes["embedding"] = 2
    ranks = [{_key(t): t.size for t in rank} for rank in rank_traffic(config, derived)]
    keys = dict.fromkeys(key for rank in ranks for key in rank)
    for group, collective, purpose in sorted(keys, key=lambda key: list(sizes).index(key[0])):
        by_rank = [rank.get((group, collective, purpose), 0) for rank in ranks]
        most, least = format_bytes(max(by_rank)), format_bytes(min(by_rank))
        row = (group, collective, purpose, f"{sizes[group]:,}", most, least)
        yield row[: len(traffic_columns(config))]


def traffic_lines(config: Config, derived: Derived) -> Iterator[str]:
    """Lines below the table: totals of the busiest pipeline rank, and what is counted."""
    totals = [sum(t.size for t in rank) for rank in rank_traffic(config, derived)]
    busiest = max(range(len(totals)), key=totals.__getitem__)
    if len(totals) > 1:
        yield "bytes: of the pipeline rank with most of it; least: of the one with least"
        yield (
            f"pipeline rank {busiest} hands over most, {format_bytes(max(totals))} in all; the "
            f"least busy {format_bytes(min(totals))}"
        )
    else:
        yield f"in all {format_bytes(totals[0])}"
    yield "counted: a message, the tensor of an all-reduce, what goes into a reduce-scatter or"
    yield "all-to-all, what comes out of an all-gather; a ring of n ranks sends (n-1)/n of that, an"
    yield "all-reduce twice as much; left out: a few KiB of losses, norms and counts"


def _key(traffic: Traffic) -> tuple[str, str, str]:
    return traffic.group, traffic.collective, traffic.purpose
