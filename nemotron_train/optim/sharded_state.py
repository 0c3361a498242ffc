"""The distributed optimizer's state in a checkpoint, without gathering it.

Owns: which data-parallel rank writes the state of which parameter, and the exchange of the few
parameters that several ranks hold a part of. The names and shapes of the entries are Megatron's
("fully_reshardable"), so its own checkpoints and ours can be exchanged.

UPSTREAM(megatron-core 0.19.2): Megatron gathers the whole state on every data-parallel rank before
a save, and allocates it there before a load: 12 bytes for each parameter of the model-parallel
shard in host memory, and a bucket of it on the GPU. Here a rank holds, besides its own part, one
parameter at a time. A bucket is cut into equal parts without regard to its parameters, so only the
first and the last parameter of a part, and those larger than a part, lie on several ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_PREFIX = "optimizer.state"


@dataclass(frozen=True)
class _Held:
    """The ranks of the data-parallel group that hold a part of one parameter.

    parts: rank of the group -> (start, end), elements of the flattened parameter.
    """

    parameter: torch.nn.Parameter
    parts: dict[int, tuple[int, int]]

    @property
    def owner(self) -> int:
        """The rank that writes the parameter's state: the one with the largest part."""
        return max(self.parts, key=lambda rank: (self.parts[rank][1] - self.parts[rank][0], -rank))


def stream_state(optimizer: MegatronOptimizer) -> None:
    """Let the distributed parts of `optimizer` describe their state as this module does."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            part.sharded_param_state_fully_reshardable = partial(_sharded_state, part)  # type: ignore


def _held_parameters(part: DistributedOptimizer) -> Iterator[_Held]:
    """All parameters of the optimizer, in the order in which Megatron numbers them."""
    for buffer in part.buffers:
        num_ranks = buffer.data_parallel_group.size()
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            size = bucket.grad_data.numel() // num_ranks
            first, last = start - bucket.offset, end - bucket.offset
            parts = {
                rank: (max(first, rank * size) - first, min(last, (rank + 1) * size) - first)
                for rank in range(first // size, (last - 1) // size + 1)
            }
            yield _Held(parameter, parts)


def _sharded_state(
    part: DistributedOptimizer,
    model_state: Any,
    is_loading: bool = False,
    metadata: dict | None = None,
) -> dict[int, dict[str, Any]]:
    """Number of a parameter -> name of a state -> ShardedTensor of the parameter's shape.

    To save: the parameters that this rank writes. To load: those that this rank holds a part of, in
    new tensors on the CPU. COLLECTIVE over the data-parallel ranks if it is to save.
    """
    assert part.distributed_optimizer_instance_id == 0, "one optimizer instance a model"
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {entry.data: entry for entry in nested_values(entries)}
    rank = part.data_parallel_group.rank()
    names = ("param", *part.optimizer_state_keys)
    state: dict[int, dict[str, Any]] = {}
    for number, held in enumerate(_held_parameters(part)):
        if is_loading:
            wanted = names if rank in held.parts else ()
            tensors = {name: torch.empty(held.parameter.shape) for name in wanted}
        else:
            tensors = _gathered(part, held, names)
        if not tensors:
            continue
        entry = by_parameter[held.parameter]
        # Megatron writes the entry whose numbers are all zero; the last one counts the replicas.
        is_copy = 0 if rank == held.owner else 1 + rank
        state[number] = {
            name: _entry(entry, name, tensor, (*entry.replica_id[:-1], is_copy))
            for name, tensor in tensors.items()
        }
    return state


def _entry(entry: Any, name: str, tensor: torch.Tensor, replica_id: tuple[int, ...]) -> Any:
    fields = {"key": f"{_PREFIX}.{name}.{entry.key}", "data": tensor, "replica_id": replica_id}
    if not isinstance(entry, ShardedTensorFactory):
        fields["dtype"] = tensor.dtype
    made = replace(entry, **fields)
    made.validate_metadata_integrity()
    return made


def _gathered(
    part: DistributedOptimizer, held: _Held, names: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The whole states of a parameter on its owner; {} on the other ranks. COLLECTIVE over the
    ranks that hold a part."""
    group = part.data_parallel_group
    rank = group.rank()
    if rank not in held.parts:
        return {}
    own: dict[str, torch.Tensor] = part._get_main_param_and_optimizer_states(held.parameter)
    if len(held.parts) == 1:
        return {name: own[name].detach().view(held.parameter.shape) for name in names}
    whole: dict[str, torch.Tensor] = {}
    for name in names:
        values = own[name].detach().contiguous().view(-1)
        if rank != held.owner:
            peer = dist.get_global_rank(group, held.owner)
            _wait([dist.P2POp(dist.isend, values, peer, group)])
            continue
        received = torch.empty(held.parameter.numel(), dtype=values.dtype, device=values.device)
        operations = [
            dist.P2POp(dist.irecv, received[begin:end], dist.get_global_rank(group, other), group)
            for other, (begin, end) in held.parts.items()
            if other != rank
        ]
        begin, end = held.parts[rank]
        received[begin:end] = values
        _wait(operations)
        # One parameter at a time is held on the device.
        whole[name] = received.view(held.parameter.shape).cpu()
    return whole


def _wait(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
