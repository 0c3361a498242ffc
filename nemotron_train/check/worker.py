"""One rank of a check: builds the same trainer as `pretrain`, trains, and records the results.

Run as `python -m nemotron_train.check.worker TASK.json`; `check.ranks` starts one process a rank.
A task names the configuration file, what to record, and the output folder. Rank 0 writes its arrays
to `rank_0.npz` and everything else to `rank_0.json`, and so on. Does not own: any comparison.
"""

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemotron_train.check.compare import Shard
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.json_text import json_text
from nemotron_train.data.batches import Batch, BatchSource
from nemotron_train.data.blend import DataState
from nemotron_train.data.open import open_data
from nemotron_train.plan.derive import derive
from nemotron_train.platform import device
from nemotron_train.platform.terminal import open_console
from nemotron_train.run_folder.metric_groups import is_timing


def main(task_path: str) -> None:
    """Run the task in the file `task_path` on this rank (RANK, WORLD_SIZE from the environment)."""
    task = json.loads(Path(task_path).read_text())
    config = compose_config([], Path(task["config"]))
    derived = derive(config, int(os.environ["WORLD_SIZE"]))
    # `check.ranks` hides the GPUs: a check runs on CPU cores, where no package or switch counts.
    platform = device.prepare(config.train.threads)
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.train.trainer import Trainer

    # All processes start with the same seeds, so state missing from the checkpoint becomes visible.
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % 2**32)
    train_data, validation_data = open_data(config, lambda text: None)
    batches: Any = RecordedBatches(train_data)
    groups = process_groups.start(config.parallel, platform.backend)
    trainer = Trainer(
        config,
        derived,
        platform,
        groups,
        batches,
        validation_data,
        Path(task["run_folder"]),
        open_console(),
    )
    record = Record(Path(task["output"]), int(os.environ["RANK"]))
    if task["kind"] == "layout":
        record_layout(trainer, batches, record, task["steps"])
    elif task["kind"] == "precision":
        record_formats(trainer, record, task["starts"])
    else:
        record_training(trainer, batches, record)
    record.write()
    process_groups.stop()


class RecordedBatches:
    """Wraps a BatchSource and records the samples of every batch of this rank.

    taken: for each batch, {"samples": sample id -> digest of its tokens}.
    """

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self.taken: list[dict[str, Any]] = []

    def take(
        self, state: DataState, num_sequences: int, rank_slice: tuple[int, int] | None = None
    ) -> tuple[Batch, DataState]:
        """As `BatchSource.take`, and record the samples."""
        batch, after = self._source.take(state, num_sequences, rank_slice)
        digest = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in batch.tokens_BS]
        samples = zip(batch.sample_ids_B.tolist(), digest, strict=True)
        self.taken.append({"samples": dict(samples)})
        return batch, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class Record:
    """The record of one rank: shards by kind, and JSON values by name."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self.rank = folder, rank
        self._arrays: dict[str, np.ndarray] = {}
        self._index: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}

    def add(self, kind: str, shards: list[Shard]) -> None:
        """Copy `shards` into the record under `kind`."""
        for shard in shards:
            array = f"a{len(self._arrays)}"
            self._arrays[array] = shard.values.copy()
            location = {"name": shard.name, "shape": shard.global_shape, "offset": shard.offset}
            self._index.append({"kind": kind, "array": array} | location)

    def write(self) -> None:
        """Write `rank_N.npz` and `rank_N.json`."""
        arrays: Any = self._arrays
        np.savez(self._folder / f"rank_{self.rank}.npz", **arrays)
        described = {"shards": self._index, "values": self.values}
        (self._folder / f"rank_{self.rank}.json").write_text(json_text(described))


def record_layout(trainer: Any, batches: RecordedBatches, record: Record, steps: int) -> None:
    """Train `steps` steps. Record the initial and final weights, the output fingerprints and
    gradients of the first step, and the losses of every step."""
    from nemotron_train.check import state

    models = trainer.chunks
    metadata = state.model_metadata(trainer.groups)
    record.add("initial", state.weight_shards(models, metadata))
    trace = state.Trace(
        [model.module for model in models], trainer.groups, trainer.config.parallel.sequence
    )
    trainer.train_step.precision = GradientsReady(
        trainer.train_step.precision,
        lambda: record.add("gradient", state.gradient_shards(models, metadata)),
    )
    progress, losses = trainer.resume(), []
    for step in range(steps):
        result = trainer.train_step(progress)
        progress = result.progress
        losses.append(_plain(result.metrics))
        if step == 0:
            record.values["trace"] = {path: sums.tolist() for path, sums in trace.sums.items()}
    record.add("final", state.weight_shards(models, metadata))
    record.values |= {"losses": losses, "batches": batches.taken}


class GradientsReady:
    """Wraps the trainer's precision control to call `callback` once, when the gradients of the
    first step are complete."""

    def __init__(self, precision: Any, callback: Any) -> None:
        self._precision, self._callback = precision, callback

    def gradients_ready(self, model: Any) -> None:
        """Called by the trainer when all gradients of a step are complete."""
        self._precision.gradients_ready(model)
        callback = self._callback
        self._callback = None  # only once
        if callback is not None:
            callback()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._precision, name)


def record_formats(trainer: Any, record: Record, starts: list[int]) -> None:
    """Record the formats of every linear of this rank in each phase, and the dtypes of all weights.

    starts: first token of each phase. A linear that cannot quantize has a dtype only.
    """
    from nemotron_train.check import state

    record.values["weights"] = state.weight_dtypes(trainer.chunks)
    record.values["formats"] = []
    for start in starts:
        trainer.precision.before_step(0, start)
        attached = trainer.precision.attached()
        record.values["formats"].append(
            {linear: asdict(entry) for linear, entry in attached.items()}
        )


class Rows(list[dict[str, Any]]):
    """Collects the lines of metrics.jsonl in memory; replaces the metrics writer."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line without its timings, which differ between runs."""
        self.append({name: value for name, value in metrics.items() if not is_timing(name)})

    def rewind(self, step: int) -> None:
        """Raises RuntimeError: the guard must not roll back during a check."""
        raise RuntimeError(f"the guard went back to step {step} in a check")


def record_training(trainer: Any, batches: RecordedBatches, record: Record) -> None:
    """Train to the end or to train.stop_after_steps, and record what a resumed run must reproduce.

    Starts from the newest checkpoint in the run folder, or from step 0. Rank 0 also records digests
    of the last checkpoint.
    """
    from nemotron_train.check import state

    trainer.run_folder.mkdir(parents=True, exist_ok=True)
    rows: Any = Rows()
    progress, _ = trainer.fit(trainer.resume(), rows, time.monotonic())
    groups = trainer.optimizer.param_groups
    record.values |= {
        "metrics": rows,
        "batches": batches.taken,
        "data cursor": progress.data.to_dict(),
        "schedule": [[group["lr"], group["weight_decay"]] for group in groups],
        "random states": state.random_digests(),
        "stochastic rounding": {"seed": trainer.config.train.seed}
        | {"step": getattr(trainer.precision, "clock", None) and trainer.precision.clock.step},
    }
    if record.rank == 0:
        record.values["checkpoint"] = state.saved_digests(trainer.folder, progress.step)


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """The scalar metrics."""
    return {
        name: value.item() if isinstance(value, torch.Tensor) else float(value)
        for name, value in metrics.items()
        if not (isinstance(value, torch.Tensor) and value.ndim)
    }


if __name__ == "__main__":
    main(sys.argv[-1])
