"""The guard's decisions on one rank: policies, limits, and the line that reports them.

tests/distributed/test_guard.py covers several ranks, real gradients and the roll-back.
"""

import math
from typing import Any

import pytest

from nemotron_train.config.errors import TrainingFailed
from nemotron_train.config.guard import GuardConfig
from nemotron_train.train.guard.guard import Action, Findings, Guard, describe

NAN = math.nan
NOTHING = Findings(False, False, [], [])


def judge(guard: Guard, values: list[float], norm: float = 1.0) -> list[Action]:
    return [
        guard.judge(step, value, norm, math.isfinite(value), lambda: NOTHING)
        for step, value in enumerate(values, start=1)
    ]


def config(**knobs: Any) -> GuardConfig:
    defaults: dict[str, Any] = {"spike_window": 4, "max_skips": 2, "max_roll_backs": 2}
    return GuardConfig(**(defaults | knobs))


FLAT = [3.0, 3.001, 3.0, 3.001]


def test_stop_is_the_default_and_a_norm_is_enough(groups: object) -> None:
    with pytest.raises(TrainingFailed, match=r"^step 1: loss 3\.0000, gradient norm inf; no"):
        judge(Guard(GuardConfig(), "cpu"), [3.0], norm=math.inf)
    # The main loss is finite, another head's is not.
    with pytest.raises(TrainingFailed):
        Guard(GuardConfig(), "cpu").judge(1, 3.0, 1.0, False, lambda: NOTHING)


def test_skips_in_a_row_are_counted_and_limited(groups: object) -> None:
    guard = Guard(config(non_finite="skip"), "cpu")
    assert judge(guard, [NAN, NAN, 3.0, NAN, NAN, 3.0]) == [
        "skip", "skip", "update", "skip", "skip", "update"
    ]  # fmt: skip
    assert guard.skipped == 4 and [event["step"] for event in guard.events] == [1, 2, 4, 5]
    with pytest.raises(TrainingFailed, match=r"step 3: .*2 updates in a row .*guard\.max_skips"):
        judge(guard, [NAN, NAN, NAN])


def test_a_broken_weight_is_not_skipped_but_rolled_back(groups: object) -> None:
    broken = Findings(True, True, [], ["decoder.layers.2.mixer.in_proj"])
    with pytest.raises(TrainingFailed, match="weights not finite before the step: decoder"):
        Guard(config(non_finite="skip"), "cpu").judge(1, NAN, NAN, False, lambda: broken)
    guard = Guard(config(non_finite="roll_back"), "cpu")
    assert guard.judge(1, NAN, NAN, False, lambda: broken) == Action.roll_back


def test_roll_backs_are_limited(groups: object) -> None:
    guard = Guard(config(non_finite="roll_back"), "cpu")
    assert judge(guard, [NAN, 3.0, NAN]) == ["roll_back", "update", "roll_back"]
    with pytest.raises(TrainingFailed, match=r"guard\.max_roll_backs"):
        judge(guard, [NAN])


@pytest.mark.parametrize(
    ("policy", "action", "events"),
    [
        ("ignore", "update", 0),
        ("report", "update", 1),
        ("skip", "skip", 1),
        ("roll_back", "roll_back", 1),
    ],
)
def test_spikes(groups: object, policy: str, action: str, events: int) -> None:
    guard = Guard(config(spike=policy), "cpu")
    assert judge(guard, [*FLAT, 30.0, 3.0]) == ["update"] * 4 + [action, "update"]
    assert len(guard.events) == events
    for event in guard.events:
        assert event["kind"] == "spike" and event["step"] == 5
        assert event["reason"].startswith("loss 30.0000, ") and "grad_norm" not in event["reason"]


def test_a_spike_of_the_gradient_norm_alone(groups: object) -> None:
    guard = Guard(config(spike="skip"), "cpu")
    judge(guard, FLAT)
    assert judge(guard, [3.0], norm=50.0) == ["skip"]
    assert guard.events[-1]["reason"].startswith("grad_norm 50.0000, ")


def test_a_nan_neither_hides_nor_makes_a_spike(groups: object) -> None:
    guard = Guard(config(non_finite="skip", spike="skip"), "cpu")
    values = [*FLAT, NAN, 3.001, 30.0, 3.0]
    assert judge(guard, values) == ["update"] * 4 + ["skip", "update", "skip", "update"]


def test_the_line_names_ranks_modules_and_weights() -> None:
    """The place in the forward pass decides, not the rank or the name: of layers 9 and 10 the
    backward pass reaches 10 first."""
    ninth, tenth = ((1, 9, 40), "decoder.layers.9.mlp"), ((1, 10, 50), "decoder.layers.10.mlp")
    bad = Findings(False, True, [ninth], [])
    text = describe(3.0, NAN, [NOTHING, bad, Findings(False, True, [ninth, tenth], ["a", "b"])])
    assert text == (
        "gradient not finite on ranks 1, 2 (loss 3.0000); first module in the backward pass: "
        "decoder.layers.10.mlp (2 modules with such gradients); weights not finite before the "
        "step: a and 1 more"
    )
    many = describe(NAN, NAN, [Findings(True, True, [], [])] * 20)
    assert many == "loss not finite on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
