"""A short text under several instructions at once, over a closed vocabulary. No torch.

There is no one right answer: the text passes if every checker does, and a frame that always holds
(only words of the vocabulary, 3 to 16 of them, none twice in a row) keeps it a text. A text is
written first and the instructions are chosen among what is true of it, so each row can be obeyed.
"""

import random
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from nemotron_train.posttrain.environments.checkers import (
    CHECKERS,
    sentences_of,
    words_of,
    wrong_arguments,
)
from nemotron_train.posttrain.environments.family import Problem, around, thought
from nemotron_train.posttrain.environments.protocol import (
    Episode,
    Message,
    Row,
    Score,
    SingleTurn,
    failed,
    passed,
)
from nemotron_train.posttrain.environments.words import ADJECTIVES, NOUNS, SMALL_WORDS, VERBS

_VOCABULARY = frozenset((*NOUNS, *ADJECTIVES, *VERBS, *SMALL_WORDS))
_FEWEST_WORDS, _MOST_WORDS = 3, 16
_SIGNS = frozenset(' .,"*[]<>\n')

Instruction = tuple[str, dict[str, Any], str]  # IFEval's name, its arguments, the words for it


class Instructions(SingleTurn):
    """`write: exactly 6 words; use moon` → `the big moon sees a cat.` Level k has k instructions.

    A row has `metadata.instruction_id_list` and `metadata.kwargs`, as IFEval's rows do. Generated
    rows ask for the closed vocabulary; `metadata.closed_vocabulary` false leaves the frame out.
    """

    name = "instructions"

    def check_row(self, row: Row) -> str:
        """Both lists must be there, of one length, with known names and their arguments."""
        names, arguments = row.metadata.get("instruction_id_list"), row.metadata.get("kwargs")
        if not isinstance(names, list) or not names:
            return "metadata.instruction_id_list: missing or empty"
        if not isinstance(arguments, list) or len(arguments) != len(names):
            return "metadata.kwargs: not as many entries as metadata.instruction_id_list"
        faults = filter(None, map(wrong_arguments, names, arguments))
        return next((f"metadata.instruction_id_list: {fault}" for fault in faults), "")

    def generate(self, source: random.Random, level: int) -> Problem:
        """A text in a random form, and `level` instructions that hold for it."""
        text, form = _FORMS[source.choice(list(_FORMS))](source)
        plain = _true_of(text, source)
        chosen = form if source.random() < 0.6 else [source.choice(plain)]
        chosen = chosen or [source.choice(plain)]
        while len(chosen) < level:
            entry = source.choice([*plain, *form])
            if entry[0] not in [name for name, _, _ in chosen]:
                chosen = [*chosen, entry]
        chosen = source.sample(chosen, level)
        metadata = {"instruction_id_list": [name for name, _, _ in chosen]}
        metadata |= {"kwargs": [arguments for _, arguments, _ in chosen], "example": text}
        return Problem("write: " + "; ".join(words for _, _, words in chosen), None, metadata)

    def solution(self, row: Row) -> list[Message]:
        """The text with its words counted, then the text."""
        text = row.metadata["example"]
        counted = [f"{count} {word}" for count, word in enumerate(words_of(text.lower()), 1)]
        return [thought(" ".join(counted), text)]

    def score(self, episode: Episode) -> Score:
        """All checkers pass; their share is a component, for the log alone."""
        text, metadata = episode.last.content, episode.row.metadata
        fault = _out_of_frame(text) if metadata.get("closed_vocabulary", True) else ""
        if fault:
            return failed(fault)
        pairs = list(zip(metadata["instruction_id_list"], metadata["kwargs"], strict=True))
        missed = [name for name, arguments in pairs if not CHECKERS[name](text, arguments)]
        share = {"obeyed": 1 - len(missed) / len(pairs)}
        if missed:
            return Score(0.0, share, failed("").verdict, f"not obeyed: {', '.join(missed)}")
        return Score(1.0, share, passed().verdict)

    def candidates(self, row: Row) -> list[str]:
        """Every word of the vocabulary, with a right text in the middle."""
        return around(row.metadata.get("example", ""), sorted(_VOCABULARY))


