"""Where and how large the stages run: the device, a folder for runs, sizes, verbs, clocks."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# A model of every kind of layer that steps in half a second on a pretended device.
_SMALL_MODEL = (
    "model.pattern=MEM*E",
    "model.hidden_size=64",
    "model.attention.heads=4",
    "model.attention.key_value_heads=2",
    "model.attention.head_dim=16",
    "model.mamba.heads=8",
    "model.mamba.head_dim=16",
    "model.mamba.state_size=16",
    "model.mamba.groups=2",
    "model.mamba.chunk_size=16",
    "model.moe.experts=8",
    "model.moe.experts_per_token=2",
    "model.moe.expert_hidden_size=32",
    "model.moe.shared_expert_hidden_size=64",
    "model.moe.latent_size=32",
)
_SMALL_BATCH = (
    "train.sequence_length=64",
    "train.global_batch_tokens=256",
    "train.micro_batch_sequences=2",
    "train.validation_tokens=512",
    "train.threads=1",
)
_PROXY = ("model=proxy_100m", "optim=proxy_100m", "train=proxy_100m", "precision=bf16")
# 1.0B parameters, 0.45B active: the proxy three times as wide, with Nano's Mamba state.
_BILLION = (
    "model.name=shape_1b",
    "model.hidden_size=1536",
    "model.vocab_size=32768",
    "model.attention.heads=16",
    "model.attention.key_value_heads=4",
    "model.attention.head_dim=96",
    "model.mamba.heads=48",
    "model.mamba.head_dim=64",
    "model.mamba.groups=8",
    "model.mamba.state_size=128",
    "model.moe.expert_hidden_size=1024",
    "model.moe.shared_expert_hidden_size=2048",
    "model.moe.latent_size=384",
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the stages. Steps: (warm-up, measured). tokens x width: of the kernels' matrices.
    scan: batch, tokens, heads, head width, groups, state and chunk."""

    default_run: tuple[str, ...]
    shapes: Mapping[str, tuple[str, ...]]
    steps: tuple[int, int]
    tokens: int
    width: int
    code_rows: int
    code_columns: int
    scan: tuple[int, int, int, int, int, int, int]
    compared_scan: tuple[int, int, int, int, int, int, int]
    new_tokens: int


_SHORT_RUN = ("train.save_every_steps=8", "train.validate_every_steps=0")
FULL = Sizes(
    default_run=(
        *_SHORT_RUN,
        "train.total_tokens=65536",
        "train.validation_tokens=8192",
        "optim.warmup_tokens=8192",
        "optim.decay_tokens=16384",
    ),
    shapes={
        "proxy_100m": (*_PROXY, "train.global_batch_tokens=65536"),
        "1B": (
            *_PROXY,
            *_BILLION,
            "train.global_batch_tokens=16384",
            "train.micro_batch_sequences=4",
        ),
    },
    steps=(3, 6),
    tokens=16384,
    width=8192,
    code_rows=1000,  # no multiple of a block, like the columns
    code_columns=2040,
    scan=(4, 4096, 64, 64, 8, 128, 128),
    compared_scan=(2, 1000, 16, 64, 4, 128, 128),
    new_tokens=32,
)
SMALL = Sizes(
    default_run=(
        *_SHORT_RUN,
        *_SMALL_MODEL,
        *_SMALL_BATCH,
        "train.total_tokens=4096",
        "optim.warmup_tokens=512",
        "optim.decay_tokens=1024",
    ),
    shapes={
        name: (*_PROXY, *_SMALL_MODEL, *_SMALL_BATCH, *more)
        for name, more in {
            "proxy_100m": ("model.vocab_size=512",),
            "1B": ("model.vocab_size=512", "model.hidden_size=96"),
        }.items()
    },
    steps=(1, 2),
    tokens=32,
    width=256,
    code_rows=18,
    code_columns=44,
    scan=(1, 64, 4, 16, 2, 16, 16),
    compared_scan=(2, 70, 4, 16, 2, 16, 32),
    new_tokens=8,
)


@dataclass(frozen=True)
class Setting:
    """The device and the scratch folder. pretend: the device is pretended and sizes are small."""

    work: Path
    pretend: bool = False

    @property
    def sizes(self) -> Sizes:
        """The sizes of this device."""
        return SMALL if self.pretend else FULL

    def verb(self, *words: str) -> list[str]:
        """The command of a verb of nemotron-train on this device."""
        module = "tests.platform.pretend.run" if self.pretend else "nemotron_train"
        return [sys.executable, "-m", module, *words]

    def environment(self) -> dict[str, str]:
        """Variables of a verb's process, which runs in `work`.

        All processes share what Triton has compiled. mamba_ssm's kernels have 201 configurations
        between them; compiling these for each width and dtype would take minutes, so each kernel
        gets one, the smallest, and adds without atomics. Its figures are therefore lower bounds."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        found = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        found.setdefault("TRITON_CACHE_DIR", str(self.work / "triton"))
        found.setdefault("MAMBA_DETERMINISTIC", "1")
        found.pop("TRITON_CACHE_AUTOTUNING", None)  # with it mamba_ssm keeps all configurations
        found.pop("TRITON_INTERPRET", None)
        return found

    def run(self, *words: str) -> str:
        """Run a verb to its end and return what it printed. Raises RuntimeError with the last lines
        if it does not end with 0."""
        done = subprocess.run(
            self.verb(*words),
            cwd=self.work,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        print(done.stdout, flush=True)
        if done.returncode:
            last = "\n".join(done.stdout.splitlines()[-5:])
            raise RuntimeError(f"{' '.join(words[:2])} ended with {done.returncode}: {last}")
        return done.stdout

    def seconds(self, function: Callable[[], object]) -> float:
        """Seconds of one call: on a GPU the median over repetitions with a cold cache, else one
        call by the clock."""
        if not self.pretend:
            from triton.testing import do_bench

            median: Any = do_bench(function, warmup=20, rep=60, return_mode="median")
            return median / 1e3
        function()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


def first_line(error: BaseException) -> str:
    """The kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def joined(words: Sequence[str], limit: int = 3) -> str:
    """The first words with commas, and how many more there are."""
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
