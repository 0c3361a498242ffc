"""The state-space recurrence of Mamba-2 in its definition, one token at a time: the second truth of
the tests of the scans, and their random inputs.

Shapes: `nemotron_train/model/mamba/core.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("x", "dt", "A", "B", "C", "D", "initial")


class Shape(NamedTuple):
    batch: int = 2
    length: int = 37
    heads: int = 6
    head_dim: int = 5
    groups: int = 2
    state: int = 3


def make_inputs(shape: Shape, dt_scale: float = 0.3, seed: int = 0) -> list[Tensor]:
    """x, dt, A, B, C, D and an initial state, float64. dt A spreads over two decades."""
    b, s, h, p, g, n = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    dt = normal(b, s, h).exp() * dt_scale
    return [
        normal(b, s, h, p),
        dt,
        -normal(h).exp(),
        normal(b, s, g, n),
        normal(b, s, g, n),
        normal(h),
        normal(b, h, p, n),
    ]


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time."""
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) if initial is None else initial
    outputs = []
    for t in range(x.shape[1]):
        if ids is not None and t > 0:
            state = state * (ids[:, t] == ids[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def documents(starts: list[list[int]], length: int) -> Tensor:
    """Document ids from the positions, row by row, at which a new document starts."""
    ids = torch.zeros(len(starts), length, dtype=torch.int64)
    for row, positions in enumerate(starts):
        for position in positions:
            ids[row, position:] += 1
    return ids
