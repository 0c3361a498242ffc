"""Memory per rank: the prediction of `nemotron-train plan` against a measured step.

    python -m benchmarks.memory [CASE ...]     # a Markdown table; without CASE: all cases

Measures the bytes of live tensors with torch's profiler, which records every allocation and release
of torch's CPU allocator, starting before the model is built. The peak is that of the second step
(the first creates the quantized weights). With --resident: the growth of the peak resident set
since the imports, without the profiler. It also includes memory freed during building and the
caches of the C library and of oneDNN. All numbers in the tables are MiB.

Rows are packed as the prediction assumes: a short document before a long one, so that every mask
exists and attention still covers almost whole rows. The router's load follows from the initial
weights. `max_vio` is the fullest expert's load over the mean; the prediction assumes 1.25.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import Config
from nemotron_train.plan.cost.memory import rank_memory
from nemotron_train.plan.cost.operators import Machine
from nemotron_train.plan.derive import derive
from nemotron_train.plan.precision.resolve import resolve_plan

MODEL = (
    "model.name=benchmark",
    "model.pattern=MEM*EME",
    "model.hidden_size=256",
    "model.vocab_size=1024",
    "model.attention.heads=8",
    "model.attention.key_value_heads=2",
    "model.attention.head_dim=32",
    "model.mamba.heads=16",
    "model.mamba.head_dim=32",
    "model.mamba.state_size=64",
    "model.mamba.groups=2",
    "model.mamba.chunk_size=64",
    "model.moe.experts=16",
    "model.moe.experts_per_token=2",
    "model.moe.expert_hidden_size=128",
    "model.moe.shared_expert_hidden_size=256",
    "model.moe.latent_size=64",
    "model.mtp.depths=0",
    "precision=fp32",
    "train.sequence_length=512",
    "train.micro_batch_sequences=2",
    "train.global_batch_tokens=4096",
    "train.validation_tokens=4096",
)


def _recompute(mode: str) -> list[str]:
    return [f"train.recompute.{kind}={mode}" for kind in ("mamba", "attention", "moe")]


def _long(length: int) -> list[str]:
    """Overrides for one row of `length` tokens per micro-batch, two per step."""
    batch = [f"train.{name}={2 * length}" for name in ("global_batch_tokens", "validation_tokens")]
    return [f"train.sequence_length={length}", "train.micro_batch_sequences=1", *batch]


# Name -> (ranks, overrides on top of MODEL).
CASES: dict[str, tuple[int, list[str]]] = {
    "FP32": (1, []),
    "FP32, 2,048 tokens a row": (1, ["train.sequence_length=2048"]),
    "FP32, two MTP depths": (1, ["model.mtp.depths=2"]),
    "FP32, selective recomputation": (1, _recompute("selective")),
    "FP32, full recomputation": (1, _recompute("full")),
    "BF16": (1, ["precision=bf16"]),
    "NVFP4 emulated": (1, ["precision=nvfp4_all"]),
    "NVFP4 emulated, MTP, selective": (
        1,
        ["precision=nvfp4_nemotron3", "model.mtp.depths=2", *_recompute("selective")],
    ),
    "tensor 2 + sequence, MTP": (
        2,
        ["parallel.tensor=2", "parallel.sequence=true", "model.mtp.depths=2"],
    ),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "expert 2": (2, ["parallel.expert=2"]),
    "data 2, BF16": (2, ["precision=bf16"]),
    "context 2": (2, ["parallel.context=2"]),
    "pipeline 2, virtual 2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "a row of 4,096": (1, _long(4096)),
    "a row of 16,384, full recomputation": (1, [*_long(16384), *_recompute("full")]),
    "context 2, a row of 8,192": (2, [*_long(8192), "parallel.context=2"]),
    "context 4, a row of 16,384": (4, [*_long(16384), "parallel.context=4"]),
}


def configuration(case: str) -> Config:
    """The configuration of a case of CASES."""
    return compose_config([*MODEL, *CASES[case][1]])


SHORT_DOCUMENT = 4  # tokens of the first of the two documents in each row


class PackedRows:
    """Training data: random tokens, two documents per row, independent of the data state."""

    def __init__(self, config: Config) -> None:
        self._random = np.random.default_rng(0)
        self._vocab_size = config.model.vocab_size
        self._length = config.train.sequence_length

    def take(self, state: object, num_sequences: int, rank_slice: tuple[int, int]) -> tuple:
        """(batch with the rows of `rank_slice`, unchanged state)."""
        from nemotron_train.data.batches import Batch

        num_rows = rank_slice[1] - rank_slice[0]
        tokens = self._random.integers(0, self._vocab_size, (num_rows, self._length + 1))
        documents = np.zeros((num_rows, self._length), np.int64)
        documents[:, SHORT_DOCUMENT:] = 1
        batch = Batch(
            tokens_BS=tokens[:, :-1].copy(),
            labels_BS=tokens[:, 1:].copy(),
            loss_mask_BS=np.ones((num_rows, self._length), np.float32),
            document_ids_BS=documents,
            sample_ids_B=np.arange(num_rows),
            origins_B3=np.zeros((num_rows, 3), np.int64),
        )
        return batch, state


@dataclass(frozen=True)
class Timeline:
    """Live bytes of torch's CPU allocator over time, and named points in time. Times in ns."""

    times: list[int]
    live: list[int]
    spans: list[tuple[int, int, str]]  # start, end, name of every operation
    marks: dict[str, int]

    def at(self, time: int) -> int:
        """Live bytes at a point in time."""
        position = int(np.searchsorted(self.times, time, side="right"))
        return self.live[position - 1] if position else 0

    def peak(self, start: int, end: int) -> int:
        """Largest number of live bytes between two points in time."""
        first, last = np.searchsorted(self.times, [start, end], side="right")
        return max([self.at(start), *self.live[first:last]])


