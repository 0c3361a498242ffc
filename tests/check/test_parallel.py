"""`check parallel` reports 'equal' for a correct layout and names the module for a faulty one.

Second truth: faults put into a rank's trainer (faulty.py), each in a known module. Layouts: tensor
and expert parallelism on two ranks; under the marker `layouts`, a product of three dimensions,
where the check must find the dimension that causes the fault. Not covered: faults of context
parallelism and of virtual stages.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nemotron_train.check import parallel
from nemotron_train.check import ranks as ranks_module
from nemotron_train.check.compare import Difference, ModuleDifference
from nemotron_train.check.parallel import (
    LIMITS,
    OWN_PRECISION_LIMITS,
    Outcome,
    ParallelCheck,
    Proof,
    check_parallel,
    shrink_for_proof,
)
from nemotron_train.check.ranks import Ranks, RanksFailed
from nemotron_train.compose.compose import compose_config
from tests import warm_process

FAULTY = str(Path(__file__).with_name("faulty.py"))
TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
SILENT = Console(file=io.StringIO())


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    with warm_process.in_place_of_subprocess(ranks_module):
        yield


def ranks(folder: Path, fault: str = "") -> Ranks:
    if fault:
        return Ranks(folder, SILENT, worker=[FAULTY, fault])
    return Ranks(folder, SILENT)


def proof_of(folder: Path, *overrides: str) -> Proof:
    asked = ParallelCheck(folder, max_ranks=2, steps=2)
    return Proof(asked, ranks(folder), shrink_for_proof(compose_config(overrides), asked))


def outcome_of(proof: Proof, fault: str = "") -> Outcome:
    proof.ranks = ranks(proof.options.folder, fault)
    return proof.outcome(fault or "layout", proof.shrunk.config, proof.shrunk.num_ranks)


def wrong_gradients(outcome: Outcome) -> list[str]:
    """Modules whose gradient differs, worst first. A router's bias has no gradient."""
    rows = [row for row in outcome.modules if "gradient" in row.worst]
    return [row.module for row in rows if row.worst["gradient"].relative > 1e-4]


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return proof_of(tmp_path_factory.mktemp("tensor"), *TENSOR)


def test_a_right_layout_is_equal(tensor: Proof) -> None:
    outcome = outcome_of(tensor)
    assert outcome.equal, outcome
    kinds = {kind for row in outcome.modules for kind in row.worst}
    assert kinds == {"initial weight", "gradient", "update"}
    assert max(row.worst["initial weight"].relative for row in outcome.modules) == 0.0
    gradients = [
        row.worst["gradient"].relative for row in outcome.modules if "gradient" in row.worst
    ]
    assert 0.0 < max(gradients) < 5e-5  # the limit is 1e-4; rounding stays below it


@pytest.mark.parametrize(
    "fault",
    ["norm_not_summed", pytest.param("router_not_summed", marks=pytest.mark.layouts)],
)
def test_a_gradient_that_is_not_summed(tensor: Proof, fault: str) -> None:
    module = {
        "norm_not_summed": "decoder.layers.1.pre_mlp_layernorm",
        "router_not_summed": "decoder.layers.1.mlp.router",
    }[fault]
    outcome = outcome_of(tensor, fault)
    assert not outcome.equal and outcome.culprit == module
    assert wrong_gradients(outcome) == [module]


def test_a_wrong_output_is_named_where_it_begins(tensor: Proof) -> None:
    """A wrong output changes every gradient. The forward pass shows where the error begins."""
    outcome = outcome_of(tensor, "shared_expert_added_twice")
    assert not outcome.equal and outcome.culprit == "decoder.layers.1.mlp.shared_experts"


def test_a_factor_before_the_experts_gradients(tmp_path: Path) -> None:
    proof = proof_of(tmp_path, "parallel.expert=2")
    outcome = outcome_of(proof, "experts_gradient_halved")
    assert outcome.culprit == "decoder.layers.1.mlp.experts.linear_fc2"
    assert wrong_gradients(outcome) == [outcome.culprit]
    worst = max(r.worst["gradient"].relative for r in outcome.modules if "gradient" in r.worst)
    assert 0.4 < worst < 0.7  # about half: each rank's experts have halved gradients


@pytest.mark.parametrize(
    ("kind", "relative", "fp32", "own"),
    [
        ("initial weight", 1e-7, False, False),
        ("gradient", 1e-5, True, True),
        ("gradient", 0.25, False, True),
        ("gradient", 0.5, False, False),
        ("update", 1e-3, True, True),
        ("update", 1.0, False, False),
    ],
)
def test_what_counts_as_a_difference(kind: str, relative: float, fp32: bool, own: bool) -> None:
    row = ModuleDifference("layer", {kind: Difference("layer.weight", relative, 0)})
    for limits, equal in ((LIMITS, fp32), (OWN_PRECISION_LIMITS, own)):
        outcome = Outcome([row], {"loss": 1e-6}, "", limits)
        assert outcome.equal == equal
        assert outcome.culprit == ("" if equal else "layer")
        assert not replace(outcome, losses={"loss": 0.1}).equal
        assert not replace(outcome, failed="a rank ended").equal


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_an_output_that_is_no_number_differs(number: float) -> None:
    """A comparison with NaN is false, whichever way it is asked."""
    reference = {"trace": {"embedding": [4.0, 1.0], "decoder.layers.0": [9.0, 2.0]}}
    same = [{"trace": {"embedding": [4.0, 1.0], "decoder.layers.0": [9.0, 2.0]}}]
    assert parallel._first_output(reference, same, 1e-4) == ""
    for place in range(2):
        sums = [9.0, 2.0]
        sums[place] = number
        other = [{"trace": {"embedding": [4.0, 1.0], "decoder.layers.0": sums}}]
        assert parallel._first_output(reference, other, 1e-4) == "decoder.layers.0"


def test_a_rank_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    worker = ["-c", "import os; print('no such luck'); os._exit(int(os.environ['RANK']) * 3)"]
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 ended with 3:.*no such luck"):
        Ranks(tmp_path, SILENT, worker=worker).run("broken", {}, 2)


def test_ranks_that_wait_for_ever_are_ended(tmp_path: Path) -> None:
    worker = ["-c", "import time; time.sleep(60)"]
    with pytest.raises(RanksFailed, match="did not end within 1 s"):
        Ranks(tmp_path, SILENT, limit_seconds=1.0, worker=worker).run("hung", {}, 2)


@pytest.mark.layouts
def test_the_dimension_of_a_product_that_brings_the_fault(tmp_path: Path) -> None:
    config = compose_config([*TENSOR, "parallel.pipeline=2", "parallel.expert=2"])
    text = io.StringIO()
    faulty = Ranks(tmp_path, SILENT, worker=[FAULTY, "norm_not_summed"])
    asked = ParallelCheck(tmp_path, max_ranks=4, steps=1)
    assert not check_parallel(config, asked, Console(file=text, width=120), faulty)
    assert "first in decoder.layers.1.pre_mlp_layernorm" in text.getvalue()
    assert "differs already with tensor alone" in text.getvalue()
    assert "pipeline alone" not in text.getvalue()


@pytest.mark.layouts
@pytest.mark.parametrize("run", ["nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b"])
def test_published_layouts_are_equal(tmp_path: Path, run: str) -> None:
    asked = ParallelCheck(tmp_path, max_ranks=4, steps=2)
    text = io.StringIO()
    console = Console(file=text, width=120)
    assert check_parallel(compose_config([f"run={run}"]), asked, console, ranks(tmp_path)), (
        text.getvalue()
    )
