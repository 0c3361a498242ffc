"""The knobs of environments and of their scoring, and their checks. No torch."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from nemotron_train.config.budget import NO_LIMIT, TurnBudgetKnobs
from nemotron_train.config.environments import EnvironmentConfig, ScoringConfig
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.typed_values import whole_number
from nemotron_train.generate.knobs import DecodingKnobs, ModelKnobs, Sampling
from nemotron_train.posttrain.environments.families import FAMILY_NAMES, check_name
from nemotron_train.posttrain.environments.family import HELD_OUT_LEVEL, LEVELS
from nemotron_train.posttrain.environments.scoring import ScoringLimits
from nemotron_train.posttrain.ratios import check_ratios

INFINITE = "inf"  # among `budgets`: no limit


@dataclass
class EvaluateEnvironmentsConfig(
    Sampling, ModelKnobs, DecodingKnobs, TurnBudgetKnobs, ScoringConfig
):
    """Knobs of `evaluate environments`."""

    environment: str = "all"  # a name, several with commas, or all families
    rows: str = ""  # JSONL file of tasks, in place of generated ones
    split: str = "evaluation"  # of generated tasks: warm_start, train, evaluation or harder
    level: int = 0  # of generated tasks: 1, 2, 3; 0: the three in turn
    prompts: int = 32  # tasks of each environment
    samples: int = 8  # rollouts of each task
    max_new_tokens: int = 192  # of a rollout, with what the environment says
    batch: int = 32
    output: str = "environments"  # OUTPUT.json, OUTPUT.png, OUTPUT.0.jsonl.gz; empty: none


@dataclass
class EvaluateBudgetConfig(EvaluateEnvironmentsConfig):
    """Knobs of `evaluate budget`. B is `budget`; -1: the smallest one that 95 % of the reasoning of
    the model without a limit stays below, where it was closed."""

    # Budgets to compare, inf for no limit; empty: 0, B/8, B/4, B/2, B and inf.
    budgets: list[str] = field(default_factory=list)
    output: str = "budget"  # OUTPUT.json, OUTPUT.png, OUTPUT.BUDGET.jsonl.gz; empty: none


@dataclass
class CheckEnvironmentConfig(ScoringConfig):
    """Knobs of `check environment`."""

    rows: str = ""  # JSONL file; empty: generated (for your own environment: sums)
    samples: int = 8  # rows
    level: int = 1
    most_reward: float = 0.0  # that a canary may get


def given_budgets(knobs: EvaluateBudgetConfig) -> list[int]:
    """The budgets of the knob `budgets` in order, `NO_LIMIT` last; none if it is empty. Raises
    ConfigError for one that is no number of tokens, and for one alone."""
    found: set[int] = set()
    for text in knobs.budgets:
        number = NO_LIMIT if text == INFINITE else whole_number(text)
        if number is None or (number < 0 and text != INFINITE):
            raise ConfigError(
                f"budgets={text}: give numbers of thinking tokens and {INFINITE} for no limit, "
                f"such as budgets=[0,16,{INFINITE}]"
            )
        found.add(number)
    if len(found) == 1:
        raise ConfigError(f"budgets=[{knobs.budgets[0]}]: give two or more, which are compared")
    return in_order(found)


def in_order(budgets: Collection[int]) -> list[int]:
    """Budgets from the smallest to no limit."""
    return sorted(set(budgets), key=lambda budget: (budget == NO_LIMIT, budget))


def budget_label(budget: int) -> str:
    """A budget as the knob `budgets` writes it."""
    return INFINITE if budget == NO_LIMIT else str(budget)


def scoring_limits(knobs: ScoringConfig) -> ScoringLimits:
    """The limits that the knobs set. Raises ConfigError for a knob outside its range."""
    if knobs.scoring_workers < 1:
        raise ConfigError(f"scoring_workers={knobs.scoring_workers}: give 1 or more")
    for name in ("scoring_seconds", "scoring_load_seconds", "scoring_memory_gib"):
        value = getattr(knobs, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value}: give a number above 0")
    return ScoringLimits(
        knobs.scoring_workers,
        knobs.scoring_seconds,
        knobs.scoring_load_seconds,
        int(knobs.scoring_memory_gib * 2**30),
        knobs.sandbox,
    )


def check_environments(environments: Mapping[str, EnvironmentConfig]) -> dict[str, float]:
    """The ratio of each environment, by the name that scoring knows.

    Raises ConfigError for an unknown environment or one that is there twice, a level or ratio
    outside its range, no ratio above 0, or an environment without rows.
    """
    for name, knobs in environments.items():
        check_name(knobs.use or name)
        if (knobs.use or name) not in FAMILY_NAMES and not knobs.rows:
            raise ConfigError(f"environments.{name}.rows is empty: it makes no rows of its own")
        if knobs.level not in (0, *LEVELS):
            raise ConfigError(
                f"environments.{name}.level={knobs.level}: there are 1, 2, 3, and 0 for all of them"
            )
    names = [knobs.use or name for name, knobs in environments.items()]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"environments: {name} is there twice")
    ratios = {knobs.use or name: knobs.ratio for name, knobs in environments.items()}
    check_ratios(ratios)
    return ratios


def check_check(name: str, knobs: CheckEnvironmentConfig) -> None:
    """Raises ConfigError for a knob of `check environment` outside its range."""
    check_name(name)
    if not 1 <= knobs.samples <= 1000:
        raise ConfigError(f"samples={knobs.samples}: give 1 to 1000")
    if knobs.level not in (*LEVELS, HELD_OUT_LEVEL):
        raise ConfigError(f"level={knobs.level}: there are 1, 2, 3 and {HELD_OUT_LEVEL}")
    if not math.isfinite(knobs.most_reward):
        raise ConfigError(f"most_reward={knobs.most_reward}: give a number")
