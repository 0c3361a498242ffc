"""How a parameter is sharded over tensor-parallel ranks, as attributes on the parameter itself.

The attributes are Megatron's: `tensor_model_parallel`, `partition_dim` and, for tensors packed from
several components that are sharded separately, `partition_sizes`. `shard_of` cuts a full tensor
accordingly. Initialization and checkpoint conversion both use it, so they agree on the layout.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def mark_sharded(
    parameter: torch.nn.Parameter, *, dim: int, components: list[int] | None = None
) -> None:
    """Mark `parameter` as sharded along `dim`.

    components: sizes along `dim` of the packed parts on one rank; None for a single part.
    """
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    if components is not None:
        parameter.partition_sizes = components  # type: ignore[attr-defined]


def full_shape(parameter: torch.nn.Parameter, num_shards: int) -> tuple[int, ...]:
    """Shape of the whole tensor of which `parameter` is one of `num_shards` shards."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= num_shards  # type: ignore[attr-defined]
    return tuple(shape)


def shard_of(
    full: torch.Tensor, parameter: torch.nn.Parameter, shard: int, num_shards: int
) -> torch.Tensor:
    """The part of the whole tensor `full` that `parameter` holds as shard number `shard`; `full`
    itself if the parameter is not sharded."""
    if num_shards == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    components = getattr(parameter, "partition_sizes", None)
    if components is None:
        return full.chunk(num_shards, dim)[shard]
    parts = full.split([size * num_shards for size in components], dim)
    return torch.cat([part.chunk(num_shards, dim)[shard] for part in parts], dim)


def split_components(
    sharded: ShardedTensor, parameter: torch.nn.Parameter, names: str
) -> ShardedTensorFactory:
    """A checkpoint entry for a packed tensor: one ShardedTensor `<key>.<name>` a component.

    names: one character a component. Each component is sharded separately, so storing the packed
    tensor as one would be wrong under another tensor-parallel size.
    """
    sizes: list[int] = parameter.partition_sizes  # type: ignore[attr-defined]
    assert len(names) == len(sizes) and sharded.data is not None
    fragmentations = sharded.axis_fragmentations
    assert fragmentations is not None
    offset_axis = sharded.prepend_axis_num
    rank_offset = sharded.global_offset[offset_axis] // sharded.local_shape[0]
    num_shards = fragmentations[offset_axis]
    prepended = [
        (axis, sharded.global_offset[axis], fragmentations[axis]) for axis in range(offset_axis)
    ]

    def build(
        key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None
    ) -> dict[str, ShardedTensor]:
        assert flattened_range is None, "the optimizer's state is stored per whole parameter"
        return {
            name: ShardedTensor.from_rank_offsets(
                f"{key}.{name}",
                part.contiguous(),
                *prepended,
                (offset_axis, rank_offset, num_shards),
                replica_id=replica_id,
                prepend_axis_num=offset_axis,
            )
            for name, part in zip(names, tensor.split(sizes, dim=0), strict=True)
        }

    def merge(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([parts[name] for name in names])

    return ShardedTensorFactory(sharded.key, sharded.data, build, merge, sharded.replica_id)
