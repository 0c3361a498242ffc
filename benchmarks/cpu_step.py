"""Training tokens per second of our model and of Hugging Face NemotronHForCausalLM on this CPU.

    python -m benchmarks.cpu_step [--rounds 9] [--dtypes float32 bfloat16] [--profile]

Each half runs in its own process with the same threads and allocator settings, and keeps its model.
The halves take steps in turn (ours, the peer, ours, ...), so both see the same machine and never
compute at the same time. Prints median tokens per second, the median ratio over the rounds, and our
step's model FLOPs as a share of this machine's measured matrix-product rate.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from benchmarks.our_step import NUM_ROWS, NUM_TOKENS, configuration
from nemotron_train.plan.architecture.layers import training_flops
from nemotron_train.platform.allocator import keep_freed_memory

HALVES = ("ours", "peer")
TOKENS_A_STEP = NUM_ROWS * NUM_TOKENS


def _build(half: str, dtype: str, num_threads: int) -> Callable[[], float]:
    if half == "ours":
        from benchmarks.our_step import our_step

        return our_step(dtype, num_threads)
    if half == "peer":
        from benchmarks.peer_nemotron_h import peer_step

        return peer_step(dtype, num_threads)
    assert half == "product", half
    return _matrix_product(dtype, num_threads)


_PRODUCT_SIZE = 1024


def _matrix_product(dtype: str, num_threads: int) -> Callable[[], float]:
    import torch

    torch.set_num_threads(num_threads)
    a, b = torch.randn(2, _PRODUCT_SIZE, _PRODUCT_SIZE).to(getattr(torch, dtype))

    def step() -> float:
        return float(torch.mm(a, b)[0, 0])

    return step


def _profile(step: Callable[[], float]) -> str:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=48
    )


def _serve(half: str, dtype: str, num_threads: int, tuned: bool, pipe: Connection) -> None:
    """Child process: builds once, then answers "step" with seconds and "profile" with a table."""
    if tuned:
        keep_freed_memory()
    step = _build(half, dtype, num_threads)
    while (request := pipe.recv()) != "stop":
        if request == "profile":
            pipe.send(_profile(step))
            continue
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


class Half:
    """A process that holds one model and takes a step on request."""

    def __init__(self, half: str, dtype: str, num_threads: int, tuned: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other_end = spawn.Pipe()
        arguments = (half, dtype, num_threads, tuned, other_end)
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other_end.close()

    def ask(self, request: str) -> object:
        """Sends a request and waits for the answer. Raises EOFError if the process has died."""
        self._pipe.send(request)
        return self._pipe.recv()

    def seconds(self) -> float:
        """Takes one step; returns its seconds."""
        answer = self.ask("step")
        assert isinstance(answer, float)
        return answer

    def stop(self) -> None:
        """Ends the process and waits for it."""
        self._pipe.send("stop")
        self._process.join()


def _product_rate(dtype: str, num_threads: int) -> float:
    """FLOPs per second of a square matrix product, median of 30."""
    product = Half("product", dtype, num_threads, tuned=True)
    seconds = [product.seconds() for _ in range(35)][5:]
    product.stop()
    return 2 * _PRODUCT_SIZE**3 / statistics.median(seconds)


def compare(
    dtype: str,
    num_threads: int,
    num_rounds: int,
    tuned: bool,
    with_profile: bool,
    halves: list[str],
) -> None:
    """Measures the halves in turn for one dtype and prints the results. `tuned`: allocator settings
    as in `pretrain`."""
    workers = {half: Half(half, dtype, num_threads, tuned) for half in halves}
    for worker in workers.values():
        for _ in range(2):  # warm-up: kernel selection, first memory use
            worker.seconds()
    seconds: dict[str, list[float]] = {half: [] for half in halves}
    for _ in range(num_rounds):
        for half, worker in workers.items():
            seconds[half].append(worker.seconds())
    rate = _product_rate(dtype, num_threads)
    print(f"{dtype}: matrix products of {_PRODUCT_SIZE} run at {rate / 1e9:.0f} GFLOP/s")
    for half in halves:
        median = statistics.median(seconds[half])
        print(
            f"  {half:5s} {TOKENS_A_STEP / median:8.0f} tokens/s"
            f"   median step {median * 1e3:6.0f} ms"
            f"   fastest {min(seconds[half]) * 1e3:6.0f} ms"
        )
    if "ours" in halves:
        flops = training_flops(configuration(dtype).model, NUM_TOKENS) * TOKENS_A_STEP
        share = flops / statistics.median(seconds["ours"]) / rate
        print(f"  ours reaches {share:.0%} of that rate ({flops / 1e9:.0f} GFLOP a step)")
    if len(halves) == 2:
        ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
        print(f"  ours / peer = {statistics.median(ratios):.2f} (median of {num_rounds} rounds)")
    if with_profile:
        for half, worker in workers.items():
            print(f"\n{half}, one step:\n{worker.ask('profile')}")
    for worker in workers.values():
        worker.stop()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=list(HALVES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also where each step's time goes")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="leave glibc's thresholds alone in both halves (pretrain raises them)",
    )
    options = parser.parse_args()
    for dtype in options.dtypes:
        compare(
            dtype,
            options.threads,
            options.rounds,
            not options.default_allocator,
            options.profile,
            options.halves,
        )


if __name__ == "__main__":
    main()
