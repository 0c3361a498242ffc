"""Lines of `name type value` to one JSON object of a schema, which jsonschema judges. No torch."""

import json
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
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
from nemotron_train.posttrain.environments.words import ADJECTIVES, NOUNS

_FIELDS = ("name", "size", "age", "kind", "open", "place", "count", "part")
_FEWEST_MOST = {1: (1, 2), 2: (2, 3), 3: (3, 4), 4: (5, 6)}  # fields, by level
_TYPES = {1: ("text", "int"), 2: ("text", "int", "bool", "enum")}
_TYPES[3] = _TYPES[4] = (*_TYPES[2], "list", "object")
_ENUM = ("low", "mid", "high")


class Structure(SingleTurn):
    """Lines to JSON: `size int 3` → `{"size": 3}`. Level 1: one or two fields of text and int; 2:
    up to three, with bool and enum; 3: up to four, with lists and one nested object; 4: five or
    six.

    The answer is right if it is one JSON object without double keys that the row's schema accepts
    and whose values are the truth's. Spaces between tokens do not matter.
    """

    name = "structure"

    def open(self) -> None:
        """Import the library. Raises ConfigError if it is missing."""
        _jsonschema()

    def check_row(self, row: Row) -> str:
        """The answer must be an object; metadata.schema, if given, must accept it."""
        if not isinstance(row.answer, Mapping):
            return "answer: missing or no JSON object; this environment compares with it"
        schema = row.metadata.get("schema", {})
        library = _jsonschema()
        try:
            library.Draft202012Validator.check_schema(schema)
            library.validate(row.answer, schema, cls=library.Draft202012Validator)
        except library.SchemaError as error:
            return f"metadata.schema: {error.message}"
        except library.ValidationError as error:
            return f"answer: not what metadata.schema accepts ({error.message})"
        except Exception as error:  # a reference that cannot be resolved, a pattern that is none
            return f"metadata.schema: {error}"
        return ""

    def generate(self, source: random.Random, level: int) -> Problem:
        """Fields in random order."""
        lines, truth, properties = ["make json"], {}, {}
        for name in source.sample(_FIELDS, source.randint(*_FEWEST_MOST[level])):
            text, value, schema = _field(source, source.choice(_TYPES[level]))
            lines.append(f"{name} {text}")
            truth[name], properties[name] = value, schema
        return Problem("\n".join(lines), truth, {"schema": _closed(properties)})

    def solution(self, row: Row) -> list[Message]:
        """The fields one by one, as they stand in the prompt, then the object."""
        fields = [f"{name} {json_text(value)}" for name, value in row.answer.items()]
        return [thought(" ; ".join(fields), json_text(row.answer))]

    def score(self, episode: Episode) -> Score:
        """Parse strictly, validate, compare with types."""
        library, row = _jsonschema(), episode.row
        try:
            value = json.loads(
                episode.last.content, object_pairs_hook=_no_double_keys, parse_constant=_refuse
            )
        except (ValueError, RecursionError) as error:
            return failed(f"no JSON: {error}")
        validator = library.Draft202012Validator(row.metadata.get("schema", {}))
        faults = [error.message for error in validator.iter_errors(value)]
        if faults:
            return failed(faults[0])
        return passed() if same(value, row.answer) else failed("a value differs")

    def candidates(self, row: Row) -> list[str]:
        """Objects of other values, with the right one in their middle."""
        others = [json_text({name: number}) for number in range(4) for name in row.answer]
        return around(json_text(row.answer), others)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal with their types: true is not 1, and 1.0 is not 1. The
    order of keys does not matter."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@cache
def _jsonschema() -> Any:
    """The library. Raises ConfigError if it is not installed."""
    try:
        import jsonschema  # pyright: ignore[reportMissingModuleSource]
    except ImportError:
        raise ConfigError(
            "environment structure needs the package jsonschema: install the extra `posttrain`"
        ) from None
    return jsonschema


def _field(source: random.Random, kind: str) -> tuple[str, Any, dict[str, Any]]:
    """Text after the field's name, the value, and its schema."""
    if kind == "int":
        number = source.randint(0, 99)
        return f"int {number}", number, {"type": "integer"}
    if kind == "bool":
        word = source.choice(("yes", "no"))
        return f"bool {word}", word == "yes", {"type": "boolean"}
    if kind == "enum":
        word = source.choice(_ENUM)
        return f"enum {word}", word, {"enum": list(_ENUM)}
    if kind == "list":
        words = source.sample(NOUNS, 2)
        return f"list {' '.join(words)}", words, {"type": "array", "items": {"type": "string"}}
    if kind == "object":
        key, number = source.choice(ADJECTIVES), source.randint(0, 9)
        text = f"object {key} int {number}"
        return text, {key: number}, _closed({key: {"type": "integer"}})
    word = source.choice(NOUNS)
    return f"text {word}", word, {"type": "string"}


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with exactly these properties."""
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | {"required": list(properties), "additionalProperties": False}


def _no_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
