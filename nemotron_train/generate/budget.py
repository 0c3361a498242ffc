"""A reasoning budget: when the reasoning of one sequence is closed for the model. No torch.

After `budget` thinking tokens `</think>` is forced: soft after the next token with a line break,
if one comes within the grace window, and hard at the window's end. A model that closes its
reasoning itself is left alone, also in the window. Thinking tokens are those after `<think>`;
`</think>` is none.

Everything is decided from the ids that were drawn. A `</think>` that is spelled in letters is text
and closes nothing. Drafted tokens beyond the forced one have not been drawn yet, so drafts do not
change what is forced.

Owns: the count of one sequence. Does not own: how ids get on a sequence (`batch`), the room left
there, turns (`posttrain.sampler`).
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache

from nemotron_train.config.budget import NO_LIMIT, BudgetScope, grace_tokens


class ThinkingBudget:
    """The thinking of one sequence, phase by phase. Call `begin` after each `<think>`, and `after`
    with each token that is drawn, whether it is thinking or not.

    budget, grace: the knobs `budget` and `budget_grace`. close: the id of `</think>`. ends: ids
    that end a turn. is_break: whether a token holds a line break. scope: whether each phase has its
    own budget and window, or all share one.
    """

    def __init__(
        self,
        budget: int,
        grace: int,
        close: int,
        ends: Collection[int],
        is_break: Callable[[int], bool],
        scope: BudgetScope = BudgetScope.turn,
    ) -> None:
        self._budget = budget
        self._grace = grace_tokens(budget, grace)
        self._close = close
        self._ends = ends
        self._is_break = is_break
        self._scope = scope
        self._used = 0
        self._is_thinking = False

    def begin(self) -> bool:
        """Begin a phase. Returns whether there is anything to think with; if not, the phase is over
        and its `</think>` is for the caller to give."""
        if self._scope == BudgetScope.turn:
            self._used = 0
        self._is_thinking = self._budget == NO_LIMIT or self._used < self._budget
        return self._is_thinking

    def after(self, token: int) -> list[int]:
        """What is forced after this token: [] or the id of `</think>`, which ends the phase."""
        if not self._is_thinking:
            return []
        if token == self._close or token in self._ends:
            self._is_thinking = False
            return []
        self._used += 1
        over = self._used - self._budget
        if self._budget == NO_LIMIT or over < 0:
            return []
        if over < self._grace and not self._is_break(token):
            return []
        self._is_thinking = False
        return [self._close]


def line_break_test(decode: Callable[[Sequence[int]], str]) -> Callable[[int], bool]:
    """A function that tells whether a token's text holds a line break. A token of several
    characters, such as `:\\n` or `\\n\\n`, counts. decode: from ids to text."""
    return cache(lambda token: "\n" in decode([token]))
