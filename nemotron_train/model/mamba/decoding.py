"""The recurrence of SSD (arXiv 2405.21060, eq. 1) token by token, for passes of a few tokens.

Owns: the step in FP32, and the states after each token where a pass may be taken back. Does not
own: long passes (`ssd`), gradients: generation needs none.

Each token costs the same operations whatever the number of tokens in the pass, so a pass over
drafted tokens gives the states that single tokens give.

Shapes: B sequences, n tokens, H heads of P channels, G groups of state size N, J = H / G.
"""

import torch
from torch import Tensor

MOST_TOKENS = 16  # above, the chunked form is faster


def ssd_steps(
    x_BnHP: Tensor,
    dt_BnH: Tensor,
    A_H: Tensor,
    B_BnGN: Tensor,
    C_BnGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """y in x's dtype, and the states after each token, new tensors each: the arguments and the
    recurrence of `ssd.ssd`."""
    num_tokens, num_groups = x_BnHP.shape[1], B_BnGN.shape[2]
    wide = dt_BnH.dtype
    x, B, C = x_BnHP.to(wide), B_BnGN.to(wide), C_BnGN.to(wide)
    decay_BnH11 = torch.exp(dt_BnH * A_H)[..., None, None]
    written_BnHP1 = (x * dt_BnH.unsqueeze(-1)).unsqueeze(-1)
    heads = x.shape[2] // num_groups
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
