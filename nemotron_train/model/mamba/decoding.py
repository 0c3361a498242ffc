"""The recurrence of SSD (arXiv 2405.21060, eq. 1) token by token, for a few new tokens.

Owns: the step in FP32, and the state after each token (speculative decoding may rewind to any of
them). Does not own: many tokens at once (`core.ssd`), gradients (generation needs none).

Each token takes the same operations whatever the number of new tokens. A speculative batch
therefore gives bit for bit the states that decoding one token at a time gives.

Shapes: B sequences, n tokens, H heads of P channels, G groups of state size N, J = H / G.
"""

import torch
from torch import Tensor

MOST_TOKENS = 16  # new tokens of a sequence; for more, the chunked form is faster


def ssd_steps(
    x_BnHP: Tensor,
    dt_BnH: Tensor,
    A_H: Tensor,
    B_BnGN: Tensor,
    C_BnGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The recurrence of `core.ssd`, with its arguments: y [B, n, H, P] in x's dtype, and the state
    after each token as n new tensors [B, H, P, N] in dt's dtype. `state_BHPN` is not changed."""
    num_tokens, num_groups = x_BnHP.shape[1], B_BnGN.shape[2]
    wide = dt_BnH.dtype
    x = x_BnHP.to(wide)
    B, C = B_BnGN.to(wide), C_BnGN.to(wide)
    decay_BnH11 = torch.exp(dt_BnH * A_H)[..., None, None]
    written_BnHP1 = (x * dt_BnH.unsqueeze(-1)).unsqueeze(-1)
    heads = x.shape[2] // num_groups
    # Repeat B and C of a group for each of its heads.
    B_BnH1N, C_BnHN1 = (
        t.unsqueeze(3).expand(*t.shape[:3], heads, -1).flatten(2, 3) for t in (B, C)
    )
    B_BnH1N, C_BnHN1 = B_BnH1N.unsqueeze(-2), C_BnHN1.unsqueeze(-1)
    states, y_BnHP = [], torch.empty_like(x)
    for token in range(num_tokens):
        state_BHPN = torch.addcmul(
            state_BHPN * decay_BnH11[:, token], written_BnHP1[:, token], B_BnH1N[:, token]
        )
        states.append(state_BHPN)
        y_BnHP[:, token] = torch.matmul(state_BHPN, C_BnHN1[:, token]).squeeze(-1)
    return y_BnHP.addcmul_(x, D_H.unsqueeze(-1)).to(x_BnHP.dtype), states
