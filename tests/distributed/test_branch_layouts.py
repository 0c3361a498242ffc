"""A checkpoint continues under another layout: one rank, then two, then one again.

Second truth: the run that stayed on one rank, in FP32. Two ranks are tensor, sequence and expert
parallel at once, so that experts have their own optimizer on two ranks and not on one. Not covered:
pipeline stages, more ranks, BF16.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

TWO = ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"]


@pytest.mark.layouts
def test_one_rank_then_two_then_one(
    small_run: tuple[Path, list[str]], run_ranks: Callable[[list[str], Path, int], None]
) -> None:
    folder, overrides = small_run

    def train(ranks: int, name: str, *words: str) -> list[dict]:
        common = ["-m", "nemotron_train", "pretrain", f"name={name}", "train.threads=1"]
        run_ranks([*common, "train.save_every_steps=2", *words], folder, ranks)
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    short = ["train.total_tokens=1280", "optim.decay_tokens=512", "train.keep_checkpoints=9"]
    whole = train(1, "stayed", *overrides, *short)
    there = train(2, "there", "branch=runs/stayed@2", "train.micro_batch_sequences=2", *TWO)
    back = ["parallel.tensor=1", "parallel.sequence=false", "parallel.expert=1"]
    again = train(1, "again", "branch=runs/there@4", *back)
    assert [row["step"] for row in there] == [3, 4, 5] and [row["step"] for row in again] == [5]
    for row in [*there, *again]:
        reference = whole[row["step"] - 1]
        for name in ("loss", "mtp_loss_2", "load_balance_loss"):
            assert row[name] == pytest.approx(reference[name], rel=1e-5), (name, row["step"])
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
