"""`plan --why KNOB`: everything that sets a knob, in order. No torch.

Owns: tracing one knob through the schema's default, the recipes, a stored configuration and the
command line. Does not own: how these layers are merged (`compose`). The last printed line is the
merged value that a run would use.
"""

import dataclasses
import enum
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from nemotron_train.compose.compose import Layer, compose_config, layers, nearest
from nemotron_train.config import schema
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.knobs import to_plain
from nemotron_train.config.schema import Config
from nemotron_train.report.plan.diff import as_text, flatten

_ABSENT = object()


@dataclass(frozen=True)
class Writer:
    """One place that sets a knob. value: as text, as written there."""

    source: str
    value: str


@dataclass(frozen=True)
class Provenance:
    """Where a knob's value comes from. writers: from the schema's default to the last override;
    value: the final value."""

    knob: str
    writers: list[Writer]
    value: str


def explain(knob: str, overrides: Sequence[str], config_file: Path | None = None) -> Provenance:
    """What sets `knob`, which may be a section of the configuration such as `model.moe`. Raises
    ConfigError for an unknown knob, naming the closest one, and if `compose_config` does."""
    config = to_plain(compose_config(overrides, config_file))
    value = _at(config, knob)
    if value is _ABSENT:
        names = _all_names(config)
        raise ConfigError(f"--why {knob}: there is no such knob{nearest(knob, names)}")
    writers = [_default(knob)]
    for layer in layers(overrides, config_file):
        writers += _writers_in(layer, knob)
    return Provenance(knob, [w for w in writers if w is not None], _text(value))


def print_why(provenance: Provenance, console: Console) -> None:
    """Prints one line per writer, then the final value."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", style="dim")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for number, writer in enumerate(provenance.writers, start=1):
        last = number == len(provenance.writers)
        cells = (str(number), writer.source, writer.value)
        table.add_row(*cells, style="bold" if last else None)
    console.print(table)
    console.print(f"{provenance.knob} = {provenance.value}", soft_wrap=True)


def _writers_in(layer: Layer, knob: str) -> list[Writer]:
    """The writers of a knob in one layer: a replaced section, a value, both or none."""
    writers = []
    replaced = layer.replaces and (knob == layer.replaces or knob.startswith(layer.replaces + "."))
    if replaced:
        writers.append(
            Writer(_short_path(layer.source), f"all of {layer.replaces} anew, from defaults")
        )
    value = _at(layer.tree, knob)
    if value is not _ABSENT:
        writers.append(Writer(_short_path(layer.source), _text(value)))
    return writers


def _default(knob: str) -> Writer | None:
    """The schema's default; None for an entry of a dict or list, which the schema does not name."""
    kind: Any = Config
    owner, default = "", _ABSENT
    for part in knob.split("."):
        if dataclasses.is_dataclass(kind):
            fields = {field.name: field for field in dataclasses.fields(kind)}
            if part not in fields:
                return None
            owner, field = f"{getattr(kind, '__name__', '')}.{part}", fields[part]
            hint = typing.get_type_hints(kind)[part]
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            kind = hint
        elif typing.get_origin(kind) in (dict, list):
            kind, default = typing.get_args(kind)[-1], _ABSENT
        else:
            return None
    if default is _ABSENT:
        return None
    path = Path(inspect.getfile(schema))
    plain = "(must be set)" if default == MISSING else _text(to_plain(default))
    return Writer(f"{_short_path(str(path))} {owner}", plain)


def _at(tree: Any, knob: str) -> Any:
    """The value of a dotted knob in a plain tree; _ABSENT if the tree does not set it."""
    for part in knob.split("."):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return _ABSENT
    return tree


def _all_names(config: Any) -> list[str]:
    """Every dotted knob and every dotted section."""
    names: dict[str, None] = {}
    for knob in flatten(config):
        parts = knob.split(".")
        names |= dict.fromkeys(".".join(parts[: n + 1]) for n in range(len(parts)))
    return list(names)


def _text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.name
    if isinstance(value, Mapping | list):
        import yaml

        return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
    return as_text(value)


def _short_path(source: str) -> str:
    """The source with its file path relative to the working directory, if it lies below it."""
    path = Path(source.partition(" ")[0])
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return source.replace(f"{Path.cwd()}/", "", 1)
    return source
