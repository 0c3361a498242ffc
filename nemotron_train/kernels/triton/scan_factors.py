"""The small factors of the chunked scan's Triton kernels: decays, document masks, sizes of tiles.

Owns: their arithmetic, by torch operators on a few numbers a token. Does not own: their meaning in
the scan (scan.py).

Shape suffixes: as in scan.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_train.kernels.triton.elements import tiles

LONGEST_CHUNK = 128  # tokens: a [L, L] tile of FP32 fits into the registers of eight warps


@dataclass(frozen=True)
class Factors:
    """The small numbers of each token, FP32 [B, H, T], and of each chunk, [B, H, K].

    high + low: cum. dt: zero in the padding. read, write, carry: module docstring. ids_BT: document
    of each token, int64; that of the last one in the padding.
    """

    chunk: int
    ids_BT: Tensor
    dt: Tensor
    high: Tensor
    low: Tensor
    read: Tensor
    write: Tensor
    carry: Tensor

    @property
    def num_chunks(self) -> int:
        """K."""
        return self.carry.shape[2]


def chunk_length(chunk_size: int, length: int) -> int:
    """Tokens of a chunk: a power of two of at least 16 and at most LONGEST_CHUNK."""
    wanted = min(chunk_size, _power_of_two(length), LONGEST_CHUNK)
    return max(16, _power_of_two(wanted + 1) // 2)


def factors(dt_BSH: Tensor, A_H: Tensor, ids_BS: Tensor | None, chunk: int) -> Factors:
    """The factors of chunks of `chunk` tokens. Torch operators on a few numbers a token."""
    batch, length, _ = dt_BSH.shape
    num_chunks = tiles(length, chunk)
    padding = num_chunks * chunk - length
    # dt = 0 in the padding: no input, and the state does not change.
    dt_BHKL = F.pad(dt_BSH.transpose(1, 2).float(), (0, padding)).unflatten(2, (-1, chunk))
    if ids_BS is None:
        ids_BS = torch.zeros(batch, length, dtype=torch.int64, device=dt_BSH.device)
    ids_BT = torch.cat([ids_BS.long(), ids_BS[:, -1:].long().expand(-1, padding)], dim=1)
    ids_BKL = ids_BT.unflatten(1, (-1, chunk))
    # The state that enters a chunk belongs to the document of the token before it.
    entering_BK1 = torch.cat([ids_BKL[:, :1, :1], ids_BKL[:, :-1, -1:]], dim=1)
    leaving_BK1 = ids_BKL[..., -1:]
    cum = (dt_BHKL.double() * A_H.double()[:, None, None]).cumsum(-1)
    end = cum[..., -1:]
    high = cum.float()
    read = cum.exp().float() * (ids_BKL == entering_BK1)[:, None]
    write = (end - cum).exp().float() * (ids_BKL == leaving_BK1)[:, None]
    carry = end.exp().float() * (entering_BK1 == leaving_BK1)[:, None]
    low = (cum - high).float()
    tokens = (t.flatten(2).contiguous() for t in (dt_BHKL, high, low, read, write))
    return Factors(chunk, ids_BT.contiguous(), *tokens, carry=carry.flatten(2).contiguous())


def padded(size: int) -> int:
    """The tile that holds `size` columns: a power of two of at least 16, as products need."""
    return max(16, _power_of_two(size))


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
