"""One rank of a check: builds the session that `pretrain` builds, trains it, records what it saw.

Run as `python -m nemotron_train.check.worker TASK.json`; `check.launch` starts one process a rank.
A task names the configuration's file, what to record, and the folder that the record goes to:
`rank_0.npz` with the arrays, `rank_0.json` with the rest. Does not own any comparison.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from nemotron_train.check.compare import Shard
from nemotron_train.compose import compose_config
from nemotron_train.config.derive import derive
from nemotron_train.data.batches import Batch, BatchSource
from nemotron_train.data.blend import DataState
from nemotron_train.platform import device
from nemotron_train.run import open_data


def main(task_path: str) -> None:
    """Do the task on this rank."""
    task = json.loads(Path(task_path).read_text())
    config = compose_config([], Path(task["config"]))
    derived = derive(config, int(os.environ["WORLD_SIZE"]))
    platform = device.prepare(config.train.threads)
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.train.session import Session

    train_data, validation_data = open_data(config, lambda text: None)
    batches: Any = RecordedBatches(train_data)
    groups = process_groups.start(config.parallel, platform.backend)
    session = Session(
        config,
        derived,
        platform,
        groups,
        batches,
        validation_data,
        Path(task["run_folder"]),
        Console(),
    )
    record = Record(Path(task["output"]), int(os.environ["RANK"]))
    record_layout(session, batches, record, task["steps"])
    record.write()
    process_groups.stop()


class RecordedBatches:
    """The run's batches, and which samples this rank was given."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self.taken: list[dict[str, Any]] = []

    def take(
        self, state: DataState, num_sequences: int, rank_slice: tuple[int, int] | None = None
    ) -> tuple[Batch, DataState]:
        batch, after = self._source.take(state, num_sequences, rank_slice)
        digest = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in batch.tokens_BS]
        samples = zip(batch.sample_ids_B.tolist(), digest, strict=True)
        self.taken.append({"samples": dict(samples)})
        return batch, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class Record:
    """What one rank saw: shards by kind, and plain values."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._arrays: dict[str, np.ndarray] = {}
        self._index: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}

    def add(self, kind: str, shards: list[Shard]) -> None:
        for shard in shards:
            array = f"a{len(self._arrays)}"
            self._arrays[array] = shard.values.copy()
            place = {"name": shard.name, "shape": shard.global_shape, "offset": shard.offset}
            self._index.append({"kind": kind, "array": array} | place)

    def write(self) -> None:
        arrays: Any = self._arrays
        np.savez(self._folder / f"rank_{self._rank}.npz", **arrays)
        described = {"shards": self._index, "values": self.values}
        (self._folder / f"rank_{self._rank}.json").write_text(json.dumps(described))


def _models(session: Any) -> list[Any]:
    return session.model if isinstance(session.model, list) else [session.model]


def record_layout(session: Any, batches: RecordedBatches, record: Record, steps: int) -> None:
    """Initial weights, the first step's module outputs and gradients, every step's losses, and the
    weights in the end."""
    from nemotron_train.check import state

    models = _models(session)
    metadata = state.model_metadata(session.groups)
    record.add("initial", state.weight_shards(models, metadata))
    trace = state.Trace(
        [model.module for model in models], session.groups, session.config.parallel.sequence
    )
    session.trainer.precision = GradientsReady(
        session.trainer.precision,
        lambda: record.add("gradient", state.gradient_shards(models, metadata)),
    )
    progress, losses = session.resume(), []
    for step in range(steps):
        result = session.trainer(progress)
        progress = result.progress
        losses.append(_plain(result.metrics))
        if step == 0:
            record.values["trace"] = {path: sums.tolist() for path, sums in trace.sums.items()}
    record.add("final", state.weight_shards(models, metadata))
    record.values |= {"losses": losses, "batches": batches.taken}


class GradientsReady:
    """The session's precision control, which the trainer tells when the gradients are complete; the
    first time, `then` is told too."""

    def __init__(self, precision: Any, then: Any) -> None:
        self._precision, self._then = precision, then

    def gradients_ready(self, model: Any) -> None:
        self._precision.gradients_ready(model)
        then, self._then = self._then, None
        if then is not None:
            then()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._precision, name)


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        name: value.item() if isinstance(value, torch.Tensor) else float(value)
        for name, value in metrics.items()
    }


if __name__ == "__main__":
    main(sys.argv[-1])
