"""The process groups that `plan` shows are those that Megatron-Core forms.

Second truth: Megatron-Core's own RankGenerator. Not covered: groups over several axes at once.
"""

import pytest

from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.derive import derive
from nemotron_train.platform import device
from nemotron_train.report.plan.ranks import axes, group_rows

LAYOUTS = {
    8: ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"],
    16: ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "parallel.expert=4"],
    32: ["parallel.pipeline=4", "parallel.expert=4", "parallel.tensor=2", "parallel.sequence=true"],
}
TOKENS = {"dense": ["tp", "cp", "dp", "pp"], "expert": ["tp", "ep", "dp", "pp"]}
NAMES = {
    "dense": ["tensor", "context", "data", "pipeline"],
    "expert": ["expert tensor", "expert", "expert data", "pipeline"],
}


@pytest.mark.parametrize("num_ranks", LAYOUTS)
@pytest.mark.parametrize("grid", TOKENS)
def test_groups_are_megatrons(num_ranks: int, grid: str) -> None:
    device.prepare()  # before Megatron-Core is imported
    from megatron.core.parallel_state import RankGenerator

    config = compose_config(
        [
            *LAYOUTS[num_ranks],
            "model.pattern=MEM*EMEM",
            "model.attention.heads=8",
            "train.micro_batch_sequences=1",
            "train.global_batch_tokens=8192",
            "train.validation_tokens=8192",
        ]
    )
    derived = derive(config, num_ranks)
    parallel = config.parallel
    sizes = {"tp": parallel.tensor, "ep": 1, "dp": derived.data_parallel, "cp": parallel.context}
    if grid == "expert":
        sizes = {"tp": parallel.expert_tensor, "ep": parallel.expert, "cp": 1}
        sizes["dp"] = derived.expert_data_parallel
    generator = RankGenerator(pp=parallel.pipeline, order="tp-cp-ep-dp-pp", **sizes)
    found = {axis.name: axis for axis in axes(config, derived)}
    for token, name in zip(TOKENS[grid], NAMES[grid], strict=True):
        ours = [list(group) for group in found[name].groups(num_ranks)]
        assert ours == sorted(generator.get_ranks(token)), name
        assert sorted(rank for group in ours for rank in group) == list(range(num_ranks))


def test_thousands_of_ranks_stay_short() -> None:
    config = compose_config(["run=ultra_550b_a55b"])
    rows = list(group_rows(config, derive(config, 6144)))
    assert rows and all(len("  ".join(row)) < 120 for row in rows)
