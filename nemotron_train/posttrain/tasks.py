"""Rows: read from JSON lines, or generated.

Owns: the form of a row in a file, the splits of generated rows. Does not own: what an environment
needs in a row (its `check_row`), how many a step takes (`ratios`), prompts as tokens. No torch.
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.visible import one_line
from nemotron_train.data.permutation import key64
from nemotron_train.posttrain.environments.families import FAMILY_NAMES, build_family, check_name
from nemotron_train.posttrain.environments.family import HELD_OUT_LEVEL, LEVELS, Family, Problem
from nemotron_train.posttrain.environments.protocol import ROLES, Message, Row

_FIELDS = ("id", "environment", "messages", "prompt", "answer", "metadata", "tools", "thinking")
_FIELDS += ("budget", "effort")
_MESSAGE_FIELDS = ("role", "content", "thinking", "reasoning_content", "tool_calls", "name")
_MAX_LINE_BYTES = 16 << 20
_MOST_TRIES = 20_000  # draws for one row of a split


class Split(StrEnum):
    """What generated rows are for. No problem is in two of them."""

    warm_start = "warm_start"
    train = "train"
    evaluation = "evaluation"
    harder = "harder"  # evaluation on the level that nothing else uses


# Of 10 problems, which belong to a split. The harder level's problems are all of one split.
_SHARES = {Split.warm_start: range(4), Split.train: range(4, 8), Split.evaluation: range(8, 10)}


def rows(environment: str, split: str, seed: int, count: int, level: int) -> list[Row]:
    """`count` generated rows. Row i depends on the arguments and on i alone, not on `count`.

    level: 1 to 3, and 4 with the split `harder`. Raises ConfigError for another level or split, or
    an environment without a generator.
    """
    family, part = build_family(environment), _split(split)
    levels = _levels(part)
    if level not in levels:
        allowed = ", ".join(map(str, levels))
        raise ConfigError(f"level={level}: the split {split} has {allowed}")
    if count < 0:
        raise ConfigError(f"count={count}: give 0 or more")
    return [_row(family, part, seed, index, level) for index in range(count)]


def rows_of_levels(
    environment: str, split: str, seed: int, count: int, level: int = 0
) -> list[Row]:
    """`rows` of one level, or with level 0 of all levels that the split has, in turn."""
    levels = (level,) if level else _levels(_split(split))
    by_level = [
        rows(environment, split, seed, len(range(place, count, len(levels))), level)
        for place, level in enumerate(levels)
    ]
    return [by_level[place % len(levels)][place // len(levels)] for place in range(count)]


def families_of(names: str) -> Sequence[str]:
    """The families that `all` or `NAME,NAME` names. Raises ConfigError for another name."""
    if names == "all":
        return FAMILY_NAMES
    listed = [name.strip() for name in names.split(",")]
    for name in listed:
        if name not in FAMILY_NAMES:
            raise ConfigError(
                f"environment={names}: {name!r} makes no tasks; there are "
                f"{', '.join(FAMILY_NAMES)} and all"
            )
    return list(dict.fromkeys(listed))


def evaluation_rows(
    environment: str, file: str, split: str, seed: int, count: int, level: int
) -> list[Row]:
    """Rows to evaluate with: of a file if one is named, the first `count` of each environment; else
    generated. Raises ConfigError as `read_rows` and `rows_of_levels`."""
    if not file:
        return [
            row
            for name in families_of(environment)
            for row in rows_of_levels(name, split, seed, count, level)
        ]
    default = "" if environment == "all" else environment
    by_environment: dict[str, list[Row]] = {}
    for row in read_rows(Path(file), default):
        by_environment.setdefault(row.environment, []).append(row)
    return [row for found in by_environment.values() for row in found[:count]]


def _levels(split: Split) -> tuple[int, ...]:
    return (HELD_OUT_LEVEL,) if split is Split.harder else LEVELS


def _split(name: str) -> Split:
    if name not in list(Split):
        raise ConfigError(f"split={name}: there are {', '.join(Split)}")
    return Split(name)


def _row(family: Family, split: Split, seed: int, index: int, level: int) -> Row:
    source = random.Random(key64("row", family.name, split, seed, level, index))
    for _ in range(_MOST_TRIES):
        problem = family.generate(source, level)
        if split is Split.harder or _share(family.name, problem) in _SHARES[split]:
            identity = f"{family.name}/{split}/{level}/{seed}/{index}"
            metadata = {**problem.metadata, "level": level, "generated": str(split)}
            messages = (Message("user", problem.prompt),)
            return Row(identity, family.name, messages, problem.answer, metadata)
    raise AssertionError(f"{family.name} level {level} has too few problems")


def _share(name: str, problem: Problem) -> int:
    """The tenth that a problem belongs to: a property of the problem, whatever drew it."""
    return key64("share", name, problem.prompt, problem.hidden) % 10


def read_rows(path: Path, environment: str = "") -> list[Row]:
    """The rows of a file of JSON lines. environment: of rows that name none.

    Raises ConfigError with file, line and field for the first row that is wrong. Whether a row has
    what its environment needs is asked of the environment (`Scoring.check_rows`).
    """
    found, lines = [], {}
    for number, line in _lines(path):
        where = f"{path} line {number}"
        row = _parse_row(line, where, environment or "", f"{path.stem}/{number}")
        if row.id in lines:
            raise ConfigError(f"{where}: id {row.id!r} is also that of line {lines[row.id]}")
        lines[row.id] = number
        found.append(row)
    if not found:
        raise ConfigError(f"{path}: holds no rows")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise ConfigError(f"{path} line {number}: more than {_MAX_LINE_BYTES:,} bytes")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _parse_row(line: bytes, where: str, environment: str, default_id: str) -> Row:
    value = _parse_json(line, where)
    unknown = [name for name in value if name not in _FIELDS]
    if unknown:
        known = ", ".join(_FIELDS)
        raise ConfigError(
            f"{where}: no field {one_line(unknown[0])[:40]} (put it in metadata); there are {known}"
        )
    check = _Fields(value, where)
    name = check.text("environment", environment)
    if not name:
        raise ConfigError(f"{where}: environment is missing")
    try:
        check_name(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    budget = value.get("budget")
    if budget is not None and (type(budget) is not int or budget < 0):
        raise check.wrong("budget", "a whole number of tokens, 0 or more")
    thinking = value.get("thinking", True)
    if type(thinking) is not bool:
        raise check.wrong("thinking", "true or false")
    metadata, tools = value.get("metadata") or {}, value.get("tools") or []
    if not isinstance(metadata, Mapping):
        raise check.wrong("metadata", "an object")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise check.wrong("tools", "a list of objects")
    return Row(
        id=check.text("id", default_id),
        environment=name,
        messages=_messages(check),
        answer=value.get("answer"),
        metadata=metadata,
        tools=tuple(tools),
        thinking=thinking,
        budget=budget,
        effort=check.text("effort", ""),
    )


class _Fields:
    """The fields of one row, with errors that name file, line and field."""

    def __init__(self, value: Mapping[str, Any], where: str) -> None:
        self.value = value
        self.where = where

    def wrong(self, field: str, needed: str, value: Any = None) -> ConfigError:
        shown = json_text(self.value.get(field) if value is None else value)[:60]
        return ConfigError(f"{self.where}: {field} is {one_line(shown)}; it must be {needed}")

    def text(self, field: str, default: str) -> str:
        value = self.value.get(field, default)
        if not isinstance(value, str) or (field in self.value and not value.strip()):
            raise self.wrong(field, "a text that is not empty")
        return value


def _messages(check: _Fields) -> tuple[Message, ...]:
    """The messages of a row, from `messages` or `prompt`. The last one is not the assistant's."""
    value = check.value
    if ("messages" in value) == ("prompt" in value):
        state = "both there" if "messages" in value else "both missing"
        raise ConfigError(f"{check.where}: messages and prompt are {state}; give one")
    if "prompt" in value and not isinstance(value["prompt"], list):
        return (Message("user", check.text("prompt", "")),)
    field = "prompt" if "prompt" in value else "messages"
    if not isinstance(value[field], list) or not value[field]:
        raise check.wrong(field, "a list of messages that is not empty")
    found = tuple(
        _message(check, f"{field}[{place}]", entry) for place, entry in enumerate(value[field])
    )
    if found[-1].role == "assistant":
        raise ConfigError(
            f"{check.where}: {field} ends with the assistant; the last message is one to answer"
        )
    return found


