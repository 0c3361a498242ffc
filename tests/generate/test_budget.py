"""The reasoning budget: the rule itself, and in the engine with drafts and without.

Second truths: a formula over the whole sequence; the run without drafts; drafts that know the text.
Not covered: rollouts (tests/posttrain/test_sampler_budget.py), the command (test_command.py).
"""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.config.budget import NO_LIMIT, BudgetScope, grace_tokens
from nemotron_train.data.chat.render import THINK_END, ChatFormat
from nemotron_train.data.tokenize import load_tokenizer, train_tokenizer
from nemotron_train.generate.budget import ThinkingBudget, line_break_test
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.speculative import Drafted, Drafter

CLOSE, END, BREAK, WORD = 3, 2, 10, 50
KNOBS = DecodingKnobs(max_new_tokens=24, batch=3)
BOUND = 1e-5


def new(budget: int, grace: int, scope: BudgetScope = BudgetScope.turn) -> ThinkingBudget:
    return ThinkingBudget(budget, grace, CLOSE, {END}, lambda token: token == BREAK, scope)


def forced_after(budget: ThinkingBudget, ids: list[int]) -> list[int]:
    """The numbers of drawn tokens after which something was forced."""
    assert budget.begin()
    return [n for n, token in enumerate(ids, 1) if budget.after(token) == [CLOSE]]


@given(
    st.integers(1, 12),
    st.integers(0, 6),
    st.lists(st.sampled_from([BREAK, WORD, WORD, WORD, CLOSE, END]), max_size=24),
)
def test_the_first_line_break_in_the_window_or_its_end(
    budget: int, grace: int, ids: list[int]
) -> None:
    """Tokens are counted from 1. It is forced once, and not where the model closed or ended first,
    be it in the window."""
    own = next((n for n, token in enumerate(ids, 1) if token in (CLOSE, END)), math.inf)
    breaks = [n for n, token in enumerate(ids, 1) if token == BREAK and n >= budget]
    due = min([*breaks, budget + grace])
    expected = [due] if due <= len(ids) and due < own else []
    assert forced_after(new(budget, grace), ids) == expected


@pytest.mark.parametrize(
    ("budget", "grace", "tokens"),
    [(10, -1, 4), (40, -1, 4), (41, -1, 5), (1000, -1, 100), (10, 0, 0), (10, 7, 7)],
)
def test_the_window_is_a_tenth_unless_given(budget: int, grace: int, tokens: int) -> None:
    assert grace_tokens(budget, grace) == tokens
    assert forced_after(new(budget, grace), [WORD] * 2000) == [budget + tokens]


def test_nothing_to_think_with_is_closed_by_the_caller() -> None:
    """With budget 0, before any token; and nothing is forced later."""
    budget = new(0, 5)
    assert not budget.begin()
    assert [budget.after(token) for token in [WORD] * 9] == [[]] * 9


def test_without_a_limit_nothing_is_forced() -> None:
    assert forced_after(new(NO_LIMIT, 0), [WORD, BREAK] * 99) == []


@pytest.mark.parametrize(
    ("scope", "first", "second", "third"),
    [
        (BudgetScope.turn, [WORD] * 3 + [CLOSE], [5], [5]),
        (BudgetScope.episode, [WORD] * 3 + [CLOSE], [2], None),
        (BudgetScope.episode, [WORD] * 6 + [CLOSE], None, None),
    ],
)
def test_phases_have_a_budget_each_or_one_in_all(
    scope: BudgetScope, first: list[int], second: list[int] | None, third: list[int] | None
) -> None:
    """A budget of 5 without a window but for the last case, whose window takes 6 thinking tokens.
    Tokens of an answer count nowhere. None: the phase cannot begin."""
    budget = new(5, 2 if len(first) > 5 else 0, scope)
    assert forced_after(budget, first) == []
    assert [budget.after(token) for token in [WORD] * 50] == [[]] * 50
    for expected in (second, third):
        if expected is None:
            assert not budget.begin()
        else:
            assert forced_after(budget, [WORD] * 9) == expected


def test_a_close_in_letters_is_text_and_a_longer_token_may_break_the_line(tmp_path: Path) -> None:
    """With the ids of a trained tokenizer: `</think>` in a text, and tokens such as `:\\n`."""
    train_tokenizer(["def f(x):\n    return x\n\n\nif x:\n    </think> y:\n" * 9], 320, tmp_path)
    chat = ChatFormat(load_tokenizer(tmp_path))
    tokenizer = chat.tokenizer
    spelled = tokenizer.encode("a </think> b </think>").tolist()
    close = chat.special_ids[THINK_END]
    assert close not in spelled and "</think>" in tokenizer.decode(spelled)
    is_break = line_break_test(tokenizer.decode)
    broken = {token for token in tokenizer.known_ids if is_break(token)}
    pieces = {token: tokenizer.decode([token]) for token in broken}
    assert {"\n"} < set(pieces.values()), pieces
    assert all(re.search("\n", text) for text in pieces.values())
    for token in broken:
        budget = ThinkingBudget(len(spelled), 3, close, (), is_break)
        budget.begin()
        assert [budget.after(token_id) for token_id in spelled] == [[]] * len(spelled)
        assert budget.after(token) == [close]


