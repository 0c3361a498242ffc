"""Rollouts for the tests: by hand, and by hypothesis."""

import math
from typing import Any

from hypothesis import strategies as st

from nemotron_train.data.chat.messages import Message, ToolCall
from nemotron_train.posttrain.environments.protocol import EndedBy, Episode, Row, Score
from nemotron_train.posttrain.rollout import Rollout
from nemotron_train.posttrain.sandbox.verdict import Verdict

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
IDS = st.integers(0, 999)
NUMBERS = st.floats(-1e3, 1e3)


def rollout(prompt_ids: list[int], ids: list[int], kinds: str = "", **fields: Any) -> Rollout:
    """A rollout with these ids, all sampled unless `kinds` says otherwise."""
    kinds = kinds or "s" * len(ids)
    values = [-0.5 * (place + 1) if kind == "s" else math.nan for place, kind in enumerate(kinds)]
    messages = (Message("user", "2 + 2?"),)
    row = Row(fields.pop("row", "row"), fields.pop("environment", "strings"), messages, "4")
    turns = fields.pop("turns", (Message("assistant", "four"),))
    ended_by = EndedBy.length if fields.get("cut") else EndedBy.stop
    verdict = Verdict.passed if fields.pop("passed", False) else Verdict.failed
    filled = {
        "group": 0,
        "sample": 0,
        "sequence": 0,
        "log_probabilities": values,
        "episode": Episode(row, messages, turns, ended_by),
        "score": Score(float(verdict == Verdict.passed), {}, verdict, ""),
        "cut": False,
        "text": "four<|im_end|>",
    }
    return Rollout(prompt_ids=prompt_ids, ids=ids, kinds=kinds, **{**filled, **fields})


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Any rollout that an episode could give, also with what a trainer adds."""
    kinds = draw(st.text("sfe", max_size=12))
    values = [draw(NUMBERS) if kind == "s" else math.nan for kind in kinds]
    calls = st.tuples(TEXTS | st.builds(ToolCall, TEXTS, st.dictionaries(TEXTS, IDS, max_size=2)))
    turns = st.builds(Message, st.sampled_from(["assistant", "tool"]), TEXTS)
    turns |= st.builds(Message, st.just("assistant"), TEXTS, TEXTS, calls)
    turns |= st.builds(Message, st.just("assistant"), st.just(""), fault=TEXTS)
    row = draw(
        st.builds(
            Row,
            TEXTS,
            TEXTS,
            st.tuples(st.builds(Message, st.just("user"), TEXTS)),
            st.none() | TEXTS | st.lists(IDS, max_size=2) | st.booleans(),
            st.dictionaries(TEXTS, st.none() | IDS | TEXTS, max_size=2),
            thinking=st.booleans(),
            budget=st.none() | IDS,
            effort=TEXTS,
        )
    )
    components = st.dictionaries(TEXTS, NUMBERS, max_size=2)
    score = st.builds(Score, st.none() | NUMBERS, components, st.sampled_from(Verdict), TEXTS)
    episode = Episode(
        row, row.messages, tuple(draw(st.lists(turns, max_size=3))), draw(st.sampled_from(EndedBy))
    )
    return Rollout(
        group=draw(IDS),
        sample=draw(IDS),
        sequence=draw(st.integers(0, 2**63)),
        prompt_ids=draw(st.lists(IDS, max_size=4)),
        ids=draw(st.lists(IDS, min_size=len(kinds), max_size=len(kinds))),
        kinds=kinds,
        log_probabilities=values,
        episode=episode,
        score=draw(score),
        cut=draw(st.booleans()),
        text=draw(TEXTS),
        thinking_tokens=draw(IDS),
        malformed_thinking=draw(st.booleans()),
        policy_version=draw(IDS),
        trainer_log_probabilities=draw(
            st.sampled_from([[], [v - 0.25 for v in values if not math.isnan(v)]])
        ),
        advantage=draw(NUMBERS),
        weight=draw(NUMBERS),
    )
