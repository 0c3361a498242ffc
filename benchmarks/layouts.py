"""Differences between the losses of each parallel layout and of one rank.

    python -m benchmarks.layouts

Trains the tiny recipe (Mamba-2, attention, LatentMoE, two multi-token-prediction depths, packed
documents; 4 sequences of 128 tokens per step) for ten steps in FP32 on one rank, then under every
layout of LAYOUTS on two and four ranks over gloo. Prints the largest relative differences as the
table in docs/parallelism.md. Not a speed test: the ranks share the cores of one machine.

tests/distributed starts its ranks with this module too: `run_world` runs a list of `Job`s one after
the other on one set of processes. Argument of a rank: `--rank FOLDER`, the folder with its jobs.
"""

import argparse
import gc
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# Name in the table -> (ranks, overrides). The remaining factor of the ranks is data parallelism.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "DP2": (2, []),
    "TP2": (2, ["parallel=tensor2"]),
    "PP2": (2, ["parallel=pipeline2"]),
    "PP2 VPP2": (2, ["parallel=interleaved2"]),
    "EP2": (2, ["parallel=expert2"]),
    "ETP2": (2, ["parallel=expert_tensor2"]),
    "TP2 EP2": (2, ["parallel=tensor2", "parallel.expert=2"]),
    "TP2 ETP2": (2, ["parallel=tensor2", "parallel.expert_tensor=2"]),
    "CP2": (2, ["parallel=context2"]),
    "CP2 EP2": (2, ["parallel=context2", "parallel.expert=2"]),
    "DP4": (4, []),
    "TP2 DP2": (4, ["parallel=tensor2"]),
    "PP2 DP2": (4, ["parallel=pipeline2"]),
    "PP2 VPP2 DP2": (4, ["parallel=interleaved2"]),
    "EP2 DP2": (4, ["parallel=expert2"]),
    "EP4": (4, ["parallel.expert=4"]),
    "ETP2 DP2": (4, ["parallel=expert_tensor2"]),
    "ETP2 EP2": (4, ["parallel=expert_tensor2", "parallel.expert=2"]),
    "TP2 PP2": (4, ["parallel=tensor2_pipeline2"]),
    "TP2 PP2 VPP2": (4, ["parallel=tensor2_pipeline2", "parallel.virtual_pipeline=2"]),
    "TP2 PP2 ETP2": (4, ["parallel=tensor2_pipeline2", "parallel.expert_tensor=2"]),
    "TP2 EP2 DP2": (4, ["parallel=tensor2", "parallel.expert=2"]),
    "TP2 ETP2 DP2": (4, ["parallel=tensor2", "parallel.expert_tensor=2"]),
    "TP2 ETP2 EP2": (4, ["parallel=tensor2", "parallel.expert_tensor=2", "parallel.expert=2"]),
    "PP2 EP2": (4, ["parallel=pipeline2", "parallel.expert=2"]),
    "PP2 VPP2 EP2": (4, ["parallel=interleaved2", "parallel.expert=2"]),
    "PP4": (4, ["parallel.pipeline=4"]),
    "CP2 DP2": (4, ["parallel=context2"]),
    "CP2 PP2": (4, ["parallel=context2", "parallel.pipeline=2"]),
    "CP2 PP2 VPP2": (4, ["parallel=interleaved2", "parallel.context=2"]),
}
COMPARED = ("loss", "mtp_loss_1", "mtp_loss_2", "load_balance_loss", "grad_norm")

TINY = [
    "train.total_tokens=5120",
    "train.sequence_length=128",
    "train.global_batch_tokens=512",
    "train.validation_tokens=1024",
    "train.micro_batch_sequences=1",
    "optim.warmup_tokens=1024",
    "optim.decay_tokens=2048",
]


@dataclass
class Job:
    """One training run: up to step `steps`, from initial weights or from the checkpoint folder
    `load`, with a checkpoint at step `save_at` (0: none)."""

    name: str
    overrides: list[str]
    steps: int
    load: str = ""
    save_at: int = 0


@dataclass
class Outcome:
    """Result of a job. Weight digests: global parameter name -> digest of the whole tensor,
    assembled from all ranks. `checkpoint`: the folder saved at `save_at`."""

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)  # metrics of every step
    sample_ids: list[list[int]] = field(default_factory=list)  # of every step, in order
    validation: list[float] = field(default_factory=list)
    weights_at_start: dict[str, str] = field(default_factory=dict)
    weights_at_end: dict[str, str] = field(default_factory=dict)
    checkpoint: str = ""

    def between(self, first: int, last: int) -> "Outcome":
        """A copy with only the rows of steps `first` + 1 to `last`."""
        return replace(self, rows=[row for row in self.rows if first < row["step"] <= last])


