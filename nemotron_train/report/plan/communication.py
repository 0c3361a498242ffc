"""`plan`'s table of what a rank hands to collectives in a step, by group and kind.

Owns this text; the numbers are `plan.cost.communication`'s and printing is `report.plan.table`'s.
"""

from collections.abc import Iterator, Sequence

from nemotron_train.config.quantities import format_bytes
from nemotron_train.config.schema import Config
from nemotron_train.plan.cost.communication import Traffic, rank_traffic
from nemotron_train.plan.derive import Derived
from nemotron_train.report.plan.ranks import axes

TRAFFIC_SIZES = ("bytes", "least")


def traffic_columns(config: Config) -> Sequence[str]:
    """With pipeline ranks that differ, those with most and with least of a row."""
    sizes = TRAFFIC_SIZES if config.parallel.pipeline > 1 else TRAFFIC_SIZES[:1]
    return ("group", "collective", "of", "ranks", *sizes)


def traffic_rows(config: Config, derived: Derived) -> Iterator[Sequence[str]]:
    """One row a group, collective and purpose."""
    sizes = {axis.name: axis.size for axis in axes(config, derived)}
    sizes["embedding"] = 2
    ranks = [{_key(t): t.size for t in rank} for rank in rank_traffic(config, derived)]
    keys = dict.fromkeys(key for rank in ranks for key in rank)
    for group, collective, purpose in sorted(keys, key=lambda key: list(sizes).index(key[0])):
        found = [rank.get((group, collective, purpose), 0) for rank in ranks]
        most, least = format_bytes(max(found)), format_bytes(min(found))
        row = (group, collective, purpose, f"{sizes[group]:,}", most, least)
        yield row[: len(traffic_columns(config))]


def traffic_lines(config: Config, derived: Derived) -> Iterator[str]:
    """The busiest pipeline rank, what is counted and what is left out."""
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