def _out_of_frame(text: str) -> str:
    """Why a text is none over the vocabulary; empty if it is one."""
    words = words_of(text.lower().replace("p.s.", ""))
    unknown = [word for word in words if word not in _VOCABULARY]
    if unknown:
        return f"{unknown[0]} is not in the vocabulary"
    if not _FEWEST_WORDS <= len(words) <= _MOST_WORDS:
        return f"{len(words)} words; {_FEWEST_WORDS} to {_MOST_WORDS} are asked for"
    if any(one == other for one, other in pairwise(words)):
        return "a word twice in a row"
    odd = [sign for sign in text if not sign.isalpha() and sign not in _SIGNS]
    return f"the sign {odd[0]!r}" if odd else ""


def _noun_phrase(source: random.Random) -> str:
    adjective = f"{source.choice(ADJECTIVES)} " if source.random() < 0.5 else ""
    return f"{source.choice(('the', 'a'))} {adjective}{source.choice(NOUNS)}"


def _clause(source: random.Random, with_place: float = 0.3) -> str:
    """Five to nine words, such as `the red cat sees a dog near the sun`."""
    text = f"{_noun_phrase(source)} {source.choice(VERBS)} {_noun_phrase(source)}"
    if source.random() < with_place:
        text += f" {source.choice(('near', 'with'))} the {source.choice(NOUNS)}"
    return text


def _short(source: random.Random) -> str:
    return f"the {source.choice(NOUNS)} {source.choice(VERBS)} a {source.choice(NOUNS)}."


# Forms: each writes a text and names the instructions that ask for its form.


def _plain(source: random.Random) -> tuple[str, list[Instruction]]:
    return f"{_clause(source)}.", []


def _capitals(source: random.Random) -> tuple[str, list[Instruction]]:
    return f"{_clause(source)}.".upper(), [("change_case:english_capital", {}, "all capitals")]


def _some_capitals(source: random.Random) -> tuple[str, list[Instruction]]:
    words = _clause(source).split(" ")
    long_words = [place for place, word in enumerate(words) if len(word) > 2]
    number = source.randint(1, 2)
    for place in source.sample(long_words, number):
        words[place] = words[place].upper()
    arguments = {"capital_frequency": number, "capital_relation": "exactly"}
    entry = ("change_case:capital_word_frequency", arguments, f"exactly {number} capital words")
    return " ".join(words) + ".", [entry]


def _marked(source: random.Random, name: str, parameter: str, marks: str, words: str) -> Any:
    parts, number = _clause(source).split(" "), source.randint(1, 2)
    for place in source.sample([p for p, word in enumerate(parts) if len(word) > 2], number):
        parts[place] = marks[0] + parts[place] + marks[1]
    return " ".join(parts) + ".", [(name, {parameter: number}, f"{number} {words}")]


def _placeholders(source: random.Random) -> tuple[str, list[Instruction]]:
    name = "detectable_content:number_placeholders"
    return _marked(source, name, "num_placeholders", "[]", "words in [ ]")


def _highlights(source: random.Random) -> tuple[str, list[Instruction]]:
    name = "detectable_format:number_highlighted_sections"
    return _marked(source, name, "num_highlights", "**", "words in * *")


def _bullets(source: random.Random) -> tuple[str, list[Instruction]]:
    number = source.randint(1, 2)
    lines = [f"* {_short(source)}" for _ in range(number)]
    name = "detectable_format:number_bullet_lists"
    return "\n".join(lines), [(name, {"num_bullets": number}, f"{number} bullets")]


