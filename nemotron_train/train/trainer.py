"""The Trainer of one rank: builds the model, optimizer, data and checkpoints and connects them.

Owns: these objects, and the order of the hooks after a step. Does not own: what is built and what
is printed around the training (`run.py`). Import this module only after the environment that
Megatron-Core needs has been set up (`start_runtime`).
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from rich.console import Console

from nemotron_train.assemble.build import build_chunks, wrap_chunks
from nemotron_train.config.errors import ConfigError, TrainingFailed
from nemotron_train.config.schema import Config
from nemotron_train.data.batches import BatchSource
from nemotron_train.optim.build import build_optimizer
from nemotron_train.plan.derive import Derived
from nemotron_train.plan.precision.record import plan_record
from nemotron_train.platform.device import Platform, peak_flops, peak_memory_bytes
from nemotron_train.precision.attach import PrecisionControl
from nemotron_train.precision.native import NativePrecision
from nemotron_train.precision.telemetry import Telemetry
from nemotron_train.run_folder.branch import branch_checkpoint
from nemotron_train.run_folder.checkpoint_metadata import check_data, has_data, plan_of, progress_of
from nemotron_train.run_folder.lineage import is_recorded, refusal
from nemotron_train.run_folder.metrics import MetricsWriter
from nemotron_train.run_folder.progress import Progress
from nemotron_train.run_folder.starts import STOP_FILE
from nemotron_train.train.checkpoint.checkpoints import Checkpoints
from nemotron_train.train.evaluate import validation_losses
from nemotron_train.train.guard.guard import Guard
from nemotron_train.train.guard.roll_back import GuardedStep
from nemotron_train.train.guard.watchdog import Watchdog
from nemotron_train.train.hooks import Log, Save, TelemetryRecord, Validate
from nemotron_train.train.loop import Hook, fit
from nemotron_train.train.prefetch import Prefetched
from nemotron_train.train.progress_bar import ProgressDisplay
from nemotron_train.train.stop import StopOnRequest
from nemotron_train.train.supply import DataSupply
from nemotron_train.train.train_step import TrainStep


class Trainer:
    """This rank's model, optimizer, checkpoints and train step. Construction is COLLECTIVE.

    native: use native block-scaled formats instead of emulated ones. check_held: raises if this
    process may no longer write to the run folder.
    """

    def __init__(
        self,
        config: Config,
        derived: Derived,
        platform: Platform,
        groups: ProcessGroupCollection,
        train_data: BatchSource,
        validation_data: BatchSource,
        folder: Path,
        console: Console,
        native: bool = False,
        check_held: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.derived = derived
        self.platform = platform
        self.groups = groups
        self.train_data = train_data
        self.validation_data = validation_data
        self.console = console
        model_parallel_cuda_manual_seed(config.train.seed)
        cores = build_chunks(config, derived.plan, platform, groups, native)
        if platform.device != "cpu":
            cores = [core.to(platform.device) for core in cores]
        self.chunks = wrap_chunks(cores, config, groups)
        self.optimizer = build_optimizer(config, self.chunks, groups, platform)
        self.telemetry = None
        if config.precision.telemetry.every > 0:
            self.telemetry = Telemetry(
                config.precision.telemetry, derived.plan, derived.total_steps, platform.device
            )
        self.precision = (
            NativePrecision(cores, derived.plan)
            if native
            else PrecisionControl(cores, config, derived.plan, groups, self.telemetry)
        )
        self.guard = Guard(config.guard, platform.device)
        # On a CPU the thread would take a core from the computation.
        batches = train_data if platform.device == "cpu" else Prefetched(train_data)
        self.train_step = TrainStep(
            config,
            derived,
            self.chunks,
            self.optimizer,
            DataSupply(config, derived, batches, groups, platform.device),
            groups,
            platform.device,
            self.precision,
            self.guard,
        )
        self.run_folder = folder
        self.folder = folder / "checkpoints"
        self.plan_record = plan_record(derived.plan)
        # The precision plan of the loaded checkpoint, if it differs from this run's plan.
        self.plan_before: dict[str, Any] | None = None
        self.checkpoints = Checkpoints(
            self.folder,
            self.chunks,
            self.optimizer,
            groups,
            config,
            self.plan_record,
            train_data.description,
            check_held,
            console.print,
        )

    def resume(self) -> Progress:
        """Load the checkpoint to start from and return its progress. COLLECTIVE.

        Loads the run's newest undamaged checkpoint. If there is none, loads the checkpoint that
        `branch` names. Without either, returns the progress of a new run. Raises ConfigError if the
        checkpoint has another model, other data, or another precision plan that the configuration
        does not allow.
        """
        path, is_branch = self.checkpoints.latest(), False
        if path is None and self.config.branch:
            path, is_branch = branch_checkpoint(self.config.branch), True
        if path is None:
            return Progress(0, 0, self.train_data.state_at_start())
        weights_only = is_branch and self.config.weights_only
        starts_fresh_data = is_branch and (self.config.fresh_data or weights_only)
        if not starts_fresh_data:
            check_data(path, self.train_data.description)
        before = plan_of(path)
        if before["digest"] != self.plan_record["digest"]:
            step = progress_of(path).step
            allowed = self.config.switch_precision or is_recorded(
                self.run_folder, step, self.plan_record
            )
            if not (is_branch or allowed):
                raise ConfigError(refusal(path, before, self.plan_record, self.run_folder))
            self.plan_before = before
        progress = self._load(path, weights_only)
        if starts_fresh_data:
            progress = replace(progress, data=self.train_data.state_at_start())
        if weights_only:
            progress = replace(progress, step=0, tokens=0)
        self.console.print(f"{'branched' if is_branch else 'resumed'} from {path}")
        if is_branch:
            # The parent may later delete its checkpoint. With a copy, this run no longer needs it.
            self.checkpoints.save(progress)
        return progress

    def roll_back(self) -> tuple[Path, Progress] | None:
        """Load the newest undamaged checkpoint during a run; return its path and progress.

        None if the run has no checkpoint. COLLECTIVE.
        """
        path = self.checkpoints.latest()
        if path is None:
            return None
        return path, self._load(path)

    def _load(self, path: Path, weights_only: bool = False) -> Progress:
        progress = self.checkpoints.load(path, weights_only)
        self.precision.weights_changed()
        if not has_data(path):
            progress = replace(progress, data=self.train_data.state_at_start())
        return progress

    def validate(self) -> list[float]:
        """Mean validation loss of the main head and of each MTP depth. COLLECTIVE."""
        return validation_losses(
            self.config,
            self.derived,
            self.chunks,
            self.validation_data,
            self.groups,
            self.platform.device,
        )

    def _last_step(self, progress: Progress) -> int:
        """Number of the run's last step.

        It can differ from `derived.total_steps`: the step number of a branch includes the steps of
        its parent, which may have had another batch size.
        """
        tokens_left = max(0, self.config.train.total_tokens - progress.tokens)
        return progress.step + -(-tokens_left // self.derived.tokens_per_step)

    def fit(
        self, progress: Progress, writer: MetricsWriter | None, process_started: float
    ) -> tuple[Progress, dict[str, Any]]:
        """Train until the last step or a stop request; return progress and summary. COLLECTIVE.

        process_started: `time.monotonic()` at process start, for `train.stop_after_minutes`.
        """
        train, last_step = self.config.train, self._last_step(progress)
        if self.telemetry is not None:
            self.telemetry.last_step = last_step
        stop = StopOnRequest(
            train.stop_after_steps,
            train.stop_after_minutes,
            process_started,
            self.run_folder / STOP_FILE,
            self.platform.device,
        )
        started = time.perf_counter()
        guard = self.config.guard
        watchdog = Watchdog(
            self.run_folder, dist.get_rank(), 60 * guard.hang_minutes, 60 * guard.first_step_minutes
        )
        with (
            watchdog,
            ProgressDisplay(last_step, self.console, start_step=progress.step) as display,
        ):
            validate = Validate(
                self.validate, train.validate_every_steps, last_step, self.train_step.clock
            )
            log = Log(
                writer,
                display,
                every_steps=train.log_every_steps,
                also_every_steps=guard.health_every,
                last_step=last_step,
                tokens_per_step=self.derived.tokens_per_step,
                flops_per_token=self.derived.training_flops_per_token,
                peak_flops=peak_flops() * self.derived.num_ranks,
                clock=self.train_step.clock,
            )
            hooks: list[Hook] = [watchdog, validate, watchdog, log]
            if self.telemetry is not None:
                hooks.append(TelemetryRecord(self.telemetry, writer))
            save = Save(
                self.checkpoints,
                train.save_every_steps,
                last_step,
                train.async_save,
                display.message,
                self.train_step.clock,
            )
            step = GuardedStep(
                self.train_step, self.guard, self.roll_back, save.forget, writer, display.message
            )
            try:
                progress = fit(
                    step,
                    until=train.total_tokens,
                    progress=progress,
                    hooks=[*hooks, save, watchdog],
                    stop=stop,
                )
            except (TrainingFailed, ConfigError):  # on all ranks; a save in flight is good
                save.finish()
                raise
            save.save(progress)
        summary = {
            "step": progress.step,
            "tokens": progress.tokens,
            "finished": progress.tokens >= train.total_tokens,
            "stop_reason": stop.reason,
            "loss": log.latest.get("loss", math.nan),
            "validation_loss": validate.latest,
            "unigram_entropy": self.validation_data.unigram_entropy,
            "seconds": time.perf_counter() - started,
            "tokens_per_second": log.latest.get("tokens_per_second", math.nan),
            "peak_memory_bytes": peak_memory_bytes(),
            "parameters": self.derived.parameters,
        }
        return progress, summary
