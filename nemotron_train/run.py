"""`pretrain`: builds all objects of a run from its configuration, and runs the training.

This module is the composition root: objects are created here and passed on as arguments. There are
no globals and no registries.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console

from nemotron_train.config.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    ConfigError,
    CrashLoop,
    RendezvousFailed,
    TrainingFailed,
)
from nemotron_train.config.schema import Config
from nemotron_train.config.visible import one_line
from nemotron_train.data.batches import BatchSource
from nemotron_train.data.open import open_data
from nemotron_train.plan.derive import Derived, derive
from nemotron_train.plan.precision.record import change
from nemotron_train.plan.precision.text import plan_text
from nemotron_train.platform.runtime import Runtime, start_runtime
from nemotron_train.platform.terminal import open_console
from nemotron_train.report.plot.loss import plot_loss
from nemotron_train.report.plot.precision import plot_precision
from nemotron_train.report.plot.reward import plot_reward
from nemotron_train.report.runs.policy import closing_line
from nemotron_train.report.runs.read import read_run
from nemotron_train.run_folder import starts
from nemotron_train.run_folder.folder import RunFolder, open_run_folder, run_path
from nemotron_train.run_folder.lineage import Record, brief
from nemotron_train.run_folder.metrics import MetricsWriter, open_sinks
from nemotron_train.run_folder.progress import Progress
from nemotron_train.train.guard.watchdog import collective_timeout


def pretrain(
    config: Config, policy: Callable[[Any], AbstractContextManager[Any]] | None = None
) -> int:
    """Start or resume the run that `config` describes. Returns the exit code of the process.

    policy: gives the `Trainer` another supply of batches, while its context is open. Raises
    ConfigError if the configuration, the data or the run folder is not valid.
    """
    started = time.monotonic()
    if config.grpo.steps and policy is None:
        raise ConfigError(
            f"grpo.steps={config.grpo.steps}: {run_path(config)} trains on rollouts; give its "
            "words to `posttrain grpo`, or grpo.steps=0 for a branch that trains on data"
        )
    derived = derive(config, int(os.environ.get("WORLD_SIZE", "1")))
    console = open_console(quiet=os.environ.get("RANK", "0") != "0")

    def show(line: str) -> None:
        console.print(line, soft_wrap=True)

    runtime = start_runtime(config, derived.plan, config.train.threads, console.print, show)
    train_data, validation_data = open_data(config, console.print)
    try:
        groups = runtime.start_ranks(
            config.parallel, config.train.rendezvous_seconds, collective_timeout(config.guard)
        )
    except RendezvousFailed as failure:
        print("nemotron-train:", one_line(failure), file=sys.stderr)
        return failure.exit_code
    folder = None
    try:
        folder, parent = open_folder(config, derived, runtime, train_data, console)
        with starts.recorded(folder.path if folder else None) as end:
            from nemotron_train.train.trainer import Trainer

            trainer = Trainer(
                config,
                derived,
                runtime.platform,
                groups,
                train_data,
                validation_data,
                run_path(config),
                console,
                native=runtime.backend.native,
                check_held=folder.check_held if folder is not None else lambda: None,
            )
            with policy(trainer) if policy else nullcontext():
                end["ended"] = train(trainer, folder, parent, started)
        return EXIT_STOPPED if end["ended"] == "stopped" else EXIT_DONE
    except TrainingFailed as failure:
        open_console(stderr=True, quiet=console.quiet).print(
            f"nemotron-train: {failure}", soft_wrap=True
        )
        return failure.exit_code
    finally:
        if folder is not None:
            folder.close()
        runtime.stop_ranks()


def open_folder(
    config: Config,
    derived: Derived,
    runtime: Runtime,
    train_data: BatchSource,
    console: Console,
) -> tuple[RunFolder | None, Record | None]:
    """Open the run folder, on the first rank. COLLECTIVE.

    Returns the run folder and, for a new branch, the record of its parent; (None, None) on all
    other ranks. Raises ConfigError or CrashLoop on every rank if the first rank refuses the start.
    """
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.run_folder.branch import check_branch

    folder: RunFolder | None = None
    parent: Record | None = None
    problem, crash_loop = "", ""
    try:
        if runtime.is_first_rank:
            try:
                if config.branch:
                    parent = check_branch(config, derived.plan, train_data)
                machine = machine_record(runtime, derived)
                text = plan_text(derived.plan)
                folder = open_run_folder(config, derived, text, machine=machine, say=console.print)
                if parent is not None:
                    folder.record_branch(parent)
                crash_loop = starts.begin(folder.path, config.guard.crash_loop_starts)
            except ConfigError as error:
                problem = str(error)
        process_groups.raise_together(problem)
        process_groups.raise_together(crash_loop, CrashLoop)
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    return folder, parent


def machine_record(runtime: Runtime, derived: Derived) -> dict[str, Any]:
    """Device, number of ranks, kernels and switches, for environment.json (docs/metrics.md)."""
    platform, backend = runtime.platform, runtime.backend
    switches = {name: value for name, value in vars(platform.switches).items() if name != "text"}
    block_formats = "native" if backend.native else "emulated" if backend.text else "none"
    return {
        "device": platform.device,
        "device_name": platform.device_name,
        "ranks": derived.num_ranks,
        "transformer_engine": platform.transformer_engine,
        "mamba_kernels": platform.mamba_kernels,
        "block_formats": block_formats,
        "switches": switches,
        "unusable_packages": dict(runtime.unusable),
    }


def train(
    trainer: Any, folder: RunFolder | None, parent: Record | None, started: float
) -> Literal["done", "stopped"]:
    """Train from the newest checkpoint on; return whether the run is done or was stopped.

    trainer: a `Trainer` (its module can only be imported after `start_runtime`). started:
    `time.monotonic()` at the start of the process.
    """
    config, console = trainer.config, trainer.console
    progress = trainer.resume()
    if progress.tokens >= config.train.total_tokens:
        console.print(f"{run_path(config)} is finished: {progress.tokens:,} tokens; nothing to do")
        return "done"
    writer = open_writer(config, folder, progress.step, console) if folder else None
    if folder is not None and writer is not None:
        record_start(folder, writer, trainer, progress, parent)
    progress, summary = trainer.fit(progress, writer, started)
    if folder is not None and writer is not None:
        writer.close()
        finish(folder, summary, console, on_rollouts=config.grpo.steps > 0)
    return "done" if summary["finished"] else "stopped"


def record_start(
    folder: RunFolder,
    writer: MetricsWriter,
    trainer: Any,
    progress: Progress,
    parent: Record | None,
) -> None:
    """Record a new branch, added data phases or a switch of the precision plan.

    Each gets a line on the terminal, a line in metrics.jsonl and an entry in lineage.json.
    parent: the entry `branched_from` of a new branch, else None.
    """
    config, console = trainer.config, trainer.console
    plan = trainer.plan_record
    event: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
    before = trainer.plan_before or folder.plan_before
    if parent is not None:
        before = parent["precision"]["before"]
        changed_knobs = [f"; {k} {old!r} -> {new!r}" for k, (old, new) in parent["changed"].items()]
        plans = {"precision_before": before, "precision_after": brief(plan)}
        origin = f"at step {parent['step']} of {parent['run']}"
        if config.weights_only:
            origin = f"anew with the weights of step {parent['step']} of {parent['run']}"
        writer.write({"kind": "branch", **event, "branched_from": config.branch, **plans})
        console.print(
            f"{folder.path} begins {origin}; precision plan "
            f"{change(before, plan)}{''.join(changed_knobs)}",
            soft_wrap=True,
        )
    if parent is None and folder.adds_phases:
        folder.record_phases(progress.step, progress.tokens, config.data.phases)
        from_tokens = ", ".join(str(phase.from_tokens) for phase in config.data.phases)
        writer.write({"kind": "phases", **event, "from_tokens": from_tokens})
        console.print(f"data.phases: phases were added; they begin at {from_tokens} tokens")
    if parent is None and before is not None:
        folder.record_switch(progress.step, progress.tokens, before, plan, config.precision)
        plans = {"precision_before": brief(before), "precision_after": brief(plan)}
        writer.write({"kind": "switch", **event, **plans})
        console.print(
            f"precision plan switched at step {progress.step}: {change(before, plan)}",
            soft_wrap=True,
        )


def open_writer(
    config: Config, folder: RunFolder, resume_step: int, console: Console
) -> MetricsWriter:
    """Open metrics.jsonl and the sinks that the configuration enables.

    resume_step: step of the checkpoint that training continues from; 0 for a new run.
    """
    sinks = open_sinks(
        config.logging,
        folder.path,
        run_name=config.name,
        run_id=folder.run_id,
        config=asdict(config),
        resume_step=resume_step,
        say=console.print,
    )
    return MetricsWriter(folder.metrics, resume_step=resume_step, sinks=sinks, say=console.print)


def finish(
    folder: RunFolder, summary: dict[str, Any], console: Console, *, on_rollouts: bool
) -> None:
    """Write summary.json and the plots, and print the final lines. on_rollouts: whether the run
    trained on rollouts, so that its rewards are shown and not its loss."""
    folder.write_summary(summary)
    run = read_run(folder.path)
    draw, what = (plot_reward, "rewards") if on_rollouts else (plot_loss, "loss curve")
    picture = draw(folder.path, run)
    precision_plot = plot_precision(folder.path, run)
    if not summary["finished"]:
        console.print(
            f"stopped at step {summary['step']} ({summary['stop_reason']}); the same command goes "
            "on from there",
            soft_wrap=True,
        )
    elif on_rollouts:
        console.print(closing_line(run))
    else:
        console.print(
            f"validation loss {summary['validation_loss']:.3f} nats a token; the corpus's unigram "
            f"entropy is {summary['unigram_entropy']:.3f}",
        )
    console.print(f"{folder.path}: {what} in {picture.name}")
    if precision_plot is not None:
        console.print(f"precision telemetry in {precision_plot.name}")
