"""Composition root: a configuration becomes objects, and training runs. Reads like a table of
contents; every object is passed, none is looked up.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from nemotron_train.config.errors import ConfigError, CrashLoop, TrainingFailed
from nemotron_train.config.schema import Config, DataKind
from nemotron_train.data.batches import BatchSource
from nemotron_train.plan.backend import Choice, choose
from nemotron_train.plan.derive import Derived, derive
from nemotron_train.plan.guards import Surroundings, enforce
from nemotron_train.plan.hardware import installed_versions
from nemotron_train.plan.precision.record import label, plan_record
from nemotron_train.plan.precision.resolve import plan_text
from nemotron_train.platform import device
from nemotron_train.report.plot.loss import plot_loss
from nemotron_train.report.plot.precision import plot_precision
from nemotron_train.run_folder import starts
from nemotron_train.run_folder.folder import RunFolder, open_run_folder, run_path
from nemotron_train.run_folder.lineage import Record, brief
from nemotron_train.run_folder.metrics import MetricsWriter, open_sinks
from nemotron_train.run_folder.progress import Progress
from nemotron_train.train.guard.watchdog import collective_timeout

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 1, 3


def pretrain(config: Config) -> int:
    """Train, or go on training, the run that `config` describes. Returns the exit code.

    Raises ConfigError where the configuration, the data or the run folder is wrong.
    """
    started = time.monotonic()
    derived = derive(config, int(os.environ.get("WORLD_SIZE", "1")))
    platform = device.prepare(config.train.threads)
    surroundings = Surroundings(
        device.hardware(platform), installed_versions(), dict(os.environ), native=False
    )
    backend = choose(config, surroundings)
    os.environ.update(backend.environment)  # before Transformer Engine is imported, which reads it
    # Megatron-Core can be imported only now that the platform is prepared.
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.run_folder.branch import check_branch
    from nemotron_train.train.trainer import Session

    is_first_rank = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not is_first_rank)
    console.print(platform.describe(), highlight=False)
    if backend.text:
        console.print(backend.text, highlight=False, soft_wrap=True)
    enforce(config, replace(surroundings, native=backend.native), console.print)
    train_data, validation_data = open_data(config, console.print)
    try:
        groups = process_groups.start(
            config.parallel,
            platform.backend,
            config.train.rendezvous_seconds,
            collective_timeout(config.guard),
        )
    except process_groups.RendezvousFailed as failure:
        print(f"nemotron-train: {failure}", file=sys.stderr)
        return EXIT_FAILED
    folder, parent, problem, crash_loop = None, None, "", ""
    try:
        if is_first_rank:
            try:
                parent = check_branch(config, train_data) if config.branch else None
                machine = machine_record(platform, derived, backend)
                folder = open_run_folder(
                    config, derived, plan_text(config), machine=machine, say=console.print
                )
                if parent is not None:
                    folder.record_branch(parent)
                crash_loop = starts.begin(folder.path, config.guard.crash_loop_starts)
            except ConfigError as error:
                problem = str(error)
        process_groups.raise_together(problem)
        process_groups.raise_together(crash_loop, CrashLoop)
        with starts.recorded(folder.path if folder else None) as end:
            session = Session(
                config,
                derived,
                platform,
                groups,
                train_data,
                validation_data,
                run_path(config),
                console,
                native=backend.native,
                check_held=folder.check_held if folder is not None else lambda: None,
            )
            end["ended"] = train(session, config, folder, parent, console, started)
        return EXIT_STOPPED if end["ended"] == "stopped" else EXIT_DONE
    except TrainingFailed as failure:
        Console(stderr=True, quiet=not is_first_rank).print(
            f"nemotron-train: {failure}", highlight=False, markup=False, soft_wrap=True
        )
        return failure.exit_code
    finally:
        if folder is not None:
            folder.close()
        process_groups.stop()


def machine_record(platform: device.Platform, derived: Derived, backend: Choice) -> dict[str, Any]:
    """What computes, for environment.json (docs/metrics.md)."""
    formats = "native" if backend.native else "emulated" if backend.text else "none"
    return {
        "device": platform.device,
        "device_name": platform.device_name,
        "ranks": derived.num_ranks,
        "transformer_engine": platform.transformer_engine,
        "mamba_kernels": platform.mamba_kernels,
        "block_formats": formats,
    }


def train(
    session: Any,
    config: Config,
    folder: RunFolder | None,
    parent: Record | None,
    console: Console,
    started: float,
) -> str:
    """Train from the newest checkpoint on; returns whether the run is «done» or was «stopped»."""
    progress = session.resume()
    if progress.tokens >= config.train.total_tokens:
        console.print(f"{run_path(config)} is finished: {progress.tokens:,} tokens; nothing to do")
        return "done"
    writer = open_writer(config, folder, progress.step, console) if folder else None
    if folder is not None and writer is not None:
        record_start(folder, writer, config, progress, parent, session.plan_before, console)
    progress, summary = session.fit(progress, writer, started)
    if folder is not None and writer is not None:
        writer.close()
        finish(folder, summary, console)
    return "done" if summary["finished"] else "stopped"


def record_start(
    folder: RunFolder,
    writer: MetricsWriter,
    config: Config,
    progress: Progress,
    parent: Record | None,
    plan_before: Record | None,
    console: Console,
) -> None:
    """Tells of a branch (`parent`, as lineage.json has it) or of another precision plan than
    before: one line on the terminal, one in metrics.jsonl, and lineage.json."""
    plan: Record = plan_record(config)
    event: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
    before = plan_before or folder.plan_before
    if parent is not None:
        before = parent["precision"]["before"]
        changed = [f"; {k} {old!r} -> {new!r}" for k, (old, new) in parent["changed"].items()]
        plans = {"precision_before": before, "precision_after": brief(plan)}
        writer.write({"kind": "branch", **event, "branched_from": config.branch, **plans})
        console.print(
            f"{folder.path} begins at step {progress.step} of {parent['run']}; precision plan "
            f"{label(before)} -> {label(plan)}{''.join(changed)}",
            highlight=False,
            soft_wrap=True,
        )
    if parent is None and folder.adds_phases:
        folder.record_phases(progress.step, progress.tokens, config.data.phases)
        starts = ", ".join(str(phase.from_tokens) for phase in config.data.phases)
        writer.write({"kind": "phases", **event, "from_tokens": starts})
        console.print(f"data.phases: phases were added; they begin at {starts} tokens")
    if parent is None and before is not None:
        folder.record_switch(progress.step, progress.tokens, before, plan, config.precision)
        plans = {"precision_before": brief(before), "precision_after": brief(plan)}
        writer.write({"kind": "switch", **event, **plans})
        console.print(
            f"precision plan switched at step {progress.step}: {label(before)} -> {label(plan)}",
            highlight=False,
            soft_wrap=True,
        )


def open_writer(
    config: Config, folder: RunFolder, resume_step: int, console: Console
) -> MetricsWriter:
    """metrics.jsonl and the sinks that the configuration asks for."""
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


def finish(folder: RunFolder, summary: dict[str, Any], console: Console) -> None:
    """summary.json and loss.png, and the last lines a person reads."""
    folder.write_summary(summary)
    picture = plot_loss(folder.path)
    precision_picture = plot_precision(folder.path)
    nats = "nats a token"
    if summary["finished"]:
        console.print(
            f"validation loss {summary['validation_loss']:.3f} {nats}; the corpus's unigram "
            f"entropy is {summary['unigram_entropy']:.3f}",
            highlight=False,
        )
    else:
        console.print(
            f"stopped at step {summary['step']} ({summary['stop_reason']}); the same command goes "
            "on from there",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{folder.path}: loss curve in {picture.name}", highlight=False)
    if precision_picture is not None:
        console.print(f"precision telemetry in {precision_picture.name}", highlight=False)


def open_data(config: Config, say: Callable[[str], None]) -> tuple[BatchSource, BatchSource]:
    """Training and validation batches; the embedded corpus is built on first use.

    Raises ConfigError for data that is missing, damaged or of another vocabulary.
    """
    if config.data.kind == DataKind.embedded:
        from nemotron_train.data.corpus import build_embedded

        build_embedded(config.data.embedded_folder, config.model.vocab_size, progress=say)

    def source(split: str) -> BatchSource:
        return BatchSource(
            config.data,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            split=split,
            vocab_size=config.model.vocab_size,
        )

    return source("train"), source("validation")
