"""The fields that the JSON files of a checkpoint must have, and their types.

Owns: the check before any verb reads such a file. Does not own: hashes (`integrity`), what the
fields mean (`checkpoint_metadata`). No torch.

The hashes show that a file is as it was written. The forger of a file may also write correct
hashes, so the readers can rely on a field only after this check.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.batches import DataState

TENSORS_FORMAT = "metadata.json"  # Megatron-Core's
REQUIRED = ("progress.json", "about.json", TENSORS_FORMAT)
OPTIONAL = ("precision.json", "data.json", "random.json")
# Data cursor of imported weights, which were not trained here: any data begins at its start.
NO_DATA = DataState(split="train", sequence_length=0, seed=0, fingerprint="")
MAX_BYTES = 2**30  # random.json holds some kilobytes for each rank


def check_json(name: str, content: bytes, step: int) -> None:
    """Raises ValueError with a message if `content` is not that of the file `name` of the
    checkpoint of `step`."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(value) is not dict:
        raise ValueError("it is no JSON object")
    _CHECKS[name](value, step)


def _progress(value: Mapping[str, Any], step: int) -> None:
    if _number(value, "step") != step:
        raise ValueError(f"step={value['step']} is not that of the folder")
    _number(value, "tokens")
    _typed(value, "model", dict)
    if value.get("data") == NO_DATA.to_dict():
        return
    try:
        state = DataState.from_dict(value.get("data"))
    except ConfigError as error:
        raise ValueError(str(error)) from None
    for name in ("sequence_length", "seed", "samples", "phase"):
        if abs(getattr(state, name)) >= 2**63:
            raise ValueError(f"data.{name} is too large")
    if state.split != "train" or sum(state.drawn.values()) != state.samples:
        raise ValueError("its data state contradicts itself")


def _about(value: Mapping[str, Any], step: int) -> None:
    if type(value.get("optimizer", False)) is not bool:
        raise ValueError(f"optimizer={value['optimizer']!r:.100} is not true or false")


def _tensors_format(value: Mapping[str, Any], step: int) -> None:
    kind, version = value.get("sharded_backend"), value.get("sharded_backend_version")
    if kind != "torch_dist" or version != 1:
        raise ValueError(f"the tensors' format is {kind!r:.100} {version!r:.100}, not torch_dist 1")


def _precision(value: Mapping[str, Any], step: int) -> None:
    _typed(value, "name", str)
    _typed(value, "digest", str)


def _data(value: Mapping[str, Any], step: int) -> None:
    _number(value, "sequence_length")
    _typed(value, "seed", int)
    _typed(value, "tokenizer", str)
    for phase in _objects(value, "phases"):
        _number(phase, "from_tokens")
        for entry in _objects(phase, "blend"):
            _typed(entry, "path", str)
            _typed(entry, "data", str)
            _typed(entry, "weight", int if type(entry.get("weight")) is int else float)


def _random(value: Mapping[str, Any], step: int) -> None:
    states = _objects(value, "states")
    ranks = _typed(value, "ranks", list)
    if not all(type(place) is int and 0 <= place < len(states) for place in ranks):
        raise ValueError("ranks does not name states")


_CHECKS: Mapping[str, Callable[[Mapping[str, Any], int], None]] = {
    "progress.json": _progress,
    "about.json": _about,
    TENSORS_FORMAT: _tensors_format,
    "precision.json": _precision,
    "data.json": _data,
    "random.json": _random,
}


def _typed(value: Mapping[str, Any], name: str, kind: type) -> Any:
    """The field `name`. Raises ValueError if it is missing or not exactly of this type."""
    if name not in value:
        raise ValueError(f"{name} is missing")
    if type(value[name]) is not kind:
        raise ValueError(f"{name} is {value[name]!r:.100}")
    return value[name]


def _number(value: Mapping[str, Any], name: str) -> int:
    number = _typed(value, name, int)
    if not 0 <= number < 2**63:
        raise ValueError(f"{name} is {number!r:.100}")
    return number


def _objects(value: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    items = _typed(value, name, list)
    if not all(type(item) is dict for item in items):
        raise ValueError(f"{name} is no list of objects")
    return items