def _two_sentences(source: random.Random) -> tuple[str, list[Instruction]]:
    arguments = {"num_sentences": 2, "relation": "exactly"}
    entry = ("length_constraints:number_sentences", arguments, "exactly 2 sentences")
    return f"{_short(source)} {_short(source)}", [entry]


def _two_paragraphs(source: random.Random) -> tuple[str, list[Instruction]]:
    first, second = _short(source), f"a {source.choice(ADJECTIVES)} {_short(source)[4:]}"
    number = {"num_paragraphs": 2}
    if source.random() < 0.5:
        entry = ("length_constraints:number_paragraphs", number, "2 parts split by ***")
        return f"{first}\n***\n{second}", [entry]
    arguments = {**number, "nth_paragraph": 2, "first_word": "a"}
    name = "length_constraints:nth_paragraph_first_word"
    return f"{first}\n***\n{second}", [(name, arguments, "2 parts split by ***, part 2 begins a")]


def _titled(source: random.Random) -> tuple[str, list[Instruction]]:
    text = f"<<the {source.choice(NOUNS)}>>\n{_short(source)}"
    return text, [("detectable_format:title", {}, "a title in << >>")]


def _postscript(source: random.Random) -> tuple[str, list[Instruction]]:
    entry = ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a P.S. at the end")
    return f"{_short(source)}\nP.S. {_short(source)}", [entry]


def _quoted(source: random.Random) -> tuple[str, list[Instruction]]:
    return f'"{_clause(source)}."', [("startend:quotation", {}, "in quotes")]


_FORMS: Mapping[str, Callable[[random.Random], tuple[str, list[Instruction]]]] = {
    "plain": _plain,
    "plain_too": _plain,  # twice as often as a form
    "plain_again": _plain,
    "capitals": _capitals,
    "some_capitals": _some_capitals,
    "placeholders": _placeholders,
    "highlights": _highlights,
    "bullets": _bullets,
    "two_sentences": _two_sentences,
    "two_paragraphs": _two_paragraphs,
    "titled": _titled,
    "postscript": _postscript,
    "quoted": _quoted,
}


def _true_of(text: str, source: random.Random) -> list[Instruction]:
    """Instructions that the text obeys, whatever its form."""
    words = [word.lower() for word in words_of(text) if word.lower() in _VOCABULARY]
    nouns = [word for word in words if word in NOUNS]
    absent = [word for word in (*NOUNS, *ADJECTIVES) if word not in words]
    number, noun, letter = len(words_of(text)), source.choice(nouns), source.choice("aeiou")
    count, forbidden = text.lower().count(letter), source.sample(absent, 2)
    times, other = words.count(noun), source.choice([w for w in words if w not in SMALL_WORDS])
    last = text.split(" ")[-1]
    entries: list[Instruction] = [
        (
            "keywords:existence",
            {"keywords": sorted({noun, other})},
            f"use {' and '.join(sorted({noun, other}))}",
        ),
        (
            "keywords:frequency",
            {"keyword": noun, "frequency": times, "relation": "exactly"},
            f"{noun} exactly {times} times",
        ),
        (
            "keywords:forbidden_words",
            {"forbidden_words": forbidden},
            f"never {' or '.join(forbidden)}",
        ),
        (
            "keywords:letter_frequency",
            {"letter": letter, "let_frequency": count + 1, "let_relation": "less than"},
            f"letter {letter} less than {count + 1} times",
        ),
        (
            "length_constraints:number_words",
            {"num_words": number, "relation": "exactly"},
            f"exactly {number} words",
        ),
        ("startend:end_checker", {"end_phrase": last}, f"end with {last}"),
    ]
    if text == text.lower():
        entries.append(("change_case:english_lowercase", {}, "all lower case"))
    if len(sentences_of(text)) == 1:
        arguments = {"num_sentences": 2, "relation": "less than"}
        entries.append(("length_constraints:number_sentences", arguments, "less than 2 sentences"))
    entries.append(("punctuation:no_comma", {}, "no comma"))
    return entries
