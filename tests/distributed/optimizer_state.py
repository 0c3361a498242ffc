"""Trains two steps and, at the save, compares the optimizer's state as we describe it with what
Megatron's own method gathers on every rank. Called by test_optimizer_state.py with knobs."""

import sys
from typing import Any

import torch
import torch.distributed as dist

from nemotron_train.cli.main import main
from nemotron_train.platform import device

device.prepare(1)  # before anything imports Megatron-Core

from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

from nemotron_train.optim import build, sharded_state  # noqa: E402

gathered_by_megatron = DistributedOptimizer.sharded_param_state_fully_reshardable
counts = {"compared": 0, "exchanged": 0}


def stream_and_compare(optimizer: Any) -> None:
    sharded_state.stream_state(optimizer)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        ours = part.sharded_param_state_fully_reshardable

        def both(model_state: Any, is_loading: bool, metadata: Any, part: Any = part, ours=ours):
            state = ours(model_state, is_loading, metadata)
            if not is_loading:
                compare(part, state, gathered_by_megatron(part, model_state, False, metadata))
            return state

        part.sharded_param_state_fully_reshardable = both


def compare(part: Any, state: Any, expected: Any) -> None:
    group = part.data_parallel_group
    owned: list[Any] = [None] * group.size()
    dist.all_gather_object(owned, sorted(state), group=group)
    numbers = [number for rank in owned for number in rank]
    assert sorted(numbers) == sorted(expected), "every parameter has one owner"
    holders = [held.parts for held in sharded_state._held_parameters(part)]
    counts["exchanged"] += sum(len(parts) > 1 for parts in holders)
    for number, tensors in state.items():
        assert tensors.keys() == expected[number].keys()
        for name, entry in tensors.items():
            other = expected[number][name]
            assert entry.key == other.key and torch.equal(entry.data.cpu(), other.data)
            assert entry.replica_id == (*other.replica_id[:-1], 0)
            if not isinstance(entry, ShardedTensorFactory):
                assert entry.global_offset == other.global_offset
                assert entry.global_shape == other.global_shape
            counts["compared"] += 1


if __name__ == "__main__":
    build.stream_state = stream_and_compare
    code = main(["pretrain", *sys.argv[1:]])
    assert code == 3, code
    print(counts)
    assert counts["compared"] and counts["exchanged"], counts
