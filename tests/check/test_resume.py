"""`check resume` reports an exact resume as exact, and names the field that was lost.

Second truth: faults put into the trainer of the resumed run (faulty.py). The normal suite uses one
rank; the marker `layouts` adds two ranks under NVFP4 with stochastic rounding. Not covered: damaged
checkpoints (tests/faults/test_damage.py, tests/train/checkpoint).
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from nemotron_train.check import ranks as ranks_module
from nemotron_train.check.ranks import Ranks
from nemotron_train.check.resume import STAMP, Field, Resharded, ResumeCheck, check_resume, compare
from nemotron_train.compose.compose import compose_config
from tests import warm_process

FAULTY = str(Path(__file__).with_name("faulty.py"))


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    with warm_process.in_place_of_subprocess(ranks_module):
        yield


def run(folder: Path, *overrides: str, fault: str = "", ranks: int = 1) -> tuple[bool, str]:
    text = io.StringIO()
    console = Console(file=text, width=120)
    ranks_of = Ranks(folder, console)
    if fault:
        ranks_of = Ranks(folder, console, worker=[FAULTY, fault])
    asked = ResumeCheck(folder, max_ranks=ranks, steps=4)
    exact = check_resume(compose_config(overrides), asked, console, ranks_of)
    return exact, text.getvalue()


def differing(text: str) -> list[str]:
    """Names of the table's fields that are not equal in every step."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return [row[0] for row in rows if len(row) == 4 and row[3] != "-"]


def test_a_run_that_resumes_exactly(tmp_path: Path) -> None:
    exact, text = run(tmp_path)
    assert exact and differing(text) == [], text
    stamp = json.loads((tmp_path / "cut" / "checkpoints" / STAMP).read_text())
    assert stamp["exact"] and stamp["resharded"]["same_samples"]
    assert {"losses", "optimizer state", "router biases", "random states"} <= set(stamp["fields"])
    assert all(field["equal"] == field["of"] > 0 for field in stamp["fields"].values())


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("fault", "first"), [("moments_lost", "losses"), ("cursor_lost", "sample ids and tokens")]
)
def test_what_a_resumed_run_lost(tmp_path: Path, fault: str, first: str) -> None:
    exact, text = run(tmp_path, fault=fault)
    assert not exact
    assert first in differing(text) and "weights" in differing(text)
    assert ("sample ids and tokens" in differing(text)) == (fault == "cursor_lost")


@pytest.mark.layouts
@pytest.mark.parametrize("layout", ["parallel.expert=2", "parallel.pipeline=2"])
def test_stochastic_rounding_resumes_exactly(tmp_path: Path, layout: str) -> None:
    exact, text = run(tmp_path, "precision=nvfp4_nemotron3", layout, ranks=2)
    assert exact, text


RECORD = {
    "metrics": [{"step": 1, "loss": 2.5}],
    "batches": [{"samples": {"0": "ab"}}],
    "data cursor": {"samples": 1},
    "schedule": [[0.1, 0.0]],
    "random states": {"torch": "cd"},
    "stochastic rounding": {"step": 1},
    "checkpoint": {"model.x": "1", "model.router.expert_bias": "2", "optimizer.x": "3"},
}
NOTHING = RECORD | {"metrics": [], "batches": []}
FIELDS = {
    "losses": ("metrics", [{"step": 1, "loss": 2.5000000000000004}], "loss of step 1"),
    "sample ids and tokens": ("batches", [{"samples": {"1": "ab"}}], "rank 0, step 1"),
    "data cursor": ("data cursor", {"samples": 2}, "rank 0: samples"),
    "schedule": ("schedule", [[0.2, 0.0]], "rank 0"),
    "random states": ("random states", {"torch": "ce"}, "rank 0: torch"),
    "stochastic rounding": ("stochastic rounding", {"step": 2}, "rank 0: step"),
    "weights": ("checkpoint", RECORD["checkpoint"] | {"model.x": "9"}, "model.x"),
    "router biases": (
        "checkpoint",
        RECORD["checkpoint"] | {"model.router.expert_bias": "9"},
        "model.router.expert_bias",
    ),
    "optimizer state": ("checkpoint", RECORD["checkpoint"] | {"optimizer.x": "9"}, "optimizer.x"),
}


def test_equal_records_are_equal_in_every_field() -> None:
    fields = compare([RECORD], [NOTHING], [RECORD])
    assert {field.name for field in fields} == {*FIELDS, "other metrics"}
    assert all(field.equal for field in fields)


@pytest.mark.parametrize("name", FIELDS)
def test_one_bit_in_one_field_is_named(name: str) -> None:
    key, wrong, first = FIELDS[name]
    fields = compare([RECORD], [NOTHING], [RECORD | {key: wrong}])
    assert [(f.name, f.first) for f in fields if not f.equal] == [(name, first)]


def test_a_missing_step_and_nothing_at_all_differ() -> None:
    fields = compare([RECORD], [NOTHING], [NOTHING])
    assert "losses" in [field.name for field in fields if not field.equal]
    longer = {**RECORD, "metrics": [*RECORD["metrics"], *RECORD["metrics"]]}
    for whole, first in ((longer, RECORD), (RECORD, longer)):
        fields = compare([whole], [first], [NOTHING])
        assert "losses" in [field.name for field in fields if not field.equal]
    assert not Field("losses", 0, 0).equal
    assert not dataclasses.replace(Resharded(1, 0.0, 1e-4, True), same_samples=False).equal
