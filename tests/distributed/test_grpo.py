"""Reinforcement learning on two data-parallel ranks gives the rollouts and the update of one.

Second truth: one rank, from the same checkpoint. Not covered: layouts in which a rank has not the
whole model, which are refused.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.posttrain.yes_no import GRPO, YES, make_warm, rollouts

pytestmark = pytest.mark.usefixtures("in_small_run")

Run = Callable[[list[str], Path, int], None]
Metrics = Callable[[Path], list[dict]]


@pytest.fixture(scope="module", autouse=True)
def warm(small_run: tuple[Path, list[str]]) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_run[0])
        yield make_warm(small_run[1], "grpo_ranks")


def test_two_ranks_sample_and_train_as_one(
    warm: str, small_run: tuple[Path, list[str]], run_ranks: Run, metrics: Metrics
) -> None:
    """Five prompts over two ranks. The rollouts are equal token by token; loss, gradient norm and
    all measures are equal up to the order of sums, also in the second step."""
    words = ["-m", "nemotron_train", *GRPO, warm, YES, "prompts=5", "steps=2", "train.threads=1"]
    words += ["train.micro_batch_sequences=2"]
    for ranks in (1, 2):
        run_ranks([*words, f"name=grpo_ranks_{ranks}"], small_run[0], ranks)
    for step in (1, 2):
        one, two = (rollouts(f"grpo_ranks_{ranks}", step) for ranks in (1, 2))
        assert [(r["sequence"], r["ids"]) for r in one] == [(r["sequence"], r["ids"]) for r in two]
        assert [r["advantage"] for r in one] == [r["advantage"] for r in two]
    rows = [
        [row for row in metrics(Path(f"runs/grpo_ranks_{ranks}")) if "reward" in row]
        for ranks in (1, 2)
    ]
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if name in ("max_vio", "zero_weight_gradients") or name.startswith("max_vio/"):
                continue  # padding places are routed too, and the ranks have other padding
            wanted = None if two[name] is None else pytest.approx(two[name], rel=2e-3, abs=1e-5)
            assert one[name] == wanted, name
