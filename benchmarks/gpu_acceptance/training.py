"""A trainer of a shape on random rows, for the stages that measure steps.

It is the Trainer of `pretrain`, with the packages, switches and guards of `start_runtime`. The rows
hold two documents, as the prediction of memory assumes (benchmarks/memory.py).
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu_acceptance.setting import Setting
from benchmarks.memory import PackedRows
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import Config
from nemotron_train.plan.derive import Derived, derive
from nemotron_train.platform.runtime import Runtime, start_runtime
from nemotron_train.platform.terminal import open_console


class _Rows(PackedRows):
    """Random rows as a source of batches."""

    description: dict[str, Any] = {}  # noqa: RUF012

    def state_at_start(self) -> None:
        """There is no state."""


class Steps:
    """A model that takes steps. losses: of the steps so far."""

    def __init__(self, setting: Setting, config: Config, runtime: Runtime, groups: Any) -> None:
        from nemotron_train.run_folder.progress import Progress
        from nemotron_train.train.trainer import Trainer

        self.config: Config = config
        self.derived: Derived = derive(config)
        self.losses: list[float] = []
        self.max_vio = 0.0  # of the last step: load of the fullest expert over the mean
        rows: Any = _Rows(config)
        self._trainer = Trainer(
            config,
            self.derived,
            runtime.platform,
            groups,
            rows,
            rows,
            setting.work / "steps",
            open_console(),
            native=runtime.backend.native,
        )
        self._progress = Progress(0, 0, rows.state_at_start())

    def take(self) -> float:
        """Take a step; returns its seconds, to the end of its work on the device."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = self._trainer.train_step(self._progress)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self._progress = result.progress
        self.losses.append(float(result.metrics["loss"]))
        self.max_vio = float(result.metrics.get("max_vio", 0.0))
        return seconds


def configuration(setting: Setting, shape: str, *more: str) -> Config:
    """The configuration of one of the setting's shapes."""
    return compose_config([*setting.sizes.shapes[shape], *more])


@contextmanager
def runtime_of(config: Config) -> Iterator[tuple[Runtime, Any]]:
    """The runtime and the process groups of a configuration, until the end of the block."""
    say = open_console().print
    runtime = start_runtime(config, derive(config).plan, config.train.threads, say, say)
    groups = runtime.start_ranks(config.parallel)
    try:
        yield runtime, groups
    finally:
        runtime.stop_ranks()


def free_memory() -> None:
    """Give back what models that are no longer referred to have used."""
    gc.collect()
    torch.cuda.empty_cache()
