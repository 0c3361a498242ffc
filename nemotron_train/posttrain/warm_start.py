"""`posttrain rows`: worked solutions of generated tasks, as conversations for `posttrain sft`.

A policy that reinforcement learning can improve must already solve some tasks. The families of
environments write their solutions out, thinking included; fine-tuned on them for a short time, a
small model gets part of the tasks right. The rows are of the split `warm_start`, which shares no
problem with those that train and evaluate later.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.chat.messages import message_json
from nemotron_train.data.permutation import key64
from nemotron_train.platform.files import check_output, write_output
from nemotron_train.posttrain.advantage import LOW_EFFORT
from nemotron_train.posttrain.environments.families import worked_solution
from nemotron_train.posttrain.environments.family import LEVELS
from nemotron_train.posttrain.environments.protocol import Row
from nemotron_train.posttrain.tasks import Split, families_of, rows_of_levels


@dataclass
class RowsConfig:
    """The knobs of `posttrain rows`."""

    output: str = MISSING  # .jsonl file to write
    environment: str = "all"  # a family, several with commas, or all
    count: int = 1000  # rows of each family
    level: int = 0  # of difficulty: 1, 2, 3; 0: the three in turn
    balance: bool = False  # more rows of families that take longer to learn, fewer of others
    # Of the rows: `effort: low` and the first half of the reasoning. Nemotron 3 Super has 0.02.
    low_effort_share: float = 0.0
    seed: int = 1234


# Rows of a family with `balance`, relative to `count`. Measured on `tiny`: with them all families
# are solved to about the same degree (docs/posttrain.md).
SHARES = {
    "arithmetic": 1.25,
    "strings": 1.65,
    "instructions": 1.0,
    "structure": 0.6,
    "tools": 0.3,
    "python_code": 0.25,
}


def write_rows(config: RowsConfig, say: Callable[[str], None]) -> None:
    """Write the rows, those of all families mixed in an order that depends on the seed.

    Raises ConfigError for a knob out of range, an unknown family, a file that cannot be written.
    """
    names = families_of(config.environment)
    if config.count < 1:
        raise ConfigError(f"count={config.count}: must be at least 1")
    if config.level not in (0, *LEVELS):
        raise ConfigError(f"level={config.level}: must be one of 0, {', '.join(map(str, LEVELS))}")
    if not 0 <= config.low_effort_share <= 1:
        raise ConfigError(
            f"low_effort_share={config.low_effort_share}: is a share of the rows, from 0 to 1"
        )
    check_output(Path(config.output), "output")
    lines = [
        (
            key64("mixed", config.seed, row.id),
            json_text(_conversation(row, config), ensure_ascii=False),
        )
        for name in names
        for row in rows_of_levels(
            name,
            Split.warm_start,
            config.seed,
            max(1, round(config.count * (SHARES[name] if config.balance else 1))),
            config.level,
        )
    ]
    write_output(Path(config.output), "".join(f"{line}\n" for _, line in sorted(lines)), "output")
    say(f"wrote {len(lines):,} conversations of {', '.join(names)} to {config.output}")


def _line(row: Row, config: RowsConfig) -> str:
    return json_text(_conversation(row, config), ensure_ascii=False)


def _conversation(row: Row, config: RowsConfig) -> dict[str, Any]:
    solution = worked_solution(row)
    assert solution is not None, row.id
    is_low = key64("effort", config.seed, row.id) / 2.0**64 < config.low_effort_share
    if is_low:
        solution = [replace(m, thinking=_first_half(m.thinking)) for m in solution]
    messages = [message_json(message) for message in (*row.messages, *solution)]
    value: dict[str, Any] = {"id": row.id, "environment": row.environment, "messages": messages}
    value |= {"effort": LOW_EFFORT} if is_low else {}
    return value | ({"tools": list(row.tools)} if row.tools else {})


def _first_half(text: str) -> str:
    """The first half of a text's words, at least one of them."""
    words = list(re.finditer(r"\S+", text))
    return text[: words[(len(words) - 1) // 2].end()] if words else text
