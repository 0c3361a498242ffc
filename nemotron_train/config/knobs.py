"""Comparison of two configurations, and the knobs that may change when a run is resumed.

Owns: the list of free knobs, the comparison of two configurations. Does not own: what a run does
about a difference (`run_folder`). No torch.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from nemotron_train.config.schema import Config

# Knobs that may differ between the processes of one run: its location, when it saves, validates and
# reports, the number of threads, and what computes the same numbers on a GPU up to rounding. A
# change of any other knob would change the training trajectory.
FREE_KNOBS = (
    "name",
    "folder",
    "resume",
    "switch_precision",
    "logging",
    "guard",
    "gpu",
    "train.threads",
    "train.rendezvous_seconds",
    "train.log_every_steps",
    "train.validate_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.async_save",
    "train.stop_after_steps",
    "train.stop_after_minutes",
    "train.recompute",
)

PHASES = "data.phases"


def changed_knobs(old: Config, new: Config) -> dict[str, list[Any]]:
    """Dotted knob -> [old value, new value], for every changed knob that can change the training
    trajectory. The precision plan is left out: `plan.precision.record` compares plans."""
    old = dataclasses.replace(old, branch=new.branch, precision=new.precision)
    changes = differences(to_plain(old), to_plain(new))
    return {knob: values for knob, values in changes.items() if not is_free(knob)}


def adds_phases(knob: str, old: Any, new: Any) -> bool:
    """Whether a change of `data.phases` only appends phases. The data module checks that none of
    the added phases has already begun, because it knows how far the run is."""
    return knob == PHASES and isinstance(old, list) and new[: len(old)] == old


def is_free(knob: str) -> bool:
    """Whether `knob` may change without changing the training trajectory."""
    return any(knob == free or knob.startswith(f"{free}.") for free in FREE_KNOBS)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Dotted knob -> [old value, new value], for every leaf where two trees of plain values differ.
    A leaf that one tree lacks has the value None."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes: dict[str, list[Any]] = {}
        for key in [*new, *(key for key in old if key not in new)]:
            name = f"{prefix}.{key}" if prefix else str(key)
            changes |= differences(old.get(key), new.get(key), name)
        return changes
    return {} if old == new else {prefix: [old, new]}


def to_plain(value: Any) -> Any:
    """Convert dataclasses, enums (to their names), paths and tuples to values that YAML and JSON
    can store."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [entry.name for entry in dataclasses.fields(value)]
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(to_plain(key)): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
