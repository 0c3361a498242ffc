"""Rows: read from JSON lines, or generated.

Owns: the form of a row in a file, the splits of generated rows. Does not own: what an environment
needs in a row (its `check_row`), how many a step takes (`ratios`), prompts as tokens. No torch.
"""

import random
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.chat.rows import row_messages, row_tools
from nemotron_train.data.json_lines import Fields, json_lines, wrong_value
from nemotron_train.data.permutation import key64
from nemotron_train.posttrain.environments.families import FAMILY_NAMES, build_family, check_name
from nemotron_train.posttrain.environments.family import HELD_OUT_LEVEL, LEVELS, Family, Problem
from nemotron_train.posttrain.environments.protocol import Message, Row

_FIELDS = ("id", "environment", "messages", "prompt", "answer", "metadata", "tools", "thinking")
_FIELDS += ("budget", "effort", "reasoning_content")  # the last is for `posttrain sft` alone
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
    """The rows of a .jsonl or .jsonl.gz file. environment: of rows that name none.

    Raises ConfigError with file, line and field for the first row that is wrong. Whether a row has
    what its environment needs is asked of the environment (`Scoring.check_rows`).
    """
    found, lines = [], {}
    stem = Path(path.name.removesuffix(".gz")).stem
    for line, fields in json_lines(path):
        row = _parse_row(fields, environment, f"{stem}/{line}")
        if row.id in lines:
            raise fields.error(f"id {row.id!r} is also that of line {lines[row.id]}")
        lines[row.id] = line
        found.append(row)
    if not found:
        raise ConfigError(f"{path}: holds no rows")
    return found


def _parse_row(fields: Fields, environment: str, default_id: str) -> Row:
    fields.check_known(_FIELDS, " (put it in metadata)")
    name = fields.text("environment", environment)
    if not name:
        raise fields.error("environment is missing")
    try:
        check_name(name)
    except ConfigError as error:
        raise fields.error(str(error)) from None
    budget, metadata = fields.get("budget"), fields.get("metadata") or {}
    if budget is not None and (type(budget) is not int or budget < 0):
        raise fields.wrong("budget", "a whole number of tokens, 0 or more")
    if not isinstance(metadata, Mapping):
        raise fields.wrong("metadata", "an object")
    return Row(
        id=fields.text("id", default_id),
        environment=name,
        messages=_messages(fields),
        answer=fields.get("answer"),
        metadata=metadata,
        tools=row_tools(fields),
        thinking=fields.whether("thinking", True, "; a worked reasoning is reasoning_content"),
        budget=budget,
        effort=fields.text("effort", ""),
    )


def _messages(fields: Fields) -> tuple[Message, ...]:
    """The messages of a row, none of them empty. The last one is not the assistant's."""
    messages = row_messages(fields)
    field = "prompt" if "prompt" in fields.value else "messages"
    for place, message in enumerate(messages):
        if not message.content.strip() and not message.tool_calls:
            name = f"{field}[{place}].content"
            raise wrong_value(fields.where, name, message.content, "a text that is not empty")
    if messages[-1].role == "assistant":
        raise fields.error(f"{field} ends with the assistant; the last message is one to answer")
    return messages
