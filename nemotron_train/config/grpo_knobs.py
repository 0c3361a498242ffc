"""The knobs of the mathematics of GRPO, and their checks. No torch.

Owns: what can be chosen, the defaults, and which choices exclude each other. Does not own: the
formulas (`advantage`, `correction`, `objective`, `curriculum`), batch sizes and steps.

The names of all fields differ, so that a verb may take them side by side.
"""

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from nemotron_train.config.errors import ConfigError


class Baseline(StrEnum):
    """What is subtracted from a reward."""

    group = "group"  # mean of the group
    leave_one_out = "leave_one_out"  # mean of the others in the group


class Deviation(StrEnum):
    """What the difference is divided by."""

    none = "none"  # 1
    group = "group"  # sample standard deviation of the group


class CorrectionRule(StrEnum):
    """The weight of a token, from the ratio of the trainer's to the sampler's probability."""

    none = "none"  # 1
    raw = "raw"  # the ratio
    truncated = "truncated"  # the ratio, clipped to [ratio_low, ratio_high]
    icepop = "icepop"  # the ratio inside [ratio_low, ratio_high], 0 outside


class Objective(StrEnum):
    """What is minimized."""

    grpo = "grpo"  # clipped token ratio, mean over the tokens of the global batch
    dr_grpo = "dr_grpo"  # the same, divided by sequences * constant_length
    gspo = "gspo"  # clipped sequence ratio, mean over sequences
    cispo = "cispo"  # clipped ratio as a constant weight, mean over tokens


class Ratio(StrEnum):
    """The ratio of the policy to the one before the update."""

    forced = "forced"  # 1: one update for each batch of rollouts
    clipped = "clipped"  # computed and clipped: several updates


class CurriculumKind(StrEnum):
    """Which prompts a step draws."""

    gaussian = "gaussian"  # those whose pass rate is near a mean that moves over the run
    uniform = "uniform"  # any


@dataclass
class AdvantageKnobs:
    """How rewards become advantages.

    The two advantages of malformed samples are off: such a sample already gets no reward here, and
    -5 (Nemotron 3 Super) is five times the largest advantage without a deviation. The length reward
    is for rows with `effort: low` alone.
    """

    baseline: Baseline = Baseline.group
    deviation: Deviation = Deviation.none
    advantage_clip: float = 20.0  # largest absolute value
    overlong_filter: bool = True  # cut-off samples are not trained; the baseline counts them
    drop_trivial: bool = False  # groups of equal rewards are not counted in the mean over tokens
    malformed_thinking_advantage: float = 0.0  # of samples with malformed thinking; 0: no change
    malformed_call_advantage: float = 0.0  # of samples with a malformed tool call; 0: no change
    low_effort_weight: float = 0.5  # largest share of its reward that a short right answer gains
    low_effort_tokens: int = 128  # sampled tokens from which on nothing is gained


@dataclass
class CorrectionKnobs:
    """How tokens are weighted on which trainer and sampler disagree."""

    correction: CorrectionRule = CorrectionRule.icepop
    ratio_low: float = 0.5  # of truncated and icepop; truncated with 0 has no lower bound
    ratio_high: float = 5.0  # of truncated and icepop
    sequence_error_bound: float = 2.0  # mean exp|gap| above which a sequence is masked; 0: none


@dataclass
class ObjectiveKnobs:
    """What is minimized. Clips are those of Nemotron 3 and DAPO."""

    objective: Objective = Objective.grpo
    ratio: Ratio = Ratio.forced
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low
    clip_high: float = 0.28  # and at 1 + clip_high
    kl_weight: float = 0.0  # of the KL divergence from the reference policy; 0: none
    constant_length: int = 0  # tokens, of dr_grpo alone


@dataclass
class CurriculumKnobs:
    """Which prompts a step draws. The report of Nemotron 3 Nano gives the rule (a Gaussian over the
    pass rate whose mean falls linearly, solved prompts dropped) and no numbers: these are ours."""

    curriculum: CurriculumKind = CurriculumKind.gaussian
    rate_mean_start: float = 0.8  # preferred pass rate at the first step
    rate_mean_end: float = 0.2  # and at the last
    rate_deviation: float = 0.2
    rate_prior: float = 0.5  # pass rate of a prompt that was not tried yet
    solved_rest_steps: int = 100  # steps without a prompt that was solved each time; 0: not dropped


