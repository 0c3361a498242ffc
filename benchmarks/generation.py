"""Decoding speed with a long context: the hybrid against an attention model of the same active size
and against Hugging Face's NemotronH with its own cache.

    python -m benchmarks.generation [--threads 2] [--dtype bfloat16] [--contexts 1024 ...]
        [--no-peer] [--cpu-seconds] [--plot FILE.png]

One sequence; times the forward call of one token and its logits, without sampling; median of 24,
models in turn. Weights are random, and so are the keys and values of the context, which are written
directly into the KV caches: decoding costs the same as after a real prefill, which would take an
hour for 64k tokens of attention. The attention model replaces each Mamba-2 layer with an attention
layer, with the number of query heads that gives the hybrid's number of active parameters.
`--cpu-seconds` counts this thread's CPU time, which varies less on a shared machine.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.our_step import configuration
from nemotron_train.plan.architecture.layers import parameters
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform.runtime import usable_platform

CONTEXTS = tuple(1 << power for power in range(10, 17))
HYBRID, ATTENTION_ONLY, PEER = "hybrid", "attention", "Hugging Face, hybrid"
ATTENTION = ["model.pattern=*E*E**E*E*E**E", "model.attention.heads=22"]
WARM_UP, MEASURED = 4, 24


def our_decoding(
    dtype: str, overrides: list[str], platform: Any, groups: Any
) -> tuple[Any, Callable]:
    """Returns the model's configuration and a function: context length -> (decoding step, bytes of
    the decode state)."""
    from nemotron_train.assemble.build import build_model
    from nemotron_train.model.decode_state import DecodeStates

    config = configuration(dtype, overrides)
    model = build_model(config, resolve_plan(config), platform, groups).eval()

    def prepare(context: int) -> tuple[Callable[[], object], int]:
        states, cpu = DecodeStates(1), torch.device("cpu")
        with torch.inference_mode():
            model.decode(torch.arange(8), states.next_batch([8], cpu))
            for cache in states.attention.values():
                cache.reserve(context + WARM_UP + MEASURED)
                cache.keys_BGLD.normal_()
                cache.values_BGLD.normal_()
        states.lengths = [context]

        def step() -> object:
            with torch.inference_mode():
                batch = states.next_batch([1], cpu)
                return model.logits(model.decode(torch.tensor([7]), batch))

        return step, states.constant_bytes + context * states.bytes_per_token

    return config.model, prepare


def peer_decoding(dtype: str) -> Callable:
    """As `our_decoding`, for Hugging Face's NemotronH with the same dimensions; bytes are 0."""
    from benchmarks.peer_nemotron_h import build_peer

    warnings.filterwarnings("ignore")
    model: Any = build_peer(dtype).eval()

    def prepare(context: int) -> tuple[Callable[[], object], int]:
        with torch.inference_mode():
            cache = model(input_ids=torch.arange(8)[None], use_cache=True).cache
            for layer in cache.layers:
                keys = getattr(layer, "keys", None)
                if keys is not None and keys.numel():
                    shape = (*keys.shape[:2], context, keys.shape[3])
                    layer.keys, layer.values = (
                        torch.randn(shape, dtype=keys.dtype) for _ in range(2)
                    )

        def step() -> object:
            with torch.inference_mode():
                return model(input_ids=torch.tensor([[7]]), cache=cache, use_cache=True).logits

        return step, 0

    return prepare


def measure(
    makers: dict[str, Callable], context: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Returns the seconds per token of each model; prints them with the memory of the states."""
    steps = {name: at(context) for name, at in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + MEASURED):
        for name, (step, _) in steps.items():
            start = clock()
            step()
            if number >= WARM_UP:
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    parts = []
    for name, (_, num_bytes) in steps.items():
        memory = f", {num_bytes / 1e6:.1f} MB" if num_bytes else ""
        gain = f", the hybrid {medians[name] / medians[HYBRID]:.2f}x" if name != HYBRID else ""
        parts.append(
            f"{name} {medians[name] * 1e3:.2f} ms = {1 / medians[name]:.0f} tokens/s{memory}{gain}"
        )
    print(f"context {context:>6,}: " + "; ".join(parts), flush=True)
    return medians


def plot(path: str, seconds_by_context: dict[int, dict[str, float]], subtitle: str) -> None:
    """Plots tokens per second and the hybrid's speedup over the context length. `found`: context ->
    model -> seconds per token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    rates, ratios = figure.subplots(1, 2)
    contexts = list(seconds_by_context)
    for number, name in enumerate(seconds_by_context[contexts[0]]):
        seconds = [seconds_by_context[context][name] for context in contexts]
        rates.plot(contexts, [1 / s for s in seconds], "o-", color=f"C{number}", label=name)
        if name != HYBRID:
            speedups = [
                s / seconds_by_context[c][HYBRID] for s, c in zip(seconds, contexts, strict=True)
            ]
            ratios.plot(contexts, speedups, "o-", color=f"C{number}", label=f"over {name}")
    rates.set_ylabel("tokens a second")
    ratios.set_ylabel("times as fast, the hybrid")
    ratios.axhline(1, color="0.4", linewidth=1)
    for axes in (rates, ratios):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
        axes.set_xlabel("tokens of context")
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(f"Decoding one sequence: {subtitle}", x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-seconds", action="store_true", help="processor time, one thread")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--plot", default="", metavar="FILE.png")
    arguments = parser.parse_args()
    platform = usable_platform(1 if arguments.cpu_seconds else arguments.threads)
    from nemotron_train.config.schema import ParallelConfig
    from nemotron_train.platform import groups as process_groups

    groups = process_groups.start(ParallelConfig(), platform.backend)
    makers: dict[str, Callable] = {}
    for name, overrides in ((HYBRID, []), (ATTENTION_ONLY, ATTENTION)):
        shape, makers[name] = our_decoding(arguments.dtype, overrides, platform, groups)
        print(f"{name}: {shape.pattern}, {parameters(shape).active_with_embeddings:,} active")
    if not arguments.no_peer:
        makers[PEER] = peer_decoding(arguments.dtype)
    clock = time.thread_time if arguments.cpu_seconds else time.perf_counter
    seconds_by_context = {
        context: measure(makers, context, clock) for context in arguments.contexts
    }
    process_groups.stop()
    if arguments.plot:
        plot(
            arguments.plot,
            seconds_by_context,
            f"{arguments.dtype}, {platform.describe().split(' · ')[0]}",
        )


if __name__ == "__main__":
    main()
