"""Rollouts on two ranks that share the model: those of one rank, with one rank that asks.

Second truth: one rank, on the same checkpoint. The environment writes down every call. Not covered:
data-parallel ranks, which share no model (policy_supply's tests).
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_train.posttrain.rollout import Rollout, read_rollouts
from tests.conftest import SMALL_RUN

Run = Callable[[list[str], Path, int], None]
PLUG_IN = Path(__file__).parents[1] / "posttrain" / "asks_twice.py"
LAYOUTS = {"tensor": ["tensor=2"], "expert": ["expert=2"], "both": ["tensor=2", "expert=2"]}


@pytest.fixture(scope="module")
def folder(small_run: tuple[Path, list[str]], run_ranks: Run) -> Path:
    words = ["name=rollouts", "precision=fp32", "train.stop_after_steps=0", "train.threads=1"]
    run_ranks(["-m", "nemotron_train", "pretrain", *SMALL_RUN, *words], small_run[0], 1)
    return small_run[0]


def evaluated(
    folder: Path, run_ranks: Run, where: str, words: list[str], ranks: int, random: bool = False
) -> tuple[list[Rollout], Counter[str]]:
    """The rollouts, and how often the environment was called for what."""
    (folder / where).mkdir()
    shutil.copy(PLUG_IN, folder / where)
    row = {"environment": f"{where}/asks_twice.py:AsksTwice", "prompt": "say", "answer": "x"}
    row |= {"thinking": False, "metadata": {"random": random}}
    lines = [json.dumps({**row, "id": f"r{number}"}) + "\n" for number in range(3)]
    (folder / where / "rows.jsonl").write_text("".join(lines))
    command = ["-m", "nemotron_train", "evaluate", "environments", "runs/rollouts", *words]
    command += [f"rows={where}/rows.jsonl", f"output={where}/out", "samples=6", "threads=1"]
    command += ["max_new_tokens=120", "scoring_workers=2", "coupled=true", "temperature=2"]
    run_ranks(command, folder, ranks)
    calls = Counter((folder / where / "calls").read_text().split())
    return list(read_rollouts(folder / where / "out.0.jsonl.gz")), calls


@pytest.mark.parametrize(
    "layout, drafts",
    [
        ("tensor", "true"),
        pytest.param("expert", "false", marks=pytest.mark.layouts),
        pytest.param("both", "true", marks=pytest.mark.layouts),
    ],
)
def test_two_ranks_sample_what_one_does(
    layout: str, drafts: str, folder: Path, run_ranks: Run
) -> None:
    words = [f"speculative={drafts}"]
    one, asked_by_one = evaluated(folder, run_ranks, f"one_{layout}", words, 1)
    words += LAYOUTS[layout]
    two, asked_by_two = evaluated(folder, run_ranks, f"two_{layout}", words, 2)
    assert asked_by_two == asked_by_one and asked_by_one["start"] == 3
    assert any("e" in rollout.kinds for rollout in one)
    for ours, theirs in zip(two, one, strict=True):
        assert (ours.ids, ours.kinds, ours.score) == (theirs.ids, theirs.kinds, theirs.score)
        assert ours.episode.turns == theirs.episode.turns
        for kind, a, b in zip(
            ours.kinds, ours.log_probabilities, theirs.log_probabilities, strict=True
        ):
            assert kind == "e" or a == pytest.approx(b, abs=1e-5)


@pytest.mark.layouts
def test_an_environment_that_draws_at_random_does_not_part_the_ranks(
    folder: Path, run_ranks: Run
) -> None:
    """Asked on both ranks, its replies would differ, and the ranks would wait for each other."""
    found, calls = evaluated(folder, run_ranks, "random", ["expert=2"], 2, random=True)
    assert len(found) == 18 and calls["step"] == sum("e" in r.kinds for r in found)


@pytest.mark.layouts
def test_a_refusal_ends_both_ranks(folder: Path, run_ranks: Run) -> None:
    """A row without an answer: the first rank finds it, both end with one line."""
    (folder / "refused.jsonl").write_text(
        json.dumps({"environment": "strings", "prompt": "reverse cat", "id": "r"}) + "\n"
    )
    command = ["-m", "nemotron_train", "evaluate", "environments", "runs/rollouts", "tensor=2"]
    with pytest.raises(AssertionError) as raised:
        run_ranks([*command, "rows=refused.jsonl", "threads=1"], folder, 2)
    assert "[2, 2]" in str(raised.value) and "Traceback" not in str(raised.value)
    assert "environment strings: row r: answer" in str(raised.value)
