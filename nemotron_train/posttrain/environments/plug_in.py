"""A user's own environment: `module:name`, a function or a class. No torch of its own.

A function is `reward_fn(completion, answer)`. completion: the content after the thinking, a text.
It returns a number (1 passes), a bool, a dict of named parts (their sum is the reward), or None if
the reward does not apply. A class is made without arguments and may have any of the methods of
`protocol.Environment`; `score(episode)` is enough.

This module only runs in a process that `scoring` can kill.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.visible import one_line
from nemotron_train.data.chat.messages import ROLES, read_message
from nemotron_train.posttrain.environments.protocol import (
    Episode,
    Message,
    Row,
    Score,
    SingleTurn,
    failed,
)
from nemotron_train.posttrain.sandbox.verdict import Verdict


def load_plug_in(name: str) -> Any:
    """The environment that `module:name` or `file.py:name` names, with the current folder on the
    path. Raises ConfigError if it cannot be loaded: all that an import may raise ends here."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute.isidentifier():
        raise ConfigError(f"environment {name}: write module:name or file.py:name")
    try:
        module = _module(module_name)
    except ConfigError:
        raise
    except BaseException as error:  # SystemExit, too
        raise ConfigError(f"environment {name}: its import raised {_line(error)}") from None
    target = getattr(module, attribute, None)
    if not isinstance(target, type) and callable(getattr(target, "score", None)):
        return _Class(name, target)  # an object of a class
    if target is None or not callable(target):
        raise ConfigError(f"environment {name}: {module_name} has no function or class {attribute}")
    if not isinstance(target, type):
        return _Function(name, target)
    try:
        made = target()
    except BaseException as error:
        raise ConfigError(f"environment {name}: {attribute}() raised {_line(error)}") from None
    if not callable(getattr(made, "score", None)):
        raise ConfigError(f"environment {name}: the class has no method score(episode)")
    return _Class(name, made)


def _line(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:200]


def _module(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not name.endswith(".py"):
        return importlib.import_module(name)
    if not Path(name).is_file():
        raise ConfigError(f"environment {name}: no such file")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Function(SingleTurn):
    """An environment around a reward function."""

    def __init__(self, name: str, function: Any) -> None:
        self.name = name
        self._function = function

    def check_row(self, row: Row) -> str:
        """The function's second argument must be there."""
        return "" if row.answer is not None else "answer: missing; reward_fn is called with it"

    def score(self, episode: Episode) -> Score:
        """The function's value as a score."""
        return score_of(self._function(episode.last.content, episode.row.answer))


def score_of(value: Any) -> Score:
    """What a reward function returned, as a score; the verdict `error` for what is no reward."""
    if isinstance(value, Score):
        return value
    if value is None:
        return Score(None, {}, Verdict.failed, "the reward does not apply")
    components: dict[str, float] = {}
    try:
        if isinstance(value, Mapping):
            if not value:
                return failed("a dict without components", Verdict.error)
            components = {str(name): float(part) for name, part in value.items()}
            value = sum(components.values())
        if isinstance(value, str | bytes):
            raise TypeError
        reward = float(value)
    except (TypeError, ValueError, OverflowError):
        return failed(f"returned {type(value).__name__}, which is no reward", Verdict.error)
    return Score(reward, components, Verdict.passed if reward >= 1 else Verdict.failed)


class _Class(SingleTurn):
    """An environment around a user's object; methods that it lacks are those of one turn."""

    def __init__(self, name: str, made: Any) -> None:
        self.name = name
        self._made = made
        self.max_turns = int(getattr(made, "max_turns", 10 if hasattr(made, "step") else 1))

    def check_row(self, row: Row) -> str:
        """The object's own answer, if it has one."""
        check = getattr(self._made, "check_row", None)
        return str(check(row) or "") if check else ""

    def start(self, row: Row) -> list[Message]:
        """The object's messages, or the row's."""
        start = getattr(self._made, "start", None)
        return _messages(start(row)) if start else super().start(row)

    def step(self, episode: Episode) -> list[Message] | None:
        """The object's reply."""
        step = getattr(self._made, "step", None)
        reply = step(episode) if step else None
        return None if reply is None else _messages(reply)

    def score(self, episode: Episode) -> Score:
        """The object's score."""
        return score_of(self._made.score(episode))


def _messages(value: Any) -> list[Message]:
    """A list of messages from what a user's method returned: messages, dicts or one text.

    Raises TypeError for anything else, ConfigError for a dict that is no message.
    """
    if isinstance(value, str):
        return [Message("user", value)]
    messages = []
    for place, entry in enumerate(value):
        if isinstance(entry, Mapping):
            entry = read_message(entry, "returned messages", f"[{place}]")
        if not isinstance(entry, Message) or not isinstance(entry.content, str):
            raise TypeError(f"a message of type {type(entry).__name__}")
        if entry.role not in ROLES:
            raise TypeError(f"a message of role {entry.role!r}; there are {', '.join(ROLES)}")
        messages.append(entry)
    if not messages:
        raise TypeError("no messages; return None to end an episode")
    return messages
