"""`check precision` reads the formats back from the built modules and reports a module that differs
from the plan.

Not covered: Transformer Engine's modules (tests/precision).
"""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemotron_train.check.precision import check_precision, problem_of
from nemotron_train.check.ranks import Ranks
from nemotron_train.compose.compose import compose_config

PLANNED = {"fprop": "nvfp4", "dgrad": "nvfp4", "wgrad": "nvfp4", "hadamard": True}
HELD = {"x.linear": "torch.bfloat16"}


def test_every_phase_of_a_plan_is_carried(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=120)
    config = compose_config(["precision=nvfp4_then_mxfp8"])
    assert check_precision(config, tmp_path, 1, console, Ranks(tmp_path, console)), text.getvalue()
    first, second = text.getvalue().split("from ")[1:3]
    assert "nvfp4/nvfp4/nvfp4" in first and "nvfp4" not in second
    assert "mxfp8/mxfp8/mxfp8" in second


@pytest.mark.parametrize(
    ("weights", "formats", "problem"),
    [
        (HELD, {"x.linear": PLANNED}, ""),
        (HELD, {"x.linear": PLANNED | {"wgrad": "bf16"}}, "carries nvfp4/nvfp4/bf16"),
        (HELD, {"x.linear": PLANNED | {"hadamard": False}}, "carries nvfp4/nvfp4/nvfp4"),
        (HELD, {}, "cannot carry a format"),
        ({}, {}, "in no rank's model"),
    ],
)
def test_what_is_not_as_planned(
    weights: dict[str, str], formats: dict[str, Any], problem: str
) -> None:
    right = (HELD, {"x.linear": PLANNED})
    assert problem_of("x.linear", PLANNED, [(weights, formats)]) == problem
    if problem and weights:  # a problem on one of several ranks is enough
        assert problem_of("x.linear", PLANNED, [right, (weights, formats)]) == problem


def test_a_weight_of_another_dtype() -> None:
    planned: dict[str, Any] = {"fprop": "bf16", "dgrad": "bf16", "wgrad": "bf16"}
    assert problem_of("x.linear", planned, [(HELD, {})]) == ""
    wrong = [({"x.linear": "torch.float32"}, {})]
    assert problem_of("x.linear", planned, wrong) == "its weight is torch.float32"
