"""The knobs: defaults are valid, and each wrong value or combination is refused in one line that
names the knob."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.grpo_knobs import (
    AdvantageKnobs,
    CorrectionKnobs,
    CorrectionRule,
    CurriculumKind,
    CurriculumKnobs,
    Objective,
    ObjectiveKnobs,
    Ratio,
    check_advantage,
    check_correction,
    check_curriculum,
    check_objective,
)

CHECKS: dict[type, Callable[[Any], None]] = {
    AdvantageKnobs: check_advantage,
    CorrectionKnobs: check_correction,
    ObjectiveKnobs: check_objective,
    CurriculumKnobs: check_curriculum,
}


def test_names_differ() -> None:
    """So that a verb may take all of them side by side."""
    names = [field.name for kind in CHECKS for field in fields(kind)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "knobs",
    [
        *(kind() for kind in CHECKS),
        AdvantageKnobs(malformed_call_advantage=-20, low_effort_weight=0),
        CorrectionKnobs(CorrectionRule.truncated, 0.0, 1.0, 1.0001),
        CorrectionKnobs(CorrectionRule.raw, sequence_error_bound=0),
        ObjectiveKnobs(kl_weight=0.01),
        ObjectiveKnobs(ratio=Ratio.clipped, clip_low=0, clip_high=0),
        ObjectiveKnobs(Objective.gspo),
        ObjectiveKnobs(Objective.gspo, Ratio.clipped, 3e-4, 4e-4),
        ObjectiveKnobs(Objective.cispo, Ratio.clipped, 1.0, 4.0),
        ObjectiveKnobs(Objective.dr_grpo, constant_length=1),
        CurriculumKnobs(CurriculumKind.uniform, solved_rest_steps=0),
        CurriculumKnobs(rate_mean_start=0, rate_mean_end=1),
    ],
    ids=repr,
)
def test_good(knobs: Any) -> None:
    CHECKS[type(knobs)](knobs)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (AdvantageKnobs(advantage_clip=0), "advantage_clip=0: give a number above 0"),
        (AdvantageKnobs(advantage_clip=math.nan), "advantage_clip=nan"),
        (AdvantageKnobs(malformed_call_advantage=5), "malformed_call_advantage=5: give 0"),
        (AdvantageKnobs(malformed_thinking_advantage=-math.inf), "thinking_advantage=-inf"),
        (
            AdvantageKnobs(malformed_thinking_advantage=-21),
            "malformed_thinking_advantage=-21 is outside of advantage_clip=20.0",
        ),
        (AdvantageKnobs(low_effort_weight=1.5), "low_effort_weight=1.5"),
        (AdvantageKnobs(low_effort_tokens=0), "low_effort_tokens=0: give 1 or more"),
        (CorrectionKnobs(ratio_low=1.5), "ratio_low=1.5: give 0 to 1"),
        (CorrectionKnobs(ratio_low=-1), "ratio_low=-1"),
        (CorrectionKnobs(ratio_high=0.9), "ratio_high=0.9: give 1 or more"),
        (CorrectionKnobs(ratio_high=math.inf), "ratio_high=inf"),
        (CorrectionKnobs(sequence_error_bound=1.0), "sequence_error_bound=1.0: give 0 .* or more"),
        (CorrectionKnobs(sequence_error_bound=-2), "sequence_error_bound=-2"),
        (CorrectionKnobs(sequence_error_bound=math.nan), "sequence_error_bound=nan"),
        (CorrectionKnobs(CorrectionRule.raw, 0.2), "ratio_low=0.2 has no effect with .*=raw"),
        (CorrectionKnobs(CorrectionRule.none, 0.5, 2.0), "ratio_high=2.0 has no effect with"),
        (ObjectiveKnobs(clip_low=0.1), "clip_low=0.1 has no effect with ratio=forced"),
        (ObjectiveKnobs(clip_high=0.2), "clip_high=0.2 has no effect with ratio=forced"),
        (ObjectiveKnobs(ratio=Ratio.clipped, clip_low=1.1), "clip_low=1.1: give 0 to 1"),
        (ObjectiveKnobs(ratio=Ratio.clipped, clip_high=-0.1), "clip_high=-0.1: give 0 or more"),
        (ObjectiveKnobs(ratio=Ratio.clipped, clip_high=math.inf), "clip_high=inf"),
        (ObjectiveKnobs(kl_weight=-0.1), "kl_weight=-0.1: give 0"),
        (ObjectiveKnobs(kl_weight=math.nan), "kl_weight=nan"),
        (ObjectiveKnobs(Objective.cispo), "cispo with ratio=forced is objective=grpo"),
        (ObjectiveKnobs(Objective.gspo, Ratio.clipped), "clip_low=0.2 with objective=gspo"),
        (ObjectiveKnobs(Objective.gspo, Ratio.clipped, 0.1), "clip_high=0.28 with objective=gspo"),
        (ObjectiveKnobs(Objective.dr_grpo), "constant_length=0: objective=dr_grpo divides by it"),
        (ObjectiveKnobs(constant_length=9), "constant_length=9 has no effect with objective=grpo"),
        (CurriculumKnobs(rate_mean_start=1.1), "rate_mean_start=1.1: give a pass rate"),
        (CurriculumKnobs(rate_mean_end=-0.1), "rate_mean_end=-0.1"),
        (CurriculumKnobs(rate_prior=math.nan), "rate_prior=nan"),
        (CurriculumKnobs(rate_deviation=0), "rate_deviation=0: give a number above 0"),
        (CurriculumKnobs(solved_rest_steps=-1), "solved_rest_steps=-1"),
        (
            CurriculumKnobs(CurriculumKind.uniform, rate_deviation=0.1),
            "rate_deviation=0.1 has no effect with curriculum=uniform",
        ),
    ],
)
def test_wrong(knobs: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        CHECKS[type(knobs)](knobs)
    assert "\n" not in str(refused.value)