@pytest.fixture(scope="module")
def model(groups: Any, build: Any) -> Any:
    return build(groups)


def generate(
    model: Any, prompts: Any, sampling: Sampling, knobs: DecodingKnobs, break_each: int = 7
) -> tuple[list[Any], Engine]:
    """Sequences under a budget of 6 with a window of 3, and the engine. Every 7th id breaks a
    line."""
    budgets = [
        ThinkingBudget(6, 3, CLOSE, {END}, lambda token: token % break_each == 0) for _ in prompts
    ]
    for one in budgets:
        one.begin()
    engine = Engine(model, END)

    def on_token(sequence: Any, token: int) -> list[int] | str:
        return budgets[sequence.number].after(token) or ""

    return engine.generate(prompts, sampling, knobs, on_token), engine


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=4, coupled=True)])
def test_drafts_change_nothing(model: Any, prompts: Any, sampling: Sampling, drafts: int) -> None:
    """The same ids, the same of them forced, the same log-probabilities, those after the close
    too."""
    plain, _ = generate(model, prompts, sampling, KNOBS)
    drafting = replace(KNOBS, speculative=True, draft_tokens=drafts)
    found, _ = generate(model, prompts, sampling, drafting)
    assert [s.given for s in found] == [s.given for s in plain]
    places = [[p for p, given in enumerate(s.given) if given] for s in found]
    assert all(len(each) <= 1 for each in places) and sum(map(len, places)) >= 4
    assert {p for each in places for p in each} <= {6, 7, 8, 9}
    for ours, theirs, forced in zip(found, plain, places, strict=True):
        assert ours.new == theirs.new
        assert [ours.new[place] for place in forced] == [CLOSE] * len(forced)
        assert ours.log_probabilities == pytest.approx(
            theirs.log_probabilities, abs=BOUND, nan_ok=True
        )
        assert [p for p, v in enumerate(ours.log_probabilities) if math.isnan(v)] == forced


def test_drafts_beyond_the_budget_are_no_rejections(
    model: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafts are the text without a budget as long as it goes on like that, then the text with
    it. So the model accepts all of them, those beyond the forced close too, which are dropped.
    Those after the length limit are wrong."""
    sampling = Sampling(temperature=0)
    plain, _ = generate(model, prompts, sampling, KNOBS)
    free = Engine(model, END).generate(prompts, sampling, KNOBS)
    texts = [s.tokens for s in (*free, *plain)]
    really = Drafter.draft

    def knowing(self: Drafter, known: Any, draws: Any) -> Drafted:
        really(self, known, draws)
        rows = []
        for tokens in known:
            whole = next(text for text in texts if text[: len(tokens)] == list(tokens))
            rows.append([*whole, 0, 0, 0][len(tokens) : len(tokens) + 3])
        tokens_Bk = torch.tensor(rows)
        return Drafted(tokens_Bk, torch.nn.functional.one_hot(tokens_Bk, 512).double())

    monkeypatch.setattr(Drafter, "draft", knowing)
    drafting = replace(KNOBS, speculative=True, draft_tokens=3)
    found, engine = generate(model, prompts, sampling, drafting)
    assert [s.new for s in found] == [s.new for s in plain]
    account = engine.acceptance
    assert account.rates == [1.0, 1.0, 1.0]
    assert account.reached == account.accepted
    assert all(more >= fewer > 0 for more, fewer in pairwise(account.accepted))
    drawn = sum(not given for s in found for given in s.given)
    assert account.tokens == drawn - len(prompts)  # the first of each is drawn after the prefill


@pytest.mark.parametrize(("length", "num_forced"), [(5, 0), (9, 0), (10, 1), (11, 1)])
def test_the_length_may_end_it_before_the_budget(
    model: Any, prompts: Any, length: int, num_forced: int
) -> None:
    """Without line breaks the close is due after the ninth token. It needs a place itself."""
    knobs = replace(KNOBS, max_new_tokens=length)
    (one,), _ = generate(model, prompts[:1], Sampling(temperature=0), knobs, break_each=512)
    assert len(one.new) == length and one.ended_by == "length"
    assert [place for place, given in enumerate(one.given) if given] == [9] * num_forced
