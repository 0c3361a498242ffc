"""The device of this process, and the kernels that it can use.

Owns: every use of `torch.cuda` outside `megatron_cpu`. `prepare()` must run before anything imports
`megatron.core`: without a GPU it first installs the CPU adaptations of `megatron_cpu`.
"""

import dataclasses
import functools
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nemotron_train.config.schema import Dtype
from nemotron_train.plan.hardware import Hardware, installed_versions, peak_bf16_flops
from nemotron_train.plan.switches import ALL_OFF, MAMBA_SSM, TRANSFORMER_ENGINE, Switches
from nemotron_train.platform import packages
from nemotron_train.platform.cores import usable_cores

TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


@dataclass(frozen=True)
class Platform:
    """The device and libraries of this process. Every choice of kernels depends on it."""

    device: str  # "cuda" or "cpu"
    device_name: str
    backend: str  # torch.distributed backend: "nccl" or "gloo"
    transformer_engine: bool  # layer specs use Transformer Engine's modules
    mamba_kernels: bool  # use mamba_ssm's fused scan
    switches: Switches = ALL_OFF

    def describe(self) -> str:
        """One line with the device, the backend and the implementations of linears and Mamba-2."""
        linears = "Transformer Engine" if self.transformer_engine else "Megatron-Core"
        own = "chunked torch" if self.device == "cpu" else "own kernels"
        scan = "mamba_ssm" if self.mamba_kernels else own
        return f"{self.device_name} · {self.backend} · linears: {linears} · Mamba-2: {scan}"


def prepare(num_threads: int = 0) -> Platform:
    """Choose the device, make Megatron-Core importable on it, and set torch's threads.

    num_threads: CPU threads for torch; 0 gives each rank of this machine an equal share of the
    cores. Every call sets them anew: the order of sums depends on them, so a run must not inherit
    those of whatever ran in this process before. On a GPU it names no optional package:
    `with_packages` adds those that can be used.
    """
    platform = _chosen_device()
    if platform.device != "cpu":
        return platform
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_threads = num_threads or max(1, usable_cores() // local_ranks)
    torch.set_num_threads(num_threads)
    return dataclasses.replace(platform, device_name=f"CPU, {num_threads} threads a rank")


@functools.cache
def _chosen_device() -> Platform:
    """The device, chosen and prepared once a process."""
    _quiet_libraries()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        _state_product_precision()
        return Platform("cuda", torch.cuda.get_device_name(), "nccl", False, False)
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    from nemotron_train.platform import allocator, bfloat16_products, megatron_cpu

    megatron_cpu.install()
    if bfloat16_products.needed():
        bfloat16_products.install()
    allocator.keep_freed_memory()
    return Platform("cpu", "CPU", "gloo", False, False)


def with_packages(platform: Platform, problems: Mapping[str, str]) -> Platform:
    """`platform` with the optional packages that can be used. problems: of those that cannot
    (`packages.problems`). No effect on a CPU."""
    if platform.device == "cpu":
        return platform
    return dataclasses.replace(
        platform,
        transformer_engine=TRANSFORMER_ENGINE not in problems,
        mamba_kernels=MAMBA_SSM not in problems,
    )


def _state_product_precision() -> None:
    """State torch's flags, whose defaults have changed between releases. FP32 products use no TF32,
    since FP32 is the reference here. BF16 products are summed in FP32 and rounded once, as
    emulation and its tests assume; by default cuBLAS may sum parts of a long product in BF16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def hardware(platform: Platform) -> Hardware:
    """Facts about this process's device, for `plan.guards` and `plan.backend`. Transformer Engine
    counts if it is found; `packages` says later whether it can be used."""
    version = None
    if packages.is_installed("transformer_engine"):
        version = installed_versions().get("transformer-engine", "0")
    if platform.device == "cpu":
        return Hardware(platform.device_name, None, version)
    return Hardware(platform.device_name, torch.cuda.get_device_capability(), version)


def _quiet_libraries() -> None:
    """Silence warnings of Megatron-Core and torch about their own internals. Warnings about the
    user's run are still shown."""
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
    """The device for a new parameter: this process's GPU, or None if `on_cpu`. None means torch's
    default device (the CPU, or the meta device if a caller has set it)."""
    return None if on_cpu else torch.cuda.current_device()


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor`, which is on the CPU, on `device`, without waiting for the copy: it is pinned first,
    because a copy from pageable memory makes the host wait for all queued work."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pinned(array: np.ndarray) -> np.ndarray:
    """A copy of `array` in pinned host memory: `to_device` then copies from there."""
    return torch.from_numpy(array).pin_memory().numpy()


def use_in_thread(own: torch.device | None) -> None:
    """Let a new thread use this process's GPU (`own_device`). Each thread begins with the first GPU
    of the machine, on which it would take memory."""
    if own is not None:
        torch.cuda.set_device(own)


def wait_for_device() -> None:
    """SYNC: wait until the GPU has finished all queued work. Does nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_mark() -> Any:
    """A time stamp for `seconds_between`. On a GPU: an event recorded in the current stream,
    without synchronization. On a CPU: the clock in seconds."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds between two results of `time_mark`. SYNC: waits until the GPU has reached `end`."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def device_kind() -> str:
    """ "cuda" if this process computes on a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_random_state() -> torch.Tensor:
    """State of the GPU's random generator, or of the CPU's if there is no GPU."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def set_device_random_state(state: torch.Tensor) -> None:
    """Restore a state returned by `device_random_state`."""
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def peak_memory_bytes() -> int:
    """Peak memory of this process so far, in bytes: of the GPU allocator, or the resident set on a
    CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops() -> float:
    """Dense BF16 peak of this process's device in FLOP/s; 0.0 if unknown, as for a CPU."""
    return peak_bf16_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else 0.0


def own_device() -> torch.device | None:
    """This process's GPU, with its number; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())
