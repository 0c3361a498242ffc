"""The generated families: their own solutions score 1, anything else 0.

Answers are computed a second time here, from the prompt alone, by other code than the generator's.
python_code runs its solutions with `exec` here; the sandbox has tests of its own.
"""

import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.posttrain.environments import python_code
from nemotron_train.posttrain.environments.arithmetic import Arithmetic
from nemotron_train.posttrain.environments.families import FAMILY_NAMES, build_family
from nemotron_train.posttrain.environments.protocol import (
    EndedBy,
    Episode,
    Message,
    Row,
    Score,
    Verdict,
    episode_from_json,
    episode_json,
    judge,
)
from nemotron_train.posttrain.environments.tools import Machine
from nemotron_train.posttrain.tasks import rows
from tests.posttrain.environments.episodes import answered, row

SINGLE = ("arithmetic", "strings", "instructions", "structure")
LEVELS = [("train", 1), ("train", 2), ("train", 3), ("harder", 4)]


class _Exec:
    """In place of the sandbox, for code that the generator wrote."""

    def call(self, code: str, function: str, inputs: Any) -> Any:
        names: dict[str, Any] = {}
        exec(code, names)
        outputs = [names[function](*arguments) for arguments in inputs]
        return SimpleNamespace(verdict=Verdict.passed, outputs=outputs)


def family_of(name: str) -> Any:
    if name == "structure":
        pytest.importorskip("jsonschema", reason="the extra `posttrain` is not installed")
    return python_code.PythonCode(_Exec) if name == "python_code" else build_family(name)


def solved(family: Any, task: Row) -> Episode:
    return Episode(task, tuple(family.start(task)), tuple(family.solution(task)))


def score(family: Any, task: Row, text: str) -> Score:
    return judge(family, answered(replace(task, thinking=False), text))


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(("split", "level"), LEVELS)
def test_solutions_score_one(name: str, split: str, level: int) -> None:
    family = family_of(name)
    for task in rows(name, split, 3, 20, level):
        assert family.check_row(task) == ""
        score = judge(family, solved(family, task))
        assert (score.reward, score.verdict) == (1.0, Verdict.passed), task


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_prompts_and_solutions_are_short(name: str) -> None:
    """A few bytes a token: what a small model reads and writes in well under a second."""
    family = family_of(name)
    for task in rows(name, "train", 3, 40, 3):
        assert len(task.messages[0].content) < 130
        said = [turn for turn in family.solution(task) if turn.role == "assistant"]
        assert sum(len(turn.content) + len(turn.thinking or "") for turn in said) < 250


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_an_episode_survives_json(name: str) -> None:
    family = family_of(name)
    for task in rows(name, "train", 4, 5, 3):
        episode = solved(family, task)
        assert episode_from_json(json.loads(json.dumps(episode_json(episode)))) == episode


@pytest.mark.parametrize("name", SINGLE)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_changed_answer_scores_zero(name: str, data: st.DataObject) -> None:
    """One character is dropped, doubled or replaced by a digit; with `instructions` a text may stay
    obedient, so a word outside the vocabulary is put in."""
    family = family_of(name)
    task = rows(name, "train", data.draw(st.integers(0, 9)), 1, 2)[0]
    text = family.solution(task)[0].content
    if name == "instructions":
        place = data.draw(st.integers(0, len(text)))
        changed = f"{text[:place]} zzz {text[place:]}"
    else:
        place = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(st.sampled_from(["", 2 * text[place], "9", "x"]))
        changed = text[:place] + piece + text[place + 1 :]
    same = changed == text
    if name == "structure":
        try:
            same = json.loads(changed) == json.loads(text)
        except ValueError:
            same = False
    assert score(family, task, changed).reward == float(same), (text, changed)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_hacks_score_zero(name: str) -> None:
    family = family_of(name)
    for task in rows(name, "train", 5, 10, 2):
        last = family.solution(task)[-1].content
        prompt = task.messages[0].content
        listed = "\n".join(family.candidates(task))
        for text in ("", " ", prompt, listed, f"{last}\n{last}x"):
            if name != "python_code":  # code would run here
                assert score(family, task, text).reward == 0, text
        if name != "tools":
            right = solved(family, task)
            twice = replace(right.turns[-1], fault="</think> inside the thinking")
            assert judge(family, replace(right, turns=(twice,))).reward == 0
            assert judge(family, replace(right, ended_by=EndedBy.length)).reward == 0


def test_arithmetic_by_python() -> None:
    for level in (1, 2, 3):
        for task in rows("arithmetic", "train", 6, 60, level):
            first, sign, second, _ = task.messages[0].content.split()
            truth = int(first) + int(second) if sign == "+" else int(first) - int(second)
            assert task.answer == str(truth) and truth >= 0
            (turn,) = Arithmetic().solution(task)
            digits = "".join(re.findall(r"(\d)(?: |$)", turn.thinking or ""))
            leading = (turn.thinking or "").split("=")[-1][:-1]
            assert int(leading + digits[::-1]) == truth  # the columns' last digits are the answer's
            for column in (turn.thinking or "").split():
                left, right = column.split("=")
                assert eval(left) == int(right)


@pytest.mark.parametrize("text", ["085", "+85", " 8 5", "85.", "85.0", "８５", "85 ", "8_5"])
def test_arithmetic_is_strict(text: str) -> None:
    """Spaces at the ends are cut by the reading of completions, for all environments alike."""
    task = row("arithmetic", "37 + 48 =", "85")
    assert score(Arithmetic(), task, text).reward == float(text.strip() == "85")


