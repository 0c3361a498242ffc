"""Cost of a checkpoint in the training of the 10M proxy: synchronous and asynchronous save.

    python -m benchmarks.async_save [--rounds N] [--cpu] [--folder WHERE] [KNOB=VALUE ...]

Takes whole steps of the proxy (random tokens, its own batch size) with the run's `Checkpoints`. The
stall of an asynchronous save is all the time that the training loop spends on it: planning, copying
the tensors to host memory, handing over, and one poll per step until the end. Target: stall without
the copy at most 5% of a step. On a busy machine `--cpu` counts CPU seconds instead of wall-clock
seconds, of the loop's thread only (for the synchronous save, of all threads). With train.threads=1
these are the times of an idle machine, without waits for the disk.

Not measured: a network file system, several ranks (each adds a gathered plan), a GPU (there the
copy crosses the bus).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def build(words: list[str], folder: Path) -> tuple[Callable[[], object], Any, Any]:
    """Returns a function that takes one step, the run's `Checkpoints`, and a data state to save.
    `words`: overrides."""
    from benchmarks.our_step import RandomBatches
    from nemotron_train.compose.compose import compose_config
    from nemotron_train.data.blend import DataState
    from nemotron_train.plan.derive import derive
    from nemotron_train.platform.runtime import usable_platform

    config = compose_config(["+run=proxy_10m", "train.keep_checkpoints=1", *words])
    platform = usable_platform(config.train.threads)
    from rich.console import Console

    from nemotron_train.platform import groups as process_groups
    from nemotron_train.run_folder.progress import Progress
    from nemotron_train.train.trainer import Trainer

    groups = process_groups.start(config.parallel, platform.backend)
    batches: Any = RandomBatches(config.model.vocab_size)
    batches.description = {}
    console = Console(quiet=True)
    trainer = Trainer(
        config, derive(config), platform, groups, batches, batches, folder, console
    )  # fmt: skip
    state = DataState("train", config.train.sequence_length, config.train.seed, "random")
    at_start = Progress(0, 0, state)
    return lambda: trainer.train_step(at_start), trainer.checkpoints, state


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of the loop's thread")
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("overrides", nargs="*", metavar="KNOB=VALUE")
    arguments = parser.parse_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.rounds, arguments.overrides, arguments.cpu)


def measure(folder: Path, rounds: int, overrides: list[str], is_cpu: bool) -> None:
    """Runs the rounds and prints the medians. `is_cpu`: count CPU seconds."""
    step, checkpoints, state = build(overrides, folder)
    from nemotron_train.run_folder.progress import Progress
    from nemotron_train.train.checkpoint import checkpoints as checkpoints_module

    clock = time.thread_time if is_cpu else time.perf_counter

    def seconds(function: Callable[[], object]) -> float:
        started = clock()
        function()
        return clock() - started

    copies: list[float] = []
    original_copy = checkpoints_module._copied

    def timed_copy(*arguments: Any) -> Any:
        results: list[Any] = []
        copies.append(seconds(lambda: results.append(original_copy(*arguments))))
        return results[0]

    checkpoints_module._copied = timed_copy
    number = iter(range(1, 10**6))
    for _ in range(2):  # warm-up: allocations, host copies, the writer thread
        step()
        checkpoints.start(Progress(next(number), 0, state))
        checkpoints.poll(wait=True)
    copies.clear()
    undisturbed, in_line, stalls, while_saving, until_done = [], [], [], [], []
    for _ in range(rounds):
        undisturbed.append(seconds(step))
        began = time.process_time() if is_cpu else clock()
        checkpoints.save(Progress(next(number), 0, state))
        in_line.append((time.process_time() if is_cpu else clock()) - began)
        began = time.perf_counter()
        stall = seconds(lambda: checkpoints.start(Progress(next(number), 0, state)))
        steps = []
        while checkpoints.in_flight:
            steps.append(seconds(step))
            stall += seconds(checkpoints.poll)
        until_done.append(time.perf_counter() - began)
        while_saving.append(statistics.median(steps))
        stalls.append(stall)
    size = sum(path.stat().st_size for path in folder.rglob("*.distcp"))
    kind = "CPU seconds of the loop" if is_cpu else f"load average {os.getloadavg()[0]:.1f}"
    print(f"{size / 1e6:.0f} MB, {rounds} rounds, medians; {kind}")
    step_time, copy, stall = map(statistics.median, (undisturbed, copies, stalls))
    other = stall - copy
    print(f"step alone                      {1000 * step_time:8.0f} ms")
    print(f"save in line                    {1000 * statistics.median(in_line):8.0f} ms")
    print(f"save beside: the loop's stall   {1000 * stall:8.0f} ms")
    print(f"  of it copy to host memory     {1000 * copy:8.0f} ms")
    print(
        f"  of it all else                {1000 * other:8.0f} ms, {other / step_time:.1%} of a step"
    )
    print(f"step while the writer works     {1000 * statistics.median(while_saving):8.0f} ms")
    if not is_cpu:
        print(f"until the checkpoint is there   {1000 * statistics.median(until_done):8.0f} ms")


if __name__ == "__main__":
    main()
