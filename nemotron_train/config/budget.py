"""The knobs of the reasoning budget. No torch.

A budget closes the reasoning of a model that has not closed it itself (`generate.budget`).
"""

from dataclasses import dataclass
from enum import StrEnum

from nemotron_train.config.errors import ConfigError

NO_LIMIT = -1
_GRACE_SHARE, _LEAST_GRACE = 10, 4  # a tenth of the budget, and at least so many tokens


class BudgetScope(StrEnum):
    """What a budget is for, where an episode has several turns."""

    turn = "turn"  # each turn has the whole budget
    episode = "episode"  # all turns share it


@dataclass
class BudgetKnobs:
    """The knobs of a budget for one answer."""

    budget: int = NO_LIMIT  # most thinking tokens; 0: no reasoning; -1: no limit
    # Tokens after the budget in which a line break is waited for; -1: a tenth of it, 4 at least.
    budget_grace: int = -1


@dataclass
class TurnBudgetKnobs(BudgetKnobs):
    """The knobs of a budget for episodes."""

    budget_scope: BudgetScope = BudgetScope.turn


def grace_tokens(budget: int, grace: int) -> int:
    """The tokens of the grace window of this budget under the knob `budget_grace`."""
    return max(_LEAST_GRACE, -(-budget // _GRACE_SHARE)) if grace < 0 else grace


def check_budget(knobs: BudgetKnobs) -> None:
    """Raises ConfigError for a knob outside its range."""
    if knobs.budget < NO_LIMIT:
        raise ConfigError(
            f"budget={knobs.budget}: give a number of thinking tokens, 0 (no reasoning) or "
            f"{NO_LIMIT} (no limit)"
        )
    if knobs.budget_grace < -1:
        raise ConfigError(
            f"budget_grace={knobs.budget_grace}: give a number of tokens, 0 (close at the budget) "
            "or -1 (a tenth of the budget, 4 at least)"
        )