class Run:
    """This rank's part of a run on random rows. The constructor imports everything and builds
    nothing. COLLECTIVE."""

    def __init__(self, config: Config) -> None:
        from nemotron_train.platform.runtime import usable_platform

        self.config, self.platform, self.max_vio = config, usable_platform(1), 0.0
        from nemotron_train.platform import groups as process_groups
        from nemotron_train.train import trainer  # noqa: F401

        self.groups = process_groups.start(config.parallel, self.platform.backend)

    def steps(self, num_steps: int, mark: Callable[[str], Any]) -> None:
        """Builds the model and takes steps. Calls `mark` with "built", then with "step_1", ...
        after each step."""
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from nemotron_train.assemble.build import build_chunks, wrap_chunks
        from nemotron_train.optim.build import build_optimizer
        from nemotron_train.precision.attach import PrecisionControl
        from nemotron_train.run_folder.progress import Progress
        from nemotron_train.train.guard.guard import Guard
        from nemotron_train.train.supply import DataSupply
        from nemotron_train.train.train_step import TrainStep

        config, groups = self.config, self.groups
        model_parallel_cuda_manual_seed(config.train.seed)
        cores = build_chunks(config, resolve_plan(config), self.platform, groups)
        chunks = wrap_chunks(cores, config, groups)
        derived = derive(config, int(os.environ.get("WORLD_SIZE", "1")))
        rows: Any = PackedRows(config)
        train_step = TrainStep(
            config,
            derived,
            chunks,
            build_optimizer(config, chunks, groups, self.platform),
            DataSupply(config, derived, rows, groups, self.platform.device),
            groups,
            self.platform.device,
            PrecisionControl(cores, config, resolve_plan(config), groups),
            Guard(config.guard, self.platform.device),
        )
        mark("built")
        progress = Progress(0, 0, None)  # type: ignore[arg-type]
        for step in range(num_steps):
            result = train_step(progress)
            progress, self.max_vio = result.progress, float(result.metrics.get("max_vio", 0))
            mark(f"step_{step + 1}")

    def recorded(self, num_steps: int = 2) -> Timeline:
        """As `steps`, under the profiler; returns the memory timeline."""
        from torch.profiler import ProfilerActivity, profile, record_function

        def mark(name: str) -> None:
            with record_function(f"mark {name}"):
                pass

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.steps(num_steps, mark)
        return timeline_of(profiler)


