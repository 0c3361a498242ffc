"""The platform prepared before a test module imports Megatron-Core; what a run folder holds."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from nemotron_train.platform import device

device.prepare()


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict]]:
    """Reads the lines of a run folder's metrics.jsonl, but the times."""
    return _metrics


@pytest.fixture(scope="session")
def weights() -> Callable[[Path, int], dict[str, object]]:
    """Reads what a run folder's checkpoint of a step holds."""
    return _weights


def _metrics(folder: Path) -> list[dict]:
    """All lines but the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "step_seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def _weights(folder: Path, step: int) -> dict[str, object]:
    """Every saved tensor (its bytes) and every other saved value, and the data's cursor.

    The values are compared, not their pickles, which also tell which equal strings were one
    object: a loaded state differs there from one that was never saved.
    """
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    saved: dict[str, object] = {"progress": (checkpoint / "progress.json").read_text()}
    for index, place in FileSystemReader(checkpoint).read_metadata().storage_data.items():
        with open(checkpoint / place.relative_path, "rb") as file:
            file.seek(place.offset)
            content: object = file.read(place.length)
        if index.offset is None:
            content = torch.load(io.BytesIO(content), weights_only=True)
        saved[f"{index.fqn} {index.offset}"] = content
    return saved
