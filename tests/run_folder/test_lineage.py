"""What lineage.json keeps when a run goes back and goes on differently.

tests/run_folder/test_branch.py has whole runs; those that write the file are there.
"""

from typing import Any

from nemotron_train.run_folder.lineage import with_phases, with_switch

BF16 = {"name": "bf16", "digest": "b"}
NVFP4 = {"name": "nvfp4_all", "digest": "n"}


def test_a_switch_replaces_those_of_its_step_and_later() -> None:
    """The run was switched at steps 10 and 20. It is resumed from step 20, then from step 10, under
    another plan: what came at or after that step is no part of its history any more."""
    lineage: dict[str, Any] = {"branched_from": {"run": "a"}}
    for step in (10, 20):
        lineage = with_switch(lineage, step, 100 * step, BF16, NVFP4, {"name": "nvfp4_all"})
    again = with_switch(lineage, 20, 2000, BF16, NVFP4, {"name": "mine"})
    assert [switch["step"] for switch in again["switches"]] == [10, 20]
    assert again["switches"][-1]["precision"] == {"name": "mine"}
    back = with_switch(lineage, 10, 1000, BF16, NVFP4, {"name": "mine"})
    assert [switch["precision"]["name"] for switch in back["switches"]] == ["mine"]
    assert back["branched_from"] == {"run": "a"} and len(lineage["switches"]) == 2


def test_phases_replace_those_of_their_step_and_later() -> None:
    first, second = [{"from_tokens": 0}], [{"from_tokens": 0}, {"from_tokens": 9}]
    lineage = with_phases(with_phases({}, 5, 50, first), 8, 80, second)
    assert [change["step"] for change in lineage["phases"]] == [5, 8]
    assert with_phases(lineage, 5, 50, second)["phases"] == [
        {"step": 5, "tokens": 50, "phases": second}
    ]
