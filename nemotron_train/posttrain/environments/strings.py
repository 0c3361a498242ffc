"""Small jobs on words: reverse one, sort several, count a letter, take the k-th. No torch."""

import random
from typing import Any

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
from nemotron_train.posttrain.environments.words import WORDS, made_up_word

_LETTERS = {1: (4, 4), 2: (4, 5), 3: (5, 7), 4: (8, 10)}  # fewest and most, by level
_LIST = {1: (3, 3), 2: (3, 4), 3: (4, 5), 4: (6, 7)}


class Strings(SingleTurn):
    """`reverse bado` → `odab`; `sort sun cat moon` → `cat moon sun`; `count a in bado` → `1`;
    `word 2 of sun cat moon` → `cat`. Levels: longer words and lists."""

    name = "strings"

    def check_row(self, row: Row) -> str:
        """The answer must be a text without spaces at its ends."""
        if row.answer is None:
            return "answer: missing; this environment compares with it"
        if not isinstance(row.answer, str) or row.answer != row.answer.strip() or not row.answer:
            return f"answer: {row.answer!r} is no text without spaces at its ends"
        return ""

    def generate(self, source: random.Random, level: int) -> Problem:
        """One of the four jobs."""
        job = source.choice(("reverse", "sort", "count", "word"))
        if job in ("reverse", "count"):
            word = made_up_word(source, source.randint(*_LETTERS[level]))
            if job == "reverse":
                return _problem(f"reverse {word}", word[::-1], job, word=word)
            letter = source.choice(word)
            prompt = f"count {letter} in {word}"
            return _problem(prompt, str(word.count(letter)), job, word=word, letter=letter)
        words = source.sample(WORDS, source.randint(*_LIST[level]))
        if job == "sort":
            return _problem(f"sort {' '.join(words)}", " ".join(sorted(words)), job, words=words)
        place = source.randint(1, len(words))
        prompt = f"word {place} of {' '.join(words)}"
        return _problem(prompt, words[place - 1], job, words=words)

    def solution(self, row: Row) -> list[Message]:
        """Letters or words spelled out one by one, then the answer."""
        return [thought(_THINKING[row.metadata["job"]](row.metadata), row.answer)]

    def score(self, episode: Episode) -> Score:
        """The whole content must be the answer."""
        content, answer = episode.last.content, episode.row.answer
        return passed() if content == answer else failed(f"{content!r} is not {answer!r}")

    def candidates(self, row: Row) -> list[str]:
        """Words and numbers, with the answer in their middle."""
        return around(row.answer, [*WORDS[:8], *map(str, range(8))])


def _problem(prompt: str, answer: str, job: str, **metadata: Any) -> Problem:
    return Problem(prompt, answer, {"job": job, **metadata})


def _spelled(metadata: Any) -> str:
    return " ".join(reversed(metadata["word"]))


def _initials(metadata: Any) -> str:
    """The first letters in the order of the words that begin with them."""
    return " ".join(word[:2] for word in sorted(metadata["words"]))


def _counted(metadata: Any) -> str:
    seen, spelled = 0, []
    for letter in metadata["word"]:
        seen += letter == metadata["letter"]
        spelled.append(f"{letter}{seen}")
    return " ".join(spelled)


def _numbered(metadata: Any) -> str:
    return " ".join(f"{place} {word}" for place, word in enumerate(metadata["words"], 1))


_THINKING = {"reverse": _spelled, "sort": _initials, "count": _counted, "word": _numbered}
