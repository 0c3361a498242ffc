"""The parts that only generation uses: experts of a few tokens, the recurrence step by step, and
returning to an earlier token.

Second truths: `routed_mlp`, `ssd` in FP64 from the same initial state, the states of a pass that
ended there. Attention over the cache is covered whole, by tests/generate.
"""

import pytest
import torch

from nemotron_train.model import few_experts as module
from nemotron_train.model.decode_state import DecodeStates, MambaState
from nemotron_train.model.few_experts import are_few, few_experts
from nemotron_train.model.grouped_mlp import routed_mlp
from nemotron_train.model.ssd import ssd
from nemotron_train.model.ssd_steps import ssd_steps


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
    """Both ways, with tokens that share experts."""
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


def inputs(tokens: int) -> list[torch.Tensor]:
    """x, dt, A, B, C, D and an initial state: 2 sequences, 6 heads of 5, 2 groups of 3."""
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


def test_keep_returns_to_any_token() -> None:
    """Sequences of one batch to different ones, none of the pass's tokens included."""
    states = DecodeStates(3)
    window, ssm = torch.randn(3, 3, 4), torch.randn(3, 2, 2, 2)
    states.mamba[1] = state = MambaState(ssm, window)
    new = states.new_tokens([4, 4, 4], torch.device("cpu"), may_be_taken_back=True)
    fresh = torch.randn(3, 4, 4)
    state.take(torch.cat([window, fresh], dim=1), new)
    steps = [ssm, *(torch.randn(3, 2, 2, 2) for _ in range(4))]
    state.steps, state.ssm_BHPN = steps, steps[-1]
    states.keep([0, 2, 4])
    assert states.lengths == [0, 2, 4]
    for row, kept in enumerate([0, 2, 4]):
        assert torch.equal(state.ssm_BHPN[row], steps[kept][row])
        seen = torch.cat([window[row], fresh[row, :kept]])
        assert torch.equal(state.window_BKC[row], seen[-3:])
