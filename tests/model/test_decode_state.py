"""A speculative decode batch rewound to any of its tokens, against states that ended there."""

import torch

from nemotron_train.model.decode_state import DecodeStates, MambaState


def test_rewind_returns_to_any_token() -> None:
    """The sequences of a batch rewind to different tokens, one of them to before the batch."""
    states = DecodeStates(3)
    window, ssm = torch.randn(3, 3, 4), torch.randn(3, 2, 2, 2)
    states.mamba[1] = state = MambaState(ssm, window)
    new = states.next_batch([4, 4, 4], torch.device("cpu"), speculative=True)
    fresh = torch.randn(3, 4, 4)
    state.update_window(torch.cat([window, fresh], dim=1), new)
    steps = [ssm, *(torch.randn(3, 2, 2, 2) for _ in range(4))]
    state.steps, state.ssm_BHPN = steps, steps[-1]
    states.rewind([0, 2, 4])
    assert states.lengths == [0, 2, 4]
    for row, kept in enumerate([0, 2, 4]):
        assert torch.equal(state.ssm_BHPN[row], steps[kept][row])
        seen = torch.cat([window[row], fresh[row, :kept]])
        assert torch.equal(state.window_BKC[row], seen[-3:])
