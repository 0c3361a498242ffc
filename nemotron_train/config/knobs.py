"""Which knobs may differ between the processes of one run, and which differ.

Owns: the list of free knobs, the comparison of two configurations. Does not own: what a run does
about a difference (`run_folder`, `branch`). No torch.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from nemotron_train.config.schema import Config

# Knobs that may differ between the processes of one run: where it lies, when it saves, looks and
# reports, how many threads it uses. Everything else would change the trajectory.
FREE_KNOBS = (
    "name",
    "folder",
    "resume",
    "switch_precision",
    "logging",
    "guard",
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
    """Dotted knob -> [old value, new value], for all that can change the trajectory but the
    precision plan (`plan.precision.record` tells two of them apart)."""
    old = dataclasses.replace(old, branch=new.branch, precision=new.precision)
    different = differences(to_plain(old), to_plain(new))
    return {knob: values for knob, values in different.items() if not is_free(knob)}


def adds_phases(knob: str, old: Any, new: Any) -> bool:
    """Whether a change of the blend only adds phases after those there were. That none of them
    should have begun already is the data's to say, which knows how far the run is."""
    return knob == PHASES and isinstance(old, list) and new[: len(old)] == old


def is_free(knob: str) -> bool:
    """Whether a change of `knob` leaves the trajectory alone."""
    return any(knob == free or knob.startswith(f"{free}.") for free in FREE_KNOBS)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Dotted knob -> [old value, new value], where two plain trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, list[Any]] = {}
        for key in [*new, *(key for key in old if key not in new)]:
            name = f"{prefix}.{key}" if prefix else str(key)
            found |= differences(old.get(key), new.get(key), name)
        return found
    return {} if old == new else {prefix: [old, new]}


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, paths and tuples as what YAML and JSON can hold."""
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
