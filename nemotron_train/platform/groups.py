"""Process groups: start and stop of torch.distributed and Megatron-Core's parallel groups.

A single process is a world of one rank, so the same code runs everywhere. Does not own: the layout
arithmetic (`plan.derive` checks divisibility).
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from nemotron_train.config.errors import ConfigError, RendezvousFailed
from nemotron_train.config.schema import ParallelConfig
from nemotron_train.platform.device import own_device
from nemotron_train.platform.local_ranks import free_port

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def num_ranks() -> int:
    """World size set by the launcher (torchrun, srun); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _meet(rendezvous_seconds: int) -> tuple[Any, int, int]:
    """Return the launcher's store, this rank and the number of ranks. Waits until rank 0 can be
    reached; rank 0 itself waits for all other ranks. Raises RendezvousFailed on a timeout."""
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    rank, ranks = os.environ["RANK"], os.environ.get("WORLD_SIZE", "?")
    try:
        return next(iter(rendezvous("env://", timeout=timedelta(seconds=rendezvous_seconds))))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).splitlines()[0].split())
        raise RendezvousFailed(
            f"rank {rank} of {ranks} could not meet the others at {address} "
            f"(MASTER_ADDR:MASTER_PORT) within train.rendezvous_seconds={rendezvous_seconds}: "
            f"{reason}"
        ) from error


def start(
    parallel: ParallelConfig,
    backend: str,
    rendezvous_seconds: int = 300,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> ProcessGroupCollection:
    """Start the process groups of `parallel` and return them; COLLECTIVE.

    backend: "nccl" or "gloo". A collective that waits longer than `timeout` raises an error; on a
    GPU it ends the process. Without a launcher, a store on the loopback address serves one rank.
    Raises RendezvousFailed if the ranks cannot connect within `rendezvous_seconds`.
    """
    if not dist.is_initialized():
        if "RANK" in os.environ:
            store, rank, ranks = _meet(rendezvous_seconds)
            store.set_timeout(timeout)
        else:
            store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                "127.0.0.1", free_port(), 1, is_master=True
            )
            rank, ranks = 0, 1
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timeout,
            # NCCL then connects here, not in the first step, and barriers need not guess a device.
            device_id=own_device() if backend == "nccl" else None,
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
    return ProcessGroupCollection.use_mpu_process_groups()


def stop() -> None:
    """Destroy Megatron's groups and torch.distributed's. Does nothing if none are initialized."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum `tensor` in place over `group` and return it; COLLECTIVE."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def from_first_rank(tensor: torch.Tensor) -> torch.Tensor:
    """Broadcast rank 0's values of a tensor that has the same shape on all ranks; COLLECTIVE.

    Overwrites `tensor` if it is contiguous; returns it (or a contiguous copy)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def raise_together(problem: str, error: type[Exception] = ConfigError) -> None:
    """Raise `error` on every rank if `problem` is not empty on rank 0; COLLECTIVE.

    If only rank 0 raised, the others would wait in their next collective until it times out.
    """
    message = [problem]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise error(message[0])