def timeline_of(profiler: Any) -> Timeline:
    """Builds the timeline from the profiler's event tree. The profiler records one thread only and
    misses releases by gloo's threads. So a block allocated inside an exchange counts as released
    when that exchange ends, if its address is reused or its release is never recorded."""
    allocations, spans, marks = [], [], {}
    stack = [(event, 0) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while stack:
        event, exchange_end = stack.pop()
        name, start = event.name, event.start_time_ns
        if name == "[memory]":
            fields = event.extra_fields
            allocations.append((start, fields.ptr, fields.alloc_size, exchange_end))
            continue
        if name.startswith("mark "):
            marks[name.removeprefix("mark ")] = start
        end = start + event.duration_time_ns
        spans.append((start, end, name))
        if name.startswith(("c10d::", "gloo:")):
            exchange_end = max(exchange_end, end)
        stack += [(child, exchange_end) for child in event.children]

    changes, live_blocks = [], {}  # held: address -> size, end of the exchange it belongs to
    for time, address, size, exchange_end in sorted(allocations):
        before = live_blocks.pop(address, None)
        if size > 0:
            if before is not None:
                changes.append((before[1] or time, -before[0]))
            live_blocks[address] = (size, exchange_end)
            changes.append((time, size))
        elif before is not None:
            changes.append((time, -before[0]))
    changes += [(end, -size) for size, end in live_blocks.values() if end]
    changes.sort()
    live = np.cumsum([size for _, size in changes]).tolist()
    return Timeline([time for time, _ in changes], live, sorted(spans), marks)


# A rank's process, and the table ------------------------------------------------------------


def measure(config: Config) -> dict[str, Any]:
    """Predicted and measured bytes of this rank. COLLECTIVE."""
    num_ranks, rank = (int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    run = Run(config)
    timeline = run.recorded()
    start, end = timeline.marks["step_1"], timeline.marks["step_2"]
    machine = machine_here()
    predicted = rank_memory(config, derive(config, num_ranks), machine)
    rank_prediction = predicted[rank * config.parallel.pipeline // num_ranks]
    return {
        "rank": rank,
        "predicted": rank_prediction.peak_bytes,
        "predicted_lasting": rank_prediction.lasting_bytes,
        "measured": timeline.peak(start, end),
        "measured_built": timeline.at(timeline.marks["built"]),
        "max_vio": run.max_vio,
        "memory": asdict(rank_prediction),
    }


def machine_here() -> Machine:
    """The properties of this machine that the prediction needs."""
    from nemotron_train.platform import bfloat16_products

    return Machine(wide_products=bfloat16_products.needed(), collective_copies=True)


def measure_resident(config: Config) -> dict[str, Any]:
    """Growth of this rank's peak resident set since the imports, in bytes. COLLECTIVE."""
    run = Run(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run.steps(2, lambda name: None)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rank": int(os.environ.get("RANK", "0")), "resident": (after - before) * 1024}


def on_ranks(case: str, resident: bool = False) -> list[dict[str, Any]]:
    """Measures a case in new processes; one result per rank, in rank order. Raises RuntimeError if
    a rank fails."""
    num_ranks = CASES[case][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.memory", "--rank", case]
    processes = []
    for rank in range(num_ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
        variables |= {
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        processes.append(
            subprocess.Popen(
                [*command, "--resident"] if resident else command,
                env=environment | {"OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(f"{case}: a rank ended with {process.returncode}\n{err}")
        results.append(json.loads(out.splitlines()[-1]))
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rank", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--resident", action="store_true", help="the resident set instead")
    arguments = parser.parse_args()
    if arguments.rank:
        config = configuration(arguments.rank)
        print(json.dumps(measure_resident(config) if arguments.resident else measure(config)))
        from nemotron_train.platform import groups

        return groups.stop()
    columns = ["configuration", "rank"]
    columns += ["resident"] if arguments.resident else ["predicted", "measured", "ratio", "max_vio"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for case in arguments.cases or CASES:
        for row in on_ranks(case, arguments.resident):
            mib = {name: size / 2**20 for name, size in row.items() if isinstance(size, int)}
            cells = [case, f"{row['rank']} of {CASES[case][0]}"]
            if arguments.resident:
                cells.append(f"{mib['resident']:.0f}")
            else:
                cells += [f"{mib['predicted']:.1f}", f"{mib['measured']:.1f}"]
                cells += [f"{row['predicted'] / row['measured']:.3f}", f"{row['max_vio']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
