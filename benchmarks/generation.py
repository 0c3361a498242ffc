"""Decoding with a long context: tokens a second, the hybrid against an attention model of the same
active size, and against Hugging Face's NemotronH with its own cache.

    python -m benchmarks.generation [--threads 2] [--cpu-seconds] [--contexts 1024 ...] [--no-peer]

One sequence, greedy choice left out: a pass of one token and its logits, median of 24, models in
turn. Weights are random, and the context's keys and values are random numbers put into the caches:
decoding costs the same as after a real prefill, which 64k tokens of attention would make take an
hour. The attention model has an attention layer in each place of a Mamba-2 layer, with as many
query heads as make its active parameters those of the hybrid. `--cpu-seconds` counts this thread's
processor time: steadier on a shared machine.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.our_step import configuration
from nemotron_train.model.shape import parameters
from nemotron_train.platform import device

CONTEXTS = (1024, 4096, 16_384, 65_536)
ATTENTION = ["model.pattern=*E*E**E*E*E**E", "model.attention.heads=22"]
WARM_UP, MEASURED = 4, 24


def our_decoding(overrides: list[str], platform: Any, groups: Any) -> tuple[Any, Callable]:
    """The model, and a function that makes a decoding step at a context."""
    from nemotron_train.model.build import build_model
    from nemotron_train.model.decode_state import DecodeStates

    config = configuration("float32", overrides)
    model = build_model(config, platform, groups).eval()

    def at(context: int) -> tuple[Callable[[], object], int]:
        states, where = DecodeStates(1), torch.device("cpu")
        with torch.inference_mode():
            model.decode(torch.arange(8), states.new_tokens([8], where))
            for cache in states.attention.values():
                cache.make_room(context + WARM_UP + MEASURED)
                cache.keys_BGLD.normal_()
                cache.values_BGLD.normal_()
        states.lengths = [context]

        def step() -> object:
            with torch.inference_mode():
                new = states.new_tokens([1], where)
                return model.logits(model.decode(torch.tensor([7]), new))

        return step, states.constant_bytes + context * states.bytes_per_token

    return config.model, at


def peer_decoding() -> Callable:
    """Hugging Face's NemotronH in the same dimensions."""
    from benchmarks.peer_nemotron_h import build_peer

    warnings.filterwarnings("ignore")
    model: Any = build_peer("float32").eval()

    def at(context: int) -> tuple[Callable[[], object], int]:
        with torch.inference_mode():
            cache = model(input_ids=torch.arange(8)[None], use_cache=True).cache
            for layer in cache.layers:
                keys = getattr(layer, "keys", None)
                if keys is not None and keys.numel():
                    shape = (*keys.shape[:2], context, keys.shape[3])
                    layer.keys, layer.values = torch.randn(shape), torch.randn(shape)

        def step() -> object:
            with torch.inference_mode():
                return model(input_ids=torch.tensor([[7]]), cache=cache, use_cache=True).logits

        return step, 0

    return at


def measure(makers: dict[str, Callable], context: int, clock: Callable[[], float]) -> None:
    """Print one line: each model's milliseconds a token, and the memory of its states."""
    steps = {name: at(context) for name, at in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + MEASURED):
        for name, (step, _) in steps.items():
            start = clock()
            step()
            if number >= WARM_UP:
                seconds[name].append(clock() - start)
    parts = []
    for name, (_, num_bytes) in steps.items():
        middle = statistics.median(seconds[name])
        memory = f", {num_bytes / 1e6:.1f} MB" if num_bytes else ""
        parts.append(f"{name} {middle * 1e3:.2f} ms = {1 / middle:.0f} tokens/s{memory}")
    print(f"context {context:>6,}: " + "; ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-seconds", action="store_true", help="processor time, one thread")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    arguments = parser.parse_args()
    platform = device.prepare(1 if arguments.cpu_seconds else arguments.threads)
    from nemotron_train.config.schema import ParallelConfig
    from nemotron_train.platform import groups as process_groups

    groups = process_groups.start(ParallelConfig(), platform.backend)
    makers: dict[str, Callable] = {}
    for name, overrides in (("hybrid", []), ("attention", ATTENTION)):
        shape, makers[name] = our_decoding(overrides, platform, groups)
        print(f"{name}: {shape.pattern}, {parameters(shape).active_with_embeddings:,} active")
    if not arguments.no_peer:
        makers["Hugging Face, hybrid"] = peer_decoding()
    clock = time.thread_time if arguments.cpu_seconds else time.perf_counter
    for context in arguments.contexts:
        measure(makers, context, clock)
    process_groups.stop()


if __name__ == "__main__":
    main()
