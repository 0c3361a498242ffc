"""The chosen experts of a few tokens against `routed_mlp`, the function used in training.

Not covered: a GPU, where decoding uses `routed_mlp` too.
"""

import pytest
import torch

from nemotron_train.model.moe import decoding as module
from nemotron_train.model.moe.core import routed_mlp
from nemotron_train.model.moe.decoding import are_few, few_experts


@pytest.mark.parametrize("copied", [0, 1 << 30])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_few_experts(
    num_tokens: int,
    dtype: torch.dtype,
    bound: float,
    copied: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both implementations, with tokens that share experts."""
    monkeypatch.setattr(module, "_COPIED", copied)
    generator = torch.Generator().manual_seed(0)
    experts, choices, width, hidden = 8, 3, 24, 40
    x = torch.randn(num_tokens, width, generator=generator).to(dtype)
    w1 = torch.randn(experts, hidden, width, generator=generator).mul_(0.2).to(dtype)
    w2 = torch.randn(experts, width, hidden, generator=generator).mul_(0.2).to(dtype)
    chosen = torch.stack(
        [torch.randperm(experts, generator=generator)[:choices] for _ in range(num_tokens)]
    )
    p = torch.rand(num_tokens, choices, generator=generator)
    theirs, _ = routed_mlp(x, chosen, p, w1, w2)
    with torch.no_grad():
        assert are_few(x, chosen)
        ours = few_experts(x, chosen, p, w1, w2)
    assert not are_few(x, chosen), "not where gradients are wanted"
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=bound * theirs.abs().max().item(), rtol=0)
