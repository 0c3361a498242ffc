"""Owns the word "cuda": which device this process computes on, and which kernels it can use.

`prepare()` must run before anything imports `megatron.core`: without a GPU it first puts the
CPU adaptations of `megatron_cpu` in place.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch


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
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        has_te = importlib.util.find_spec("transformer_engine") is not None
        has_mamba = importlib.util.find_spec("mamba_ssm") is not None
        return Platform("cuda", torch.cuda.get_device_name(), "nccl", has_te, has_mamba)
    from nemotron_train.platform import megatron_cpu

    megatron_cpu.install()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_cores = len(os.sched_getaffinity(0))
    num_threads = num_threads or max(1, num_cores // local_ranks)
    torch.set_num_threads(num_threads)
    return Platform("cpu", f"CPU, {num_threads} threads a rank", "gloo", False, False)


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: the device's allocator, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
