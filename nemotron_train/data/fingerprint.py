"""The description of a run's data in a checkpoint, and a message about what has changed since.

Owns: the description stored in every checkpoint (`data.json`), and its comparison. Does not own:
the digest in the data state, which detects the same changes but does not name them (`blend`). No
direct use of NumPy or torch.

    sequence_length, seed, tokenizer (SHA-256)
    phases: from_tokens, blend: path, weight, data (the key of the folder's shards)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_train.config.schema import DataConfig, DataPhase
from nemotron_train.data.packed import PackedSource
from nemotron_train.data.tokenize import FILE_NAME as TOKENIZER_FILE
from nemotron_train.data.windows import WindowedSource
from nemotron_train.platform.files import file_sha256

REMEDY = (
    "put it back, add another phase to data.phases instead (from a token count not reached yet), "
    "or start a new run"
)


def describe(
    config: DataConfig,
    phases: Sequence[DataPhase],
    sources: Mapping[str, WindowedSource | PackedSource],
    sequence_length: int,
    seed: int,
) -> dict[str, Any]:
    """The description of the data, as JSON values. `sources`: by path."""
    tokenizer = Path(config.tokenizer) / TOKENIZER_FILE
    return {
        "sequence_length": sequence_length,
        "seed": seed,
        "tokenizer": file_sha256(tokenizer) if tokenizer.is_file() else "",
        "phases": [
            {
                "from_tokens": phase.from_tokens,
                "blend": [
                    {"path": e.path, "weight": e.weight, "data": sources[e.path].key}
                    for e in phase.blend
                ],
            }
            for phase in phases
        ],
    }


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any], phase: int) -> str:
    """A message about the first change that affects a run in `phase`, naming the knob; "" if none.

    Later phases may change. Paths may change too: a moved folder holds the same data.
    """
    for name in ("sequence_length", "seed"):
        if before[name] != now[name]:
            return f"train.{name} was {before[name]}, now {now[name]}"
    if before["tokenizer"] != now["tokenizer"]:
        return f"data.tokenizer was {_short(before)}, now {_short(now)} (SHA-256)"
    for number, old in enumerate(before["phases"][: phase + 1]):
        knob = f"data.phases[{number}]"
        if number >= len(now["phases"]):
            return f"{knob} is gone"
        new = now["phases"][number]
        if old["from_tokens"] != new["from_tokens"]:
            return f"{knob}.from_tokens was {old['from_tokens']}, now {new['from_tokens']}"
        change = _changed_blend(old["blend"], new["blend"])
        if change:
            return f"{knob}.blend: {change}"
    return ""


def _changed_blend(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str:
    keys = [entry["data"] for entry in new]
    paths = [entry["path"] for entry in new]
    for entry in old:
        if entry["data"] in keys:
            continue
        if entry["path"] in paths:
            new_key = new[paths.index(entry["path"])]["data"]
            return (
                f"{entry['path']} holds other tokens than before (checksum {entry['data']}, now "
                f"{new_key})"
            )
        return f"{entry['path']} is gone"
    added = [entry for entry in new if entry["data"] not in [e["data"] for e in old]]
    if added:
        return f"{added[0]['path']} is new"
    if [entry["data"] for entry in old] != keys:
        return f"the order was {', '.join(e['path'] for e in old)}, now {', '.join(paths)}"
    for before, now in zip(old, new, strict=True):
        if before["weight"] != now["weight"]:
            return f"the weight of {before['path']} was {before['weight']}, now {now['weight']}"
    return ""


def _short(description: Mapping[str, Any]) -> str:
    return description["tokenizer"][:16]