def _message(check: _Fields, field: str, entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise check.wrong(field, "an object with role and content", entry)
    unknown = [name for name in entry if name not in _MESSAGE_FIELDS]
    if unknown:
        raise check.wrong(field, f"without {one_line(unknown[0])[:40]}", entry)
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise check.wrong(f"{field}.role", f"one of {', '.join(ROLES)}", role or "missing")
    calls = entry.get("tool_calls") or ()
    if not isinstance(content, str) or not (content.strip() or calls):
        raise check.wrong(f"{field}.content", "a text that is not empty", content or "empty")
    thinking = entry.get("thinking", entry.get("reasoning_content"))
    if thinking is not None and (not isinstance(thinking, str) or role != "assistant"):
        raise check.wrong(f"{field}.thinking", "a text, of an assistant's message", thinking)
    if not all(isinstance(call, str) for call in calls) or (calls and role != "assistant"):
        raise check.wrong(
            f"{field}.tool_calls", "a list of texts, of an assistant's message", calls
        )
    return Message(role, content, thinking, tuple(calls))


def _parse_json(line: bytes, where: str) -> dict[str, Any]:
    """One line as a JSON object. Raises ConfigError for anything that is not strictly that."""

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(entries)) < len(entries):
            names = [name for name, _ in entries]
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the field {double!r} is there twice")
        return dict(entries)

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is no finite number")
        return value

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        text = line.decode()
        value = json.loads(
            text, object_pairs_hook=pairs, parse_float=number, parse_constant=constant
        )
        json_text(value)  # what cannot be written again is refused here
        if "\\ud" in text.lower() and _half_surrogate(value):
            raise ValueError("a half surrogate, which is no text")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not a JSON object ({one_line(error)[:120]})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: not a JSON object but {type(value).__name__}")
    return value


def _half_surrogate(value: Any) -> bool:
    """Whether a text in a JSON value has one."""
    if isinstance(value, str):
        return any(0xD800 <= ord(letter) < 0xE000 for letter in value)
    if isinstance(value, Mapping):
        return any(_half_surrogate(entry) for pair in value.items() for entry in pair)
    return isinstance(value, list) and any(map(_half_surrogate, value))
