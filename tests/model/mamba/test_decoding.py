"""The token-by-token recurrence against the chunked scan in FP64 from the same initial state.

Not covered: attention over the KV cache and whole layers (tests/generate).
"""

import pytest
import torch

from nemotron_train.model.mamba.core import ssd
from nemotron_train.model.mamba.decoding import ssd_steps


def inputs(tokens: int) -> list[torch.Tensor]:
    """x, dt, A, B, C, D and an initial state: 2 sequences, 6 heads of 5 channels, 2 groups of 3."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [
        normal(2, tokens, 6, 5),
        normal(2, tokens, 6).exp() * 0.3,
        -normal(6).exp(),
        normal(2, tokens, 2, 3),
        normal(2, tokens, 2, 3),
        normal(6),
        normal(2, 6, 5, 3),
    ]


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_steps_are_the_recurrence(tokens: int) -> None:
    *rest, initial = inputs(tokens)
    y, states = ssd_steps(*rest, initial)
    wanted, final = ssd(
        *rest, chunk_size=4, initial_state_BHPN=initial, return_final_state=True, force_torch=True
    )
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(states[-1], final, atol=1e-12, rtol=1e-10)
    again, _ = ssd_steps(*(t[:, :1] if t.ndim > 1 else t for t in rest), initial)
    assert torch.equal(again, y[:, :1]), "a token does not feel those behind it, in any bit"