def run_world(num_ranks: int, jobs: Sequence[Job], folder: Path, timeout: int) -> list[Outcome]:
    """Runs `jobs` on `num_ranks` processes with working directory `folder`. `timeout`: seconds per
    process. Raises RuntimeError with their output if a process fails."""
    with tempfile.TemporaryDirectory() as exchange, socket.socket() as probe:
        Path(exchange, "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes = []
        for rank in range(num_ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            variables |= {
                "WORLD_SIZE": num_ranks,
                "LOCAL_WORLD_SIZE": num_ranks,
                "MASTER_PORT": port,
            }
            variables |= {"OMP_NUM_THREADS": 1}
            command = [sys.executable, os.path.abspath(__file__), "--rank", exchange]
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=os.environ | {name: str(value) for name, value in variables.items()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            raise RuntimeError("\n".join(outputs))
        outcomes = json.loads(Path(exchange, "outcomes.json").read_text())
    return [Outcome(**outcome) for outcome in outcomes]


def difference(ours: Outcome, reference: Outcome, name: str) -> float:
    """Largest relative difference of a metric over all steps; both must have the same steps."""
    pairs = zip(ours.rows, reference.rows, strict=True)
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs)


# A rank -------------------------------------------------------------------------------------


def work(exchange: Path) -> None:
    """Main function of a rank: runs its jobs in order. COLLECTIVE."""
    from nemotron_train.platform.runtime import usable_platform

    platform = usable_platform(1)
    import torch.distributed as dist
    from megatron.core import parallel_state

    jobs = [Job(**job) for job in json.loads((exchange / "jobs.json").read_text())]
    outcomes = []
    for job in jobs:
        outcomes.append(asdict(_train(job, platform)))
        parallel_state.destroy_model_parallel()
        gc.collect()  # models and buffers form reference cycles
        if dist.get_rank() == 0:
            (exchange / "outcomes.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


def _train(job: Job, platform: Any) -> Outcome:
    import torch.distributed as dist
    from rich.console import Console

    from nemotron_train.compose.compose import compose_config
    from nemotron_train.data.open import open_data
    from nemotron_train.plan.derive import derive
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.run_folder.progress import Progress
    from nemotron_train.train.trainer import Trainer

    config = compose_config(job.overrides)
    derived = derive(config, int(os.environ["WORLD_SIZE"]))
    groups = process_groups.start(config.parallel, platform.backend)
    train_data, validation_data = open_data(config, lambda line: None)
    folder = Path("layouts") / job.name.replace(" ", "_")
    console = Console(quiet=True)
    trainer = Trainer(
        config, derived, platform, groups, train_data, validation_data, folder, console
    )
    progress = Progress(0, 0, train_data.state_at_start())
    if job.load:
        progress = trainer.checkpoints.load(Path(job.load))
        trainer.precision.weights_changed()
    outcome = Outcome(job.name, weights_at_start=weight_digests(trainer))
    while progress.step < job.steps:
        result = trainer.train_step(progress)
        outcome.sample_ids.append(_sample_ids(trainer, progress))
        progress = result.progress
        numbers = {name: float(value) for name, value in result.metrics.items()}
        outcome.rows.append({"step": progress.step, **numbers})
        if progress.step == job.save_at:
            outcome.checkpoint = str(trainer.checkpoints.save(progress))
    outcome.validation = trainer.validate()
    outcome.weights_at_end = weight_digests(trainer)
    dist.barrier()
    return outcome


def _sample_ids(trainer: Any, progress: Any) -> list[int]:
    """Sample ids of the step that starts at `progress`, ordered by the ranks' rows. COLLECTIVE."""
    import torch.distributed as dist

    batch, _ = trainer.train_data.take(
        progress.data, trainer.derived.sequences_per_step, trainer.train_step.rank_rows
    )
    local = (trainer.train_step.rank_rows[0], batch.sample_ids_B.tolist())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    return [number for _, ids in sorted(dict(gathered).items()) for number in ids]


def weight_digests(trainer: Any) -> dict[str, str]:
    """Global name -> SHA-256 of every parameter and buffer, assembled from all ranks' shards.
    Asserts that ranks that hold the same part hold the same values. COLLECTIVE."""
    import numpy as np
    import torch.distributed as dist

    from nemotron_train.check.state import model_metadata, weight_shards

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, weight_shards(trainer.chunks, model_metadata(trainer.groups)))
    tensors: dict[str, np.ndarray] = {}
    for shard in (shard for shards in gathered for shard in shards):
        tensor = tensors.setdefault(shard.name, np.full(shard.global_shape, np.nan, np.float32))
        sizes = zip(shard.offset, shard.values.shape, strict=True)
        part = tensor[tuple(slice(start, start + size) for start, size in sizes)]
        same = np.isnan(part) | (part == shard.values)
        assert same.all(), f"ranks differ in {shard.name}"
        part[...] = shard.values
    assert not any(np.isnan(tensor).any() for tensor in tensors.values()), "a part is on no rank"
    return {
        name: hashlib.sha256(tensor.tobytes()).hexdigest()[:16]
        for name, tensor in sorted(tensors.items())
    }


# The table ----------------------------------------------------------------------------------


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Losses of every layout against one rank's.")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="runs", help="where data and scratch files go")
    parser.add_argument("--only", nargs="*", default=list(LAYOUTS), help="names of layouts")
    parser.add_argument("overrides", nargs="*", help="for all runs, such as precision=bf16")
    arguments = parser.parse_intermixed_args()
    if arguments.rank:
        work(Path(arguments.rank))
        return
    folder = Path(arguments.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    common = [*TINY, "data.embedded_folder=data/python_stdlib", *arguments.overrides]
    (reference,) = run_world(1, [Job("one rank", common, 10)], folder, 600)
    selected = [name for name in LAYOUTS if name in arguments.only]
    print("| layout | ranks | " + " | ".join(COMPARED) + " | initial weights |")
    print("|---|---|" + "---|" * len(COMPARED) + "---|")
    for num_ranks in (2, 4):
        names = [name for name in selected if LAYOUTS[name][0] == num_ranks]
        jobs = [Job(name, common + LAYOUTS[name][1], 10) for name in names]
        outcomes = run_world(num_ranks, jobs, folder, timeout=3600) if jobs else []
        for outcome in outcomes:
            cells = [f"{difference(outcome, reference, name):.1e}" for name in COMPARED]
            same = outcome.weights_at_start == reference.weights_at_start
            cells.append("identical" if same else "DIFFER")
            print(f"| {outcome.name} | {num_ranks} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
