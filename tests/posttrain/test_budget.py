"""Rollouts under a reasoning budget: what is forced, how it is recorded, that it is not trained.

The policy says what a script tells it: the tokens that the engine would draw are replaced, and all
else is the engine's. Second truth of drafts: the same rollouts without. Not covered: the budget's
own rule (tests/generate/test_budget.py), a step of training (test_grpo.py).
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.config.budget import BudgetScope, TurnBudgetKnobs
from nemotron_train.data.chat.render import END, THINK, THINK_END, ChatFormat
from nemotron_train.data.tokenize import load_tokenizer, train_tokenizer
from nemotron_train.generate import batch
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.posttrain.environments.protocol import Message, Row
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.policy_rows import pack_rollouts
from nemotron_train.posttrain.rollout import Rollout, from_json, to_json
from nemotron_train.posttrain.rollout_metrics import rollout_metrics
from nemotron_train.posttrain.sampler import Sampler
from tests.generate.conftest import _build

ENVIRONMENT = """
class Turns:
    max_turns = 5

    def step(self, episode):
        said = sum(message.role == "assistant" for message in episode.turns)
        return "more" if said < episode.row.metadata["turns"] else None

    def score(self, episode):
        return float(episode.last.content == episode.row.answer)
"""
TEXT = "abcdefghijklmnopqrstuvwxyz yes no more\n"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT * 9], 300, folder)
    return ChatFormat(load_tokenizer(folder))


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("environment") / "turns.py"
    path.write_text(ENVIRONMENT)
    return f"{path}:Turns"


@pytest.fixture(scope="module")
def scoring() -> Iterator[Scoring]:
    with Scoring() as opened:
        yield opened


class Play:
    """Makes rollouts. A script is text in which `|` stands for `</think>` and `$` for the end."""

    def __init__(self, model: Any, chat: ChatFormat, scoring: Scoring, name: str) -> None:
        self.model, self.chat, self.scoring, self.name = model, chat, scoring, name

    def ids(self, script: str) -> list[int]:
        special = {"|": self.chat.special_ids[THINK_END], "$": self.chat.special_ids[END]}
        found: list[int] = []
        for letter in script:
            is_special = letter in special
            found += (
                [special[letter]] if is_special else self.chat.tokenizer.encode(letter).tolist()
            )
        return found

    def row(self, turns: int = 1, **fields: Any) -> Row:
        messages = (Message("user", "a"),)
        return Row("row", self.name, messages, "yes", {"turns": turns}, **fields)

    def sampler(self, budget: TurnBudgetKnobs | None = None, **knobs: Any) -> Sampler:
        engine = Engine(self.model, 0, known_ids=self.chat.tokenizer.known_ids)
        decoding = DecodingKnobs(**{"max_new_tokens": 90, **knobs})
        return Sampler(engine, self.chat, self.scoring, decoding, 120, budget)

    def __call__(
        self, script: str, row: Row, budget: TurnBudgetKnobs | None = None, **knobs: Any
    ) -> Rollout:
        """The rollout of a row whose sampled tokens are the script's."""
        drawn = iter(self.ids(script))

        def choose(logits_BV: Any, sampling: Any, draws: Any) -> Any:
            return torch.tensor([next(drawn)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch, "choose", choose)
            (rollout,) = self.sampler(budget, **knobs).rollouts([row], 1, Sampling())
        assert rollout.log_probabilities == pytest.approx(
            [value if kind == "s" else math.nan for value, kind in self._finite(rollout)],
            nan_ok=True,
        )
        return rollout

    def _finite(self, rollout: Rollout) -> list[tuple[float, str]]:
        pairs = list(zip(rollout.log_probabilities, rollout.kinds, strict=True))
        assert all(math.isfinite(value) for value, kind in pairs if kind == "s")
        return pairs


@pytest.fixture(scope="module")
def play(groups: Any, chat: ChatFormat, scoring: Scoring, name: str) -> Play:
    return Play(_build(groups), chat, scoring, name)


def limit(budget: int, grace: int = 0, scope: BudgetScope = BudgetScope.turn) -> TurnBudgetKnobs:
    return TurnBudgetKnobs(budget, grace, scope)


def test_the_close_is_forced_and_recorded(play: Play) -> None:
    """The judge sees the answer after it, as if the model had closed."""
    one = play("abcdyes$", play.row(), limit(4))
    assert one.kinds == "ssssfssss"
    assert one.ids[4] == play.chat.special_ids[THINK_END]
    assert one.prompt_ids[-1] == play.chat.special_ids[THINK]
    assert one.passed and not one.malformed_thinking and not one.cut
    assert (one.thinking_tokens, one.answer_tokens, one.forced_closes) == (4, 4, 1)
    assert one.episode.last.thinking == "abcd" and one.row.budget == 4
    assert rollout_metrics([one, one])["forced_closes"] == 1
    copy = from_json(json.loads(json.dumps(to_json(one))))
    assert copy.kinds == one.kinds and copy.row == one.row and copy.forced_closes == 1
    assert math.isnan(copy.log_probabilities[4])


@pytest.mark.parametrize(
    ("script", "kinds", "passed"),
    [
        ("abcd|yes$", "sssss" + "ssss", True),  # closed by the model, in the window
        ("abcde\\nyes$", "ssssss" + "f" + "ssss", True),  # at the line break in it
        ("abcdefyes$", "ssssss" + "f" + "ssss", True),  # at its end
        ("abcdef|yes$", "ssssss" + "f" + "sssss", False),  # the model closes once more
        ("ab|yes$", "sssssss", True),  # before the budget
        ("abcd$", "sssss", False),  # the turn ends without a close
    ],
)
def test_one_close_and_where(play: Play, script: str, kinds: str, passed: bool) -> None:
    one = play(script.replace("\\n", "\n"), play.row(), limit(4, grace=2))
    assert (one.kinds, one.passed) == (kinds, passed)
    assert one.forced_closes == kinds.count("f")
    assert one.ids.count(play.chat.special_ids[THINK_END]) == kinds.count("f") + script.count("|")


def test_a_close_in_letters_is_thinking(play: Play) -> None:
    spelled = "</think>yes"
    one = play(f"{spelled}yes$", play.row(), limit(len(spelled)))
    assert one.episode.last.thinking == spelled
    assert one.passed and one.kinds == "s" * 11 + "f" + "s" * 4


def test_budget_0_is_an_answer_without_reasoning(play: Play) -> None:
    """In the first turn the close is in the prompt, in the next among the ids."""
    one = play("no$yes$", play.row(turns=2), limit(0))
    assert one.prompt_ids == play.chat.prompt(one.episode.prompt, thinking=False)
    following = play.chat.following([Message("user", "more")], thinking=False)
    assert one.kinds == "sss" + "e" * (len(following) - 1) + "f" + "ssss"
    assert one.ids[3 : 3 + len(following)] == following
    assert (one.forced_closes, one.thinking_tokens, one.answer_tokens) == (2, 0, 7)
    assert one.passed and not one.malformed_thinking
    stray = play("no|$", play.row(), limit(0))
    assert stray.episode.last.fault == "</think> in the answer"


@pytest.mark.parametrize(
    ("scope", "kinds"),
    [
        (BudgetScope.turn, ["sss" + "sss", "ssssf" + "sss", "sss" + "ssss"]),
        (BudgetScope.episode, ["sss" + "sss", "ssf" + "sssss", "f" + "sssssss"]),
    ],
)
def test_turns_have_a_budget_each_or_one_in_all(
    play: Play, scope: BudgetScope, kinds: list[str]
) -> None:
    """A budget of 4; the model closes after 2, not at all, and after 2."""
    one = play("ab|no$cdefno$gh|yes$", play.row(turns=3), limit(4, scope=scope))
    said = len(play.chat.following([Message("user", "more")]))
    assert one.kinds == ("e" * said).join(kinds)
    assert one.forced_closes == one.kinds.count("f")


def test_a_row_has_its_own_budget(play: Play) -> None:
    """Before that of the knobs; and one without reasoning has none."""
    assert play("abyes$", play.row(budget=2), limit(9)).kinds == "ssfssss"
    assert play("abyes$", play.row(budget=2), limit(-1)).kinds == "ssfssss"
    assert play("abcd|yes$", play.row(budget=99), limit(2)).kinds == "s" * 9
    off = play("abyes$", play.row(thinking=False), limit(2))
    assert off.kinds == "s" * 6 and off.forced_closes == 0


def test_low_effort_is_said_in_the_prompt(play: Play) -> None:
    """As fine-tuning shows it. The environment sees the task as it was written."""
    one = play("a|yes$", play.row(effort="low"))
    asked = Message("user", "a\n\n{reasoning effort: low}")
    assert one.prompt_ids == play.chat.prompt([asked])
    assert one.episode.prompt == (Message("user", "a"),)


@pytest.mark.parametrize(("room", "kinds"), [(3, "sss"), (4, "ssss"), (5, "ssss"), (6, "ssssfs")])
def test_a_close_without_room_for_an_answer_is_not_forced(
    play: Play, room: int, kinds: str
) -> None:
    one = play("abcdyes$", play.row(), limit(4), max_new_tokens=room)
    assert one.kinds == kinds and one.cut and one.forced_closes == kinds.count("f")


def test_only_what_was_sampled_is_trained(play: Play) -> None:
    """In the packed rows: no mask, no log-probability and no share of the count for the forced
    close and the environment; what is sampled after it counts."""
    both = [play("abcdno$abcdyes$", play.row(turns=2), limit(4)), play("a|yes$", play.row())]
    rows = pack_rollouts(both, length=119, multiple=1, padding_id=0)
    close = play.chat.special_ids[THINK_END]
    sampled = "".join(one.kinds for one in both).count("s")
    assert rows.trained_BS.sum() == rows.loss_mask_BS.sum() == sampled
    assert np.isfinite(rows.sampler_BS).all()
    closes = rows.labels_BS == close
    assert closes.sum() == 3 and rows.trained_BS[closes].sum() == 1
    assert (rows.sampler_BS[~rows.trained_BS] == 0).all()
    after = np.flatnonzero(closes & ~rows.trained_BS) + 1
    assert rows.trained_BS.ravel()[after].all()


@pytest.mark.parametrize("scope", list(BudgetScope))
def test_drafts_change_no_rollout(play: Play, scope: BudgetScope) -> None:
    """With the model's own draws."""
    rows = [play.row(turns=3), play.row(turns=2, budget=0), play.row(budget=6)]
    sampling = Sampling(seed=5, coupled=True)
    found = []
    for knobs in ({}, {"speculative": True, "draft_tokens": 3}):
        sampler = play.sampler(limit(9, 3, scope), max_new_tokens=24, **knobs)
        found.append(sampler.rollouts(rows, 2, sampling))
    plain, drafted = found
    assert [(one.ids, one.kinds) for one in drafted] == [(one.ids, one.kinds) for one in plain]
    assert sum(one.kinds.count("f") for one in plain) >= 4
    for ours, theirs in zip(drafted, plain, strict=True):
        assert ours.log_probabilities == pytest.approx(
            theirs.log_probabilities, abs=1e-5, nan_ok=True
        )
