"""Step time and memory of emulated precision plans relative to BF16, on the 10M proxy and this CPU.

    python -m benchmarks.precision_step [--plans bf16 nvfp4_nemotron3] [--rounds 9] [--profile]

Each plan runs in its own process with the same threads and allocator settings, and keeps its model.
The plans take steps in turn, so all see the same machine and never compute at the same time. Every
other plan is compared with the first. Memory is the peak resident size of the process over its
steps, and the same minus the size after all imports, before the model is built. CPU seconds (all
threads) hardly depend on other load: with --threads 1 they are the step time of an idle machine
(threads that wait for each other count as busy).

Sequences and micro-batches are those of recipes/train/proxy_10m. Its steps have four micro-batches;
the default here is one (--micro-batches), the worst case, because a weight is quantized once per
step.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.our_step import NUM_TOKENS
from nemotron_train.platform.allocator import keep_freed_memory


def _profile(step: Callable[[], float]) -> str:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=48
    )


def _memory(field: str) -> float:
    """MiB of this process: VmRSS, the current resident size; VmHWM, the peak so far. NaN if the
    system has no /proc/self/status."""
    path = Path("/proc/self/status")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith(field)]
    return kib[0] / 1024 if kib else float("nan")


def _serve(overrides: list[str], num_threads: int, pipe: Connection) -> None:
    """Child process: builds once, then answers "step" with (seconds, CPU seconds), "profile" with a
    table and "memory" with (MiB before the model, peak MiB)."""
    keep_freed_memory()
    from benchmarks.our_step import build_step
    from nemotron_train import run  # noqa: F401  import everything before measuring
    from nemotron_train.compose.compose import compose_config

    before = _memory("VmRSS")
    step = build_step(compose_config(overrides), num_threads)
    while (request := pipe.recv()) != "stop":
        if request == "profile":
            pipe.send(_profile(step))
        elif request == "memory":
            pipe.send((before, _memory("VmHWM")))
        else:
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            pipe.send((time.perf_counter() - start, time.process_time() - cpu_start))


class Worker:
    """A process that holds one model and takes a step on request."""

    def __init__(self, overrides: list[str], num_threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other_end = spawn.Pipe()
        arguments = (overrides, num_threads, other_end)
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other_end.close()

    def ask(self, request: str):
        """Sends a request and waits for the answer. Raises EOFError if the process has died."""
        self._pipe.send(request)
        return self._pipe.recv()

    def stop(self) -> None:
        """Ends the process and waits for it."""
        self._pipe.send("stop")
        self._process.join()


@dataclass(frozen=True)
class Measured:
    """Results of one plan: seconds and CPU seconds of each round, MiB before the model, peak
    MiB."""

    seconds: list[float]
    cpu_seconds: list[float]
    before: float
    peak: float


def measure(
    workers: dict[str, Worker], num_rounds: int, num_warm_up: int = 2
) -> dict[str, Measured]:
    """Measures all plans in turn, round by round."""
    for worker in workers.values():
        for _ in range(num_warm_up):  # kernel selection, compilation, first memory use
            worker.ask("step")
    steps: dict[str, list[tuple[float, float]]] = {plan: [] for plan in workers}
    for _ in range(num_rounds):
        for plan, worker in workers.items():
            steps[plan].append(worker.ask("step"))
    return {
        plan: Measured([wall for wall, _ in steps[plan]], [cpu for _, cpu in steps[plan]], *memory)
        for plan, memory in ((plan, worker.ask("memory")) for plan, worker in workers.items())
    }


def table(measured: dict[str, Measured]) -> str:
    """One line per plan, with ratios to the first plan."""
    first = next(iter(measured.values()))
    lines = [
        f"{'plan':28}{'median ms':>10}{'fastest':>9}{'x median':>10}{'x fastest':>10}"
        f"{'x CPU':>7}{'peak MiB':>10}{'x':>6}{'model MiB':>11}{'x':>6}"
    ]
    for plan, run in measured.items():
        ratio, cpu_ratio = (
            statistics.median(a / b for a, b in zip(values, of_first, strict=True))
            for values, of_first in (
                (run.seconds, first.seconds),
                (run.cpu_seconds, first.cpu_seconds),
            )
        )
        model, base = run.peak - run.before, first.peak - first.before
        lines.append(
            f"{plan:28}{statistics.median(run.seconds) * 1e3:10.0f}{min(run.seconds) * 1e3:9.0f}"
            f"{ratio:10.2f}{min(run.seconds) / min(first.seconds):10.2f}{cpu_ratio:7.2f}"
            f"{run.peak:10.0f}{run.peak / first.peak:6.2f}{model:11.0f}{model / base:6.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--plans", nargs="+", default=["bf16", "nvfp4_nemotron3"])
    parser.add_argument("--model", default="proxy_10m")
    parser.add_argument("--rows", type=int, default=8, help="sequences of 512 a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also where each step's time goes")
    options = parser.parse_args()
    tokens = options.rows * options.micro_batches * NUM_TOKENS
    common = [
        f"model={options.model}",
        f"train.sequence_length={NUM_TOKENS}",
        f"train.micro_batch_sequences={options.rows}",
        f"train.global_batch_tokens={tokens}",
        f"train.validation_tokens={tokens}",
    ]
    workers = {
        plan: Worker([*common, f"precision={plan}"], options.threads) for plan in options.plans
    }
    print(f"{options.model}, {options.micro_batches} x {options.rows} x {NUM_TOKENS} tokens a step")
    print(table(measure(workers, options.rounds)))
    for plan, worker in workers.items():
        if options.profile:
            print(f"\n{plan}, one step:\n{worker.ask('profile')}")
        worker.stop()


if __name__ == "__main__":
    main()