def _number(knobs: Any, name: str, low: float, high: float, rule: str) -> None:
    """Refuse a field outside [low, high]."""
    value = getattr(knobs, name)
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name}={value}: give {rule}")


def _unused(knobs: Any, names: tuple[str, ...], because: str) -> None:
    """Refuse a field that was changed and that nothing would read."""
    defaults = {field.name: field.default for field in fields(knobs)}
    for name in names:
        if getattr(knobs, name) != defaults[name]:
            raise ConfigError(f"{name}={getattr(knobs, name)} has no effect with {because}")


def check_advantage(knobs: AdvantageKnobs) -> None:
    """Raises ConfigError for a number out of range, or a penalty that the clip would change."""
    _number(knobs, "advantage_clip", 1e-6, 1e6, "a number above 0, such as 20")
    _number(knobs, "low_effort_weight", 0, 1, "0 (no length reward) to 1")
    _number(knobs, "low_effort_tokens", 1, math.inf, "1 or more")
    for name in ("malformed_thinking_advantage", "malformed_call_advantage"):
        _number(knobs, name, -1e6, 0, "0 (no change) or a negative number, such as -5")
        if -getattr(knobs, name) > knobs.advantage_clip:
            raise ConfigError(
                f"{name}={getattr(knobs, name)} is outside of advantage_clip="
                f"{knobs.advantage_clip}, which is applied after it"
            )


def check_correction(knobs: CorrectionKnobs) -> None:
    """Raises ConfigError for bounds that are out of range or that the rule does not use."""
    if knobs.correction in (CorrectionRule.none, CorrectionRule.raw):
        _unused(knobs, ("ratio_low", "ratio_high"), f"correction={knobs.correction}")
    _number(knobs, "ratio_low", 0, 1, "0 to 1: a ratio of 1 is inside")
    _number(knobs, "ratio_high", 1, 1e8, "1 or more: a ratio of 1 is inside")
    if knobs.sequence_error_bound != 0:
        rule = "0 (no mask) or more than 1, which is the error of equal log-probabilities"
        _number(knobs, "sequence_error_bound", math.nextafter(1, 2), 1e8, rule)


def check_objective(knobs: ObjectiveKnobs) -> None:
    """Raises ConfigError for a number out of range, or knobs that exclude each other."""
    if knobs.ratio is Ratio.forced:
        _unused(knobs, ("clip_low", "clip_high"), "ratio=forced: the ratio is 1")
        if knobs.objective is Objective.cispo:
            raise ConfigError(
                "objective=cispo with ratio=forced is objective=grpo: it differs where the ratio "
                "is clipped; give ratio=clipped"
            )
    _number(knobs, "clip_low", 0, 1, "0 to 1")
    _number(knobs, "clip_high", 0, 1e6, "0 or more")
    _number(knobs, "kl_weight", 0, 1e6, "0 (none) or more")
    if knobs.objective is Objective.gspo and knobs.ratio is Ratio.clipped:
        for name in ("clip_low", "clip_high"):
            if getattr(knobs, name) > 0.1:
                raise ConfigError(
                    f"{name}={getattr(knobs, name)} with objective=gspo: its ratio is a mean over "
                    "a sequence; give at most 0.1 (its authors: clip_low=3e-4 clip_high=4e-4)"
                )
    if knobs.objective is Objective.dr_grpo:
        if knobs.constant_length < 1:
            raise ConfigError(
                f"constant_length={knobs.constant_length}: objective=dr_grpo divides by it; give "
                "the most tokens of a response"
            )
    else:
        _unused(knobs, ("constant_length",), f"objective={knobs.objective}")


def check_curriculum(knobs: CurriculumKnobs) -> None:
    """Raises ConfigError for a number out of range, or knobs of a Gaussian without one."""
    gaussian = ("rate_mean_start", "rate_mean_end", "rate_deviation", "rate_prior")
    if knobs.curriculum is CurriculumKind.uniform:
        _unused(knobs, gaussian, "curriculum=uniform")
    for name in ("rate_mean_start", "rate_mean_end", "rate_prior"):
        _number(knobs, name, 0, 1, "a pass rate from 0 to 1")
    _number(knobs, "rate_deviation", 1e-6, 1e6, "a number above 0, such as 0.2")
    _number(knobs, "solved_rest_steps", 0, 1e9, "0 (solved prompts stay) or more")
