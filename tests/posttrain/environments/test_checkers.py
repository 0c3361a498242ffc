"""Each instruction's checker on a text that obeys and texts that do not, written by hand."""

from typing import Any

import pytest

from nemotron_train.posttrain.environments.checkers import CHECKERS, PARAMETERS, wrong_arguments
from nemotron_train.posttrain.environments.families import build_family
from nemotron_train.posttrain.environments.protocol import judge
from nemotron_train.posttrain.tasks import rows
from tests.posttrain.environments.episodes import answered, row

PARTS = "a cat.\n***\nthe dog."
NTH = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "the"}

CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("keywords:existence", {"keywords": ["cat", "sun"]}, "The CAT, sun", ["cat", "cats sun", ""]),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "exactly"},
        "cat a Cat",
        ["cat", "cat cat cat", "cat cats"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "cats dog", ["a Cat."]),
    (
        "keywords:letter_frequency",
        {"letter": "a", "let_frequency": 2, "let_relation": "less than"},
        "A b",
        ["aA", "banana"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        "a b c.",
        ["a b", "", "..."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "exactly"},
        "a b. c.",
        ["a. b", "a. b. c.", "..", ". ."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        PARTS,
        ["a cat.", "a.\n***\n", "a *** b", "a\n***\nb\n***\nc"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        NTH,
        PARTS,
        ["the dog.\n***\na cat.", "the dog.", "a\n***\n"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[a] b [cat]",
        ["[a]", "[] []", "a b"],
    ),
    ("detectable_content:postscript", {}, "a\nP.S. b", ["a", "P.S. b", "a\nP.S.", "a P.S. b"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* a\n* b",
        ["* a", "* a\n* b\n* c", "*a\n*b", "* \n* "],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 1},
        "a *b* c",
        ["a b", "**", "* b *"],
    ),
    ("detectable_format:title", {}, "<<a b>>\nc", ["a <<b>>\n", "<<a>> b", "<<>>\nc"]),
    ("detectable_format:json_format", {}, '{"a": 1}', ["a", "[1]", "{", "[" * 100_000]),
    ("startend:end_checker", {"end_phrase": "cat."}, "a cat.", ["cat", "cat. a"]),
    ("startend:quotation", {}, '"a b."', ["a b", '"a" b"', '"', '""']),
    ("change_case:english_capital", {}, "A B.", ["A b.", "", "..."]),
    ("change_case:english_lowercase", {}, "a b.", ["A b.", "", "..."]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "exactly"},
        "a CAT",
        ["a cat", "A cat", "THE CAT"],
    ),
    ("punctuation:no_comma", {}, "a b", ["a, b"]),
]


def test_every_checker_has_a_case() -> None:
    assert [case[0] for case in CASES] == list(CHECKERS) and len(CHECKERS) == 20


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=lambda v: str(v)[:30])
def test_obeyed_and_not(name: str, arguments: dict[str, Any], good: str, bad: list[str]) -> None:
    assert wrong_arguments(name, arguments) == ""
    assert CHECKERS[name](good, arguments)
    for text in bad:
        assert not CHECKERS[name](text, arguments), text


@pytest.mark.parametrize("name", PARAMETERS)
def test_missing_and_wrong_arguments_are_named(name: str) -> None:
    assert name in wrong_arguments(name, {}) and name in wrong_arguments(name, None)
    for parameter in PARAMETERS[name]:
        case = next(case for case in CASES if case[0] == name)
        assert parameter in wrong_arguments(name, {**case[1], parameter: 0.5})
        if parameter.endswith("relation"):
            assert parameter in wrong_arguments(name, {**case[1], parameter: "about"})


def test_generated_rows_use_most_checkers() -> None:
    used = set()
    for task in rows("instructions", "train", 1, 150, 3):
        used |= set(task.metadata["instruction_id_list"])
        assert len(set(task.metadata["instruction_id_list"])) == 3
    assert set(CHECKERS) - used <= {"detectable_format:json_format"}


@pytest.mark.parametrize(
    "text",
    [
        "no comma",  # words outside the vocabulary
        "the cat",  # too short
        "the cat cat sees a dog.",
        "the cat sees a dog!",
        "the cat sees a dog. " * 4,
        "the cat sees a dog. the answer is right, score 1.",
    ],
)
def test_the_frame_holds_whatever_is_asked(text: str) -> None:
    metadata = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    family, task = build_family("instructions"), row("instructions", metadata=metadata)
    assert judge(family, answered(task, text)).reward == 0
    assert judge(family, answered(task, "the cat sees a dog.")).reward == 1
    free = row("instructions", metadata={**metadata, "closed_vocabulary": False})
    assert judge(family, answered(free, text)).reward == float("," not in text)
