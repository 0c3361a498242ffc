"""The head exchange on this rank, compared with whole tensors. test_context.py starts one process
per rank. Argument: the number of heads that share one group.

Second truth: the whole sequence, drawn on every rank, and a second definition of the channels that
a head reads, head by head. Float64 and whole numbers, so that sums in any order are exact.
"""

import sys

import torch
import torch.distributed as dist

from nemotron_train.model.context import HeadExchange, piece

TOKENS, ROWS, HEADS, HEAD_WIDTH, STATE = 8, 3, 8, 2, 5


def drawn(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 9, shape, generator=generator).double()


def channels(rank: int, num_ranks: int, heads_a_group: int) -> tuple[list[int], list[int]]:
    """The channels of the rank's own heads, and the channels of the groups that those heads
    read."""
    heads = [head for head in range(HEADS) if head * num_ranks // HEADS == rank]
    groups = sorted({head // heads_a_group for head in heads})
    return (
        [head * HEAD_WIDTH + i for head in heads for i in range(HEAD_WIDTH)],
        [group * STATE + i for group in groups for i in range(STATE)],
    )


def places_of(x_channels: list[int], b_channels: list[int]) -> list[int]:
    return x_channels + [HEADS * HEAD_WIDTH + channel for channel in b_channels]


def main(heads_a_group: int) -> None:
    dist.init_process_group("gloo")
    group, rank, num_ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    num_groups = HEADS // heads_a_group
    exchange = HeadExchange(group, [(HEADS, HEAD_WIDTH), (num_groups, STATE)])
    x_SBW = drawn(1, TOKENS, ROWS, HEADS * HEAD_WIDTH)
    b_SBW = drawn(2, TOKENS, ROWS, num_groups * STATE)
    of_rank = [channels(r, num_ranks, heads_a_group) for r in range(num_ranks)]

    def mine(whole: torch.Tensor) -> torch.Tensor:
        return piece(whole.transpose(0, 1), group).transpose(0, 1).clone().requires_grad_()

    # Forward exchange: the whole sequence of the rank's heads and of the groups they read.
    own_x, own_b = mine(x_SBW), mine(b_SBW)
    there = exchange.to_heads(own_x, own_b)
    expected = torch.cat([x_SBW[..., of_rank[rank][0]], b_SBW[..., of_rank[rank][1]]], -1)
    assert torch.equal(there, expected)
    assert exchange.widths == [len(part) for part in of_rank[rank]]

    # Back: the rank's piece of the sequence for all heads.
    returned = exchange.to_tokens(there[..., : exchange.widths[0]])
    assert torch.equal(returned, own_x)

    # Gradients of all ranks that hold a channel add up.
    weights = [drawn(10 + r, TOKENS, ROWS, sum(map(len, of_rank[r]))) for r in range(num_ranks)]
    back = drawn(3, TOKENS, ROWS, HEADS * HEAD_WIDTH)
    ((there * weights[rank]).sum() + (returned * mine(back)).sum()).backward()
    grad_x, grad_b = back.clone(), torch.zeros_like(b_SBW)
    for weight, (x_channels, b_channels) in zip(weights, of_rank, strict=True):
        grad_x[..., x_channels] += weight[..., : len(x_channels)]
        grad_b[..., b_channels] += weight[..., len(x_channels) :]
    assert own_x.grad is not None and torch.equal(own_x.grad, mine(grad_x))
    assert own_b.grad is not None and torch.equal(own_b.grad, mine(grad_b))

    # A packed parameter: each rank takes its slices. Summed over the ranks, the gradient is that of
    # the whole.
    parameter = drawn(4, HEADS * HEAD_WIDTH + num_groups * STATE).requires_grad_()
    own = exchange.own(parameter, [0, 1])
    assert torch.equal(own, parameter[places_of(*of_rank[rank])])
    (own * weights[rank][0, 0]).sum().backward()
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    wanted = torch.zeros_like(parameter)
    for weight, of in zip(weights, of_rank, strict=True):
        wanted[places_of(*of)] += weight[0, 0]
    assert torch.equal(parameter.grad, wanted)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
