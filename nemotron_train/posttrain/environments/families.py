"""The environments by name, and how one is built from its name. No torch.

Owns: the table of families, the settings that environments share. Does not own: processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_train.config.environments import Isolation
from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.environments.arithmetic import Arithmetic
from nemotron_train.posttrain.environments.family import Family
from nemotron_train.posttrain.environments.instructions import Instructions
from nemotron_train.posttrain.environments.mathematics import Mathematics
from nemotron_train.posttrain.environments.plug_in import load_plug_in
from nemotron_train.posttrain.environments.protocol import Environment, Message, Row
from nemotron_train.posttrain.environments.python_code import PythonCode
from nemotron_train.posttrain.environments.strings import Strings
from nemotron_train.posttrain.environments.structure import Structure
from nemotron_train.posttrain.environments.tools import Tools
from nemotron_train.posttrain.sandbox.sandbox import Sandbox


@dataclass(frozen=True)
class Settings:
    """What all environments of a run share. sandbox: how code of the model is isolated."""

    sandbox: Isolation = Isolation.namespaces


_FAMILIES: Mapping[str, Callable[[Settings], Family]] = {
    "arithmetic": lambda settings: Arithmetic(),
    "strings": lambda settings: Strings(),
    "instructions": lambda settings: Instructions(),
    "structure": lambda settings: Structure(),
    "tools": lambda settings: Tools(),
    "python_code": lambda settings: PythonCode(lambda: Sandbox(settings.sandbox)),
}
FAMILY_NAMES = tuple(_FAMILIES)
_WITHOUT_ROWS: Mapping[str, Callable[[Settings], Environment]] = {
    "mathematics": lambda settings: Mathematics(),
}
ENVIRONMENT_NAMES = (*FAMILY_NAMES, *_WITHOUT_ROWS)


def is_plug_in(name: str) -> bool:
    """Whether a name is a user's `module:name`."""
    return ":" in name


def check_name(name: str) -> None:
    """Raises ConfigError if there is no environment of this name. A plug-in is not imported."""
    if name not in ENVIRONMENT_NAMES and not is_plug_in(name):
        raise ConfigError(
            f"environment {name}: there are {', '.join(ENVIRONMENT_NAMES)}, and your own as "
            "module:name"
        )


def build_family(name: str, settings: Settings | None = None) -> Family:
    """A family, which makes rows. Raises ConfigError for another environment."""
    if name not in _FAMILIES:
        check_name(name)
        raise ConfigError(
            f"environment {name}: makes no rows of its own; give a file with rows=FILE.jsonl"
        )
    return _FAMILIES[name](settings or Settings())


def worked_solution(row: Row) -> list[Message] | None:
    """The turns that solve a generated row, with the thinking written out; None for other rows."""
    if row.environment not in _FAMILIES or "generated" not in row.metadata:
        return None
    try:
        return build_family(row.environment).solution(row)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
        return None  # a row of a file that only looks like a generated one


def build_environment(name: str, settings: Settings | None = None) -> Environment:
    """Any environment. A plug-in is imported here, so its place is a process that can be killed
    (`scoring`). Raises ConfigError if there is none or it cannot be loaded."""
    check_name(name)
    if is_plug_in(name):
        return load_plug_in(name)
    build: Any = _FAMILIES.get(name) or _WITHOUT_ROWS[name]
    return build(settings or Settings())
