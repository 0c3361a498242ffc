"""Checkers of written instructions, under the names that IFEval gives them (arXiv 2311.07911).

Each says of a text whether it obeys one instruction. The parameters have IFEval's names. Beside
IFEval's relations "at least" and "less than" there is "exactly". No torch.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]


def words_of(text: str) -> list[str]:
    """The words of a text: runs of letters."""
    return re.findall(r"[A-Za-z]+", text)


def _holds(count: int, relation: str, number: int) -> bool:
    if relation == "at least":
        return count >= number
    return count < number if relation == "less than" else count == number


def _lower(text: str) -> list[str]:
    return [word.lower() for word in words_of(text)]


def _existence(text: str, arguments: Arguments) -> bool:
    return set(arguments["keywords"]) <= set(_lower(text))


def _frequency(text: str, arguments: Arguments) -> bool:
    count = _lower(text).count(arguments["keyword"])
    return _holds(count, arguments["relation"], arguments["frequency"])


def _forbidden(text: str, arguments: Arguments) -> bool:
    return not set(arguments["forbidden_words"]) & set(_lower(text))


def _letter(text: str, arguments: Arguments) -> bool:
    count = Counter(text.lower())[arguments["letter"]]
    return _holds(count, arguments["let_relation"], arguments["let_frequency"])


def _num_words(text: str, arguments: Arguments) -> bool:
    return _holds(len(words_of(text)), arguments["relation"], arguments["num_words"])


def sentences_of(text: str) -> list[str]:
    """The parts that end with a full stop."""
    return [part for part in text.split(".")[:-1] if words_of(part)]


def _num_sentences(text: str, arguments: Arguments) -> bool:
    return _holds(len(sentences_of(text)), arguments["relation"], arguments["num_sentences"])


def _paragraphs(text: str) -> list[str]:
    return text.split("\n***\n")


def _num_paragraphs(text: str, arguments: Arguments) -> bool:
    parts = _paragraphs(text)
    return len(parts) == arguments["num_paragraphs"] and all(map(words_of, parts))


def _nth_paragraph(text: str, arguments: Arguments) -> bool:
    parts, place = _paragraphs(text), arguments["nth_paragraph"]
    if not _num_paragraphs(text, arguments) or place > len(parts):
        return False
    return _lower(parts[place - 1])[0] == arguments["first_word"]


def _placeholders(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[[a-z]+\]", text)) >= arguments["num_placeholders"]


def _postscript(text: str, arguments: Arguments) -> bool:
    *before, last = text.split("\n")
    return bool(before) and bool(words_of(last.removeprefix("P.S."))) and last.startswith("P.S. ")


def _bullets(text: str, arguments: Arguments) -> bool:
    bullets = [line for line in text.split("\n") if line.startswith("* ") and words_of(line)]
    return len(bullets) == arguments["num_bullets"]


def _highlights(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\*[a-z]+\*", text)) >= arguments["num_highlights"]


def _title(text: str, arguments: Arguments) -> bool:
    return re.match(r"<<[A-Za-z ]+>>\n", text) is not None


def _end(text: str, arguments: Arguments) -> bool:
    return text.endswith(arguments["end_phrase"])


def _quotation(text: str, arguments: Arguments) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


def _capital(text: str, arguments: Arguments) -> bool:
    return text == text.upper() and bool(words_of(text))


def _lowercase(text: str, arguments: Arguments) -> bool:
    return text == text.lower() and bool(words_of(text))


def _capital_words(text: str, arguments: Arguments) -> bool:
    count = sum(word.isupper() and len(word) > 1 for word in words_of(text))
    return _holds(count, arguments["capital_relation"], arguments["capital_frequency"])


def _no_comma(text: str, arguments: Arguments) -> bool:
    return "," not in text


def _json(text: str, arguments: Arguments) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


CHECKERS: dict[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter,
    "length_constraints:number_words": _num_words,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "detectable_format:json_format": _json,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "change_case:capital_word_frequency": _capital_words,
    "punctuation:no_comma": _no_comma,
}

# The type of each parameter, for rows that a user writes.
PARAMETERS: dict[str, dict[str, type]] = {
    "keywords:existence": {"keywords": list},
    "keywords:frequency": {"keyword": str, "frequency": int, "relation": str},
    "keywords:forbidden_words": {"forbidden_words": list},
    "keywords:letter_frequency": {"letter": str, "let_frequency": int, "let_relation": str},
    "length_constraints:number_words": {"num_words": int, "relation": str},
    "length_constraints:number_sentences": {"num_sentences": int, "relation": str},
    "length_constraints:number_paragraphs": {"num_paragraphs": int},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": int,
        "nth_paragraph": int,
        "first_word": str,
    },
    "detectable_content:number_placeholders": {"num_placeholders": int},
    "detectable_format:number_bullet_lists": {"num_bullets": int},
    "detectable_format:number_highlighted_sections": {"num_highlights": int},
    "startend:end_checker": {"end_phrase": str},
    "change_case:capital_word_frequency": {"capital_frequency": int, "capital_relation": str},
}
_RELATIONS = ("exactly", "at least", "less than")


def wrong_arguments(instruction: str, arguments: Any) -> str:
    """What is wrong with one instruction of a row; empty if nothing."""
    if instruction not in CHECKERS:
        return f"{instruction!r} is no instruction; there are {', '.join(CHECKERS)}"
    if not isinstance(arguments, Mapping):
        return f"the arguments of {instruction} are no object"
    for name, kind in PARAMETERS.get(instruction, {}).items():
        value = arguments.get(name)
        if type(value) is not kind:
            return f"{instruction} needs {name} of type {kind.__name__}"
        if name.endswith("relation") and value not in _RELATIONS:
            return f"{instruction}: {name} must be one of {', '.join(_RELATIONS)}"
        if isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
            return f"{instruction}: {name} must hold texts"
    return ""
