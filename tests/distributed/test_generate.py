"""`generate` on two ranks that share the model gives the tokens of one rank.

Second truth: one rank, on the same checkpoint. Greedy and sampled, plain and speculative, under
FP32, where only the order of sums differs, and under NVFP4, whose scale of a token is the largest
magnitude over the ranks that share its features.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_RUN

Run = Callable[[list[str], Path, int], None]
LAYOUTS = {"tensor": ["tensor=2"], "expert": ["expert=2"]}
LAYOUTS["both"] = ["tensor=2", "expert=2"]
WAYS = {"greedy": ["temperature=0"], "sampled": ["seed=7"]}
WAYS["speculative"] = ["seed=7", "speculative=true"]


@pytest.fixture(scope="module")
def folder(small_run: tuple[Path, list[str]], run_ranks: Run) -> Path:
    folder = small_run[0]
    for plan in ("fp32", "nvfp4_nemotron3"):
        words = [f"name=shared_{plan}", f"precision={plan}", "train.stop_after_steps=0"]
        # Widths that two tensor-parallel ranks shard into whole blocks of four-bit numbers.
        words += ["model.mamba.heads=32", "model.mamba.head_dim=4"]
        run_ranks(["-m", "nemotron_train", "pretrain", *SMALL_RUN, *words], folder, 1)
    return folder


def generated(folder: Path, run_ranks: Run, plan: str, words: list[str], ranks: int) -> Any:
    prompts = ["prompt=import json", "prompt=def f(", "max_new_tokens=8"]
    arguments = ["-m", "nemotron_train", "generate", f"runs/shared_{plan}", *prompts, *words]
    run_ranks([*arguments, "output=out.jsonl", "threads=1"], folder, ranks)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "layout, plan, way",
    [
        ("tensor", "fp32", "greedy"),
        ("expert", "fp32", "speculative"),
        pytest.param("tensor", "fp32", "speculative", marks=pytest.mark.layouts),
        pytest.param("both", "fp32", "sampled", marks=pytest.mark.layouts),
        pytest.param("expert", "fp32", "sampled", marks=pytest.mark.layouts),
        pytest.param("tensor", "nvfp4_nemotron3", "speculative", marks=pytest.mark.layouts),
        pytest.param("expert", "nvfp4_nemotron3", "sampled", marks=pytest.mark.layouts),
    ],
)
def test_two_ranks_generate_as_one(
    layout: str, plan: str, way: str, folder: Path, run_ranks: Run
) -> None:
    one = generated(folder, run_ranks, plan, WAYS[way], 1)
    two = generated(folder, run_ranks, plan, [*WAYS[way], *LAYOUTS[layout]], 2)
    assert [record["tokens"] for record in two] == [record["tokens"] for record in one]
    bound = 1e-5 if plan == "fp32" else 0.1
    for ours, theirs in zip(two, one, strict=True):
        assert ours["log_probabilities"] == pytest.approx(theirs["log_probabilities"], abs=bound)