def test_strings_by_other_means() -> None:
    for task in rows("strings", "train", 7, 120, 3):
        job, *rest = task.messages[0].content.split()
        if job == "reverse":
            letters = list(rest[0])
            letters.reverse()
            assert task.answer == "".join(letters)
        elif job == "sort":
            left, out = list(rest), []
            while left:
                out.append(min(left))
                left.remove(out[-1])
            assert task.answer.split() == out
        elif job == "count":
            assert task.answer == str(len(rest[2]) - len(rest[2].replace(rest[0], "")))
        else:
            assert task.answer == rest[2:][int(rest[0]) - 1]


@pytest.mark.parametrize(
    "text",
    [
        '{"size": 3, "size": 3}',
        '{"size": 3.0}',
        '{"size": true}',
        '{"size": "3"}',
        '{"size": 3, "more": 1}',
        '[{"size": 3}]',
        '{"size": 3} {"size": 3}',
        "NaN",
        "[" * 100_000,
        "3" * 5000,
    ],
)
def test_structure_is_strict(text: str) -> None:
    task = row("structure", "size int 3", {"size": 3})
    assert score(family_of("structure"), task, text).reward == 0
    assert score(family_of("structure"), task, ' {"size" : 3}\n').reward == 1


def test_one_is_not_true() -> None:
    task = row("structure", "open bool yes", {"open": True})
    assert score(family_of("structure"), task, '{"open": 1}').reward == 0


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        ("get cat", "4"),
        ("get dog", "error: no dog"),
        ("add 4 -2", "2"),
        ("mul 4 5", "20"),
        ("mul 4 cat", "error: no number"),
        ("add 1", "error: add takes 2"),
        ("add 1  2", "error: add takes 2"),
        ("add 01 2", "error: no number"),
        ("add ４ 2", "error: no number"),
        ("add 9999999999999 1", "error: no number"),
        ("pow 2 3", "error: no tool pow"),
        ("", "error: no tool "),
        ("set sun 3", "ok"),
    ],
)
def test_the_machine_answers(call: str, reply: str) -> None:
    assert Machine({"cat": 4}).call(call) == reply


def test_tools_need_the_end_state_and_the_answer() -> None:
    family = build_family("tools")
    metadata = {"store": {"cat": 4}, "end": {"cat": 4, "sun": 4}}
    task = row("tools", "get cat then set sun", "4", metadata=metadata)

    def play(*texts: str) -> tuple[float | None, list[str]]:
        episode, said = Episode(task, task.messages, ()), []
        for text in texts:
            turns = (*episode.turns, *answered(task, text).turns)
            episode = replace(episode, turns=turns)
            reply = family.step(episode)
            if reply is not None:
                said.append(reply[0].content)
                episode = replace(episode, turns=(*episode.turns, *reply))
        return judge(family, episode).reward, said

    get, put = "<tool_call>get cat</tool_call>", "<tool_call>set sun 4</tool_call>"
    assert play(get, put, "4") == (1.0, ["4", "ok"])
    assert play(get, "<tool_call>set sun</tool_call>", put, "4")[0] == 1.0  # errors can be mended
    assert play(get, "4")[0] == 0.0  # another state
    assert play(get, put, "5")[0] == 0.0
    assert play(get, put)[0] == 0.0  # no answer
    assert play(get + put, put, "4") == (1.0, ["error: one call", "ok"])  # two calls do nothing
    assert play(get, put + get, "4")[0] == 0.0
    assert play("4</tool_call>")[0] == 0.0


def test_python_code_compares_with_types() -> None:
    family = family_of("python_code")
    task = row("python_code", "f", metadata={"cases": [[[1, 2], 3], [[0, 0], 0]]})
    assert score(family, task, "def f(a, b): return a + b").reward == 1
    assert score(family, task, "def f(a, b): return float(a + b)").reward == 0
    assert score(family, task, "def f(a, b): return 3").message == "1 of 2 cases are right"


@pytest.mark.parametrize(
    ("task", "field"),
    [
        (row("arithmetic"), "answer"),
        (row("arithmetic", answer=85), "answer"),
        (row("arithmetic", answer="085"), "answer"),
        (row("strings"), "answer"),
        (row("strings", answer=" a"), "answer"),
        (row("structure", answer="{}"), "answer"),
        (row("tools", answer="3"), "metadata.store"),
        (row("tools", answer="3", metadata={"store": {"a": True}, "end": {}}), "metadata.store"),
        (row("tools", answer="3", metadata={"store": {}}), "metadata.end"),
        (row("python_code"), "metadata.cases"),
        (row("python_code", metadata={"cases": [[1, 2]]}), "metadata.cases[0]"),
        (
            row("python_code", metadata={"cases": [[[1], 2]], "function": ""}),
            "metadata.function",
        ),
        (row("instructions"), "metadata.instruction_id_list"),
        (row("instructions", metadata={"instruction_id_list": ["a:b"]}), "metadata.kwargs"),
        (
            row("instructions", metadata={"instruction_id_list": ["a:b"], "kwargs": [{}]}),
            "metadata.instruction_id_list",
        ),
    ],
)
def test_a_row_that_lacks_something_is_named(task: Row, field: str) -> None:
    assert family_of(task.environment).check_row(task).startswith(f"{field}: ")


def test_generators_depend_on_their_source_alone() -> None:
    for name in FAMILY_NAMES:
        family = family_of(name)
        first = [family.generate(random.Random(8), 3) for _ in range(2)]
        assert first[0] == first[1]
        assert isinstance(first[0].prompt, str) and Message("user", first[0].prompt)
