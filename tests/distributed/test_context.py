"""Context parallelism: one sequence over several gloo ranks gives the losses of one rank.

Second truth: the run on one rank, in FP32, with every ingredient (Mamba-2, LatentMoE, attention,
two MTP depths whose targets lie across the cut, documents packed across it); for a resumed run the
uninterrupted one; for the exchange whole tensors. Tests on four ranks, which share Mamba-2's
groups, are marked `layouts`. Not covered: BF16 losses, GPUs and their kernels.
"""

import json
from collections.abc import Callable
from itertools import filterfalse
from pathlib import Path

import pytest

from nemotron_train.run_folder.metric_groups import is_timing

RunRanks = Callable[[list[str], Path, int], None]
Train = Callable[..., list[dict]]

HERE = Path(__file__).parent
TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
# Layouts that split groups. test_layout_products.py covers the other products.
PRODUCTS = {
    "tensor": ["parallel.context=2", *TENSOR],
    "tensor_expert": ["parallel.context=2", *TENSOR, "parallel.expert=4"],
    "four": ["parallel.context=4"],
}


@pytest.fixture(scope="module")
def train(small_run: tuple[Path, list[str]], run_ranks: RunRanks) -> Train:
    """Trains `name` on `ranks` ranks. Returns the lines of its logged steps."""
    folder, overrides = small_run

    def run(name: str, ranks: int, *words: str) -> list[dict]:
        common = ["-m", "nemotron_train", "pretrain", f"name={name}", "train.threads=1"]
        if not any(word.startswith("branch=") for word in words):
            common += [*overrides, "model.pattern=MEM*EME", "train.micro_batch_sequences=2"]
        run_ranks([*common, *words], folder, ranks)
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    return run


@pytest.fixture(scope="module")
def one_rank(train: Train) -> list[dict]:
    return train("context_one", 1)


@pytest.fixture(scope="module")
def two_ranks(train: Train) -> list[dict]:
    kept = ["train.save_every_steps=5", "train.keep_checkpoints=9"]
    return train("context_two", 2, "parallel.context=2", *kept)


def assert_equal(rows: list[dict], reference: list[dict]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in reference]
    for ours, theirs in zip(rows, reference, strict=True):
        for name in ("loss", "mtp_loss_1", "mtp_loss_2", "load_balance_loss", "max_vio"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (name, ours["step"])
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert rows[-1]["validation_loss"] == pytest.approx(reference[-1]["validation_loss"], rel=1e-5)


def test_two_ranks_equal_one(one_rank: list[dict], two_ranks: list[dict]) -> None:
    assert len(one_rank) == 10
    assert_equal(two_ranks, one_rank)


def test_two_ranks_go_on_exactly(two_ranks: list[dict], train: Train) -> None:
    """A resume from a checkpoint changes no number, bit for bit."""
    again = train("context_again", 2, "branch=runs/context_two@5")
    for ours, theirs in zip(again, two_ranks[5:], strict=True):
        for name in filterfalse(is_timing, theirs):
            assert ours[name] == theirs[name], (name, ours["step"])


def test_one_rank_goes_on_from_two(one_rank: list[dict], two_ranks: list[dict], train: Train):
    """Checkpoints of context ranks load where sequences are whole."""
    assert len(two_ranks) == 10
    there = train("context_then_one", 1, "branch=runs/context_two@5", "parallel.context=1")
    assert_equal(there, one_rank[5:])


@pytest.mark.parametrize("heads_a_group", [2, 8])
def test_exchange(heads_a_group: int, run_ranks: RunRanks, tmp_path: Path) -> None:
    """Two groups per rank, and one group that the heads of both ranks read."""
    run_ranks([str(HERE / "context_exchange.py"), str(heads_a_group)], tmp_path, 2)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", PRODUCTS)
def test_products_equal_one_rank(layout: str, one_rank: list[dict], train: Train) -> None:
    """On four ranks. Four context-parallel ranks share Mamba-2's two groups in pairs."""
    assert_equal(train(f"context_{layout}", 4, *PRODUCTS[layout]), one_rank)


@pytest.mark.layouts
def test_recomputation_repeats_the_exchange(two_ranks: list[dict], train: Train) -> None:
    """Every number is bit-identical, as on one rank."""
    again = [f"train.recompute.{kind}=selective" for kind in ("mamba", "attention", "moe")]
    rows = train("context_recomputed", 2, "parallel.context=2", *again)
    for ours, theirs in zip(rows, two_ranks, strict=True):
        for name in filterfalse(is_timing, theirs):
            assert ours[name] == theirs[name], (name, ours["step"])


@pytest.mark.layouts
@pytest.mark.parametrize("heads_a_group", [2, 4])
def test_exchange_of_four(heads_a_group: int, run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks([str(HERE / "context_exchange.py"), str(heads_a_group)], tmp_path, 4)
