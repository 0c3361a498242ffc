"""One rank of test_uneven.py: parts of different lengths are gathered and reduce-scattered, forward
and backward. Argument: a file in which the first rank writes how gloo itself responds to uneven
parts.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nemotron_train.platform import device

SIZES = [3, 0, 5]


def main() -> None:
    device.prepare(1)
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    full = torch.arange(16.0).view(8, 2)
    part = full.split(SIZES)[rank].clone().requires_grad_()
    whole = gather_from_sequence_parallel_region(part, group=group, output_split_sizes=SIZES)
    assert torch.equal(whole, full)
    whole.backward(full * (rank + 1))  # the ranks' gradients add up: 1 + 2 + 3
    assert part.grad is not None and torch.equal(part.grad, full.split(SIZES)[rank] * 6)

    own = (full * (rank + 1)).requires_grad_()
    reduced = reduce_scatter_to_sequence_parallel_region(own, group=group, input_split_sizes=SIZES)
    assert torch.equal(reduced, full.split(SIZES)[rank] * 6)
    reduced.backward(full.split(SIZES)[rank])
    assert own.grad is not None and torch.equal(own.grad, full)
    try:
        parts = list(torch.empty(8, 2).split(SIZES))
        dist.all_gather(parts, full.split(SIZES)[rank].contiguous())
        answer = ""
    except RuntimeError as error:
        answer = str(error)
    if rank == 0:
        Path(sys.argv[1]).write_text(answer)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
