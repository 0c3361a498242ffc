"""Owns the word "cuda": which device this process computes on, and which kernels it can use.

`prepare()` must run before anything imports `megatron.core`: without a GPU it first puts the
CPU adaptations of `megatron_cpu` in place.
"""

import functools
import importlib.util
import logging
import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from nemotron_train.config.schema import Dtype
from nemotron_train.plan.hardware import Hardware, installed_versions

TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


@dataclass(frozen=True)
class Platform:
    """What this process runs on; every choice of kernels follows from it."""

    device: str  # "cuda" or "cpu"
    device_name: str
    backend: str  # torch.distributed backend: "nccl" or "gloo"
    transformer_engine: bool  # Transformer Engine's layers are used in the specs
    mamba_kernels: bool  # mamba_ssm's fused scan is used

    def describe(self) -> str:
        linears = "Transformer Engine" if self.transformer_engine else "Megatron-Core"
        scan = "mamba_ssm" if self.mamba_kernels else "chunked torch"
        return f"{self.device_name} · {self.backend} · linears: {linears} · Mamba-2: {scan}"


@functools.cache
def prepare(num_threads: int = 0) -> Platform:
    """Choose the device and make Megatron-Core importable on it.

    num_threads: CPU threads for torch; 0 leaves each rank its share of the cores.
    """
    _quiet_libraries()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        has_te = importlib.util.find_spec("transformer_engine") is not None
        has_mamba = importlib.util.find_spec("mamba_ssm") is not None
        return Platform("cuda", torch.cuda.get_device_name(), "nccl", has_te, has_mamba)
    from nemotron_train.platform import allocator, bfloat16_products, megatron_cpu

    megatron_cpu.install()
    if bfloat16_products.needed():
        bfloat16_products.install()
    allocator.keep_freed_memory()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_cores = len(os.sched_getaffinity(0))
    num_threads = num_threads or max(1, num_cores // local_ranks)
    torch.set_num_threads(num_threads)
    return Platform("cpu", f"CPU, {num_threads} threads a rank", "gloo", False, False)


def hardware(platform: Platform) -> Hardware:
    """This process's device, as `plan.guards` and `precision.backend` ask about it."""
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    version = installed_versions().get("transformer-engine", "0") if has_engine else None
    if platform.device == "cpu":
        return Hardware(platform.device_name, None, version)
    return Hardware(platform.device_name, torch.cuda.get_device_capability(), version)


def _quiet_libraries() -> None:
    """Drop what Megatron-Core and torch say about themselves at every start and step; anything
    about the user's run passes."""
    for message in (
        ".*is experimental and still under active development",
        ".*grad attribute of a Tensor that is not a leaf",
        ".*torch.distributed.* is deprecated",
        ".*argument order of load has been changed",
        ".*torch.distributed is disabled, unavailable or uninitialized",
        ".*(Transformer Engine and )?Apex (is|are) not installed",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in (
        "torch.utils.cpp_extension",  # "No CUDA runtime is found"
        "megatron.core.dist_checkpointing.strategies.torch",  # its own deprecations
        "megatron.core.dist_checkpointing.strategies.async_utils",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def parameter_device(on_cpu: bool) -> int | None:
    """Where a parameter is made: this process's GPU, or None, which leaves the choice to torch
    (the CPU, or the meta device where a caller has set it)."""
    return None if on_cpu else torch.cuda.current_device()


def wait_for_device() -> None:
    """SYNC: until all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_mark() -> Any:
    """A point in time on the device, for `seconds_between`: an event in a GPU's current stream,
    which waits for nothing; the clock on a CPU."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Between two marks of `time_mark`. SYNC: waits until a GPU has reached `end`."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def device_random_state() -> torch.Tensor:
    """State of the device's random generator; the CPU's where there is no other device."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def set_device_random_state(state: torch.Tensor) -> None:
    """The inverse of `device_random_state`."""
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: the device's allocator, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Dense BF16 peak of one device, operations a second, by a word of its name (vendor data sheets).
PEAK_FLOPS = {"GB300": 2.5e15, "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100": 989e12}
PEAK_FLOPS |= {"A100": 312e12}


def peak_flops() -> float:
    """Dense BF16 peak of this process's device; 0.0 where it is not known (a CPU, say)."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((rate for word, rate in PEAK_FLOPS.items() if word in name), 0.0)
