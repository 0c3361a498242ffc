"""What generation carries from pass to pass: Mamba-2 states and convolution windows of constant
size, keys and values of the attention layers alone.

Owns: the states, their memory, which of a pass's tokens are kept, and the packing: a pass takes the
new tokens of all sequences laid end to end, [T,1,...], so that linears, norms and experts never see
padding; only what mixes tokens spreads them to rows. Does not own: the arithmetic on the states
(`mamba2`, `cached_attention`), nor what is generated (`generate`).

Shapes: B sequences, T new tokens of all of them, n the most new tokens of one, H heads of P
channels, N state size, K - 1 past inputs of the convolution, C its channels, G key/value heads, D
head dimension, L capacity of the KV cache.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_CAPACITY_MULTIPLE = 64


class MambaState:
    """Of one Mamba-2 layer: `ssm_BHPN` in FP32, `window_BKC` in the activations' dtype.

    A pass that may be taken back leaves `steps`, the state before it and after each of its tokens,
    and `inputs`, the window before it and all its inputs; `rewind` then returns to any of them
    exactly.
    """

    def __init__(self, ssm_BHPN: Tensor, window_BKC: Tensor) -> None:
        self.ssm_BHPN, self.window_BKC = ssm_BHPN, window_BKC
        self.steps: list[Tensor] = []
        self.inputs_BWC: Tensor | None = None

    def update_window(self, inputs_BWC: Tensor, batch: "DecodeBatch") -> None:
        """The window after the pass, from the window before it and the pass's inputs."""
        self.window_BKC = _last(inputs_BWC, batch.counts, self.window_BKC.shape[1])
        self.inputs_BWC = inputs_BWC if batch.speculative else None

    def record_states(self, steps_nBHPN: Sequence[Tensor], batch: "DecodeBatch") -> None:
        """The states after each of the pass's tokens: new tensors, not written again."""
        self.steps = [self.ssm_BHPN, *steps_nBHPN] if batch.speculative else []
        self.ssm_BHPN = steps_nBHPN[-1]

    def rewind(self, kept: Sequence[int]) -> None:
        """Return to the state after `kept` of the last pass's tokens."""
        assert self.inputs_BWC is not None and self.steps
        self.window_BKC = _last(self.inputs_BWC, kept, self.window_BKC.shape[1])
        if len(set(kept)) == 1:
            self.ssm_BHPN = self.steps[kept[0]]
        else:
            rows = [self.steps[count][row] for row, count in enumerate(kept)]
            self.ssm_BHPN = torch.stack(rows)
        self.steps, self.inputs_BWC = [], None

    def select(self, rows_B: Tensor) -> None:
        """Keep these sequences only."""
        self.ssm_BHPN = self.ssm_BHPN.index_select(0, rows_B)
        self.window_BKC = self.window_BKC.index_select(0, rows_B)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.ssm_BHPN, self.window_BKC


class KVCache:
    """Of one attention layer: `keys_BGLD` and `values_BGLD`, which grow on demand. Zero where
    nothing was written: a masked key meets a probability of zero, and must be finite."""

    def __init__(self, num_rows: int, num_heads: int, width: int, like: Tensor) -> None:
        shape = (num_rows, num_heads, 0, width)
        self.keys_BGLD, self.values_BGLD = like.new_zeros(shape), like.new_zeros(shape)

    def write(self, keys_TGD: Tensor, values_TGD: Tensor, batch: "DecodeBatch") -> None:
        """Append the pass's keys and values."""
        self.reserve(batch.max_length)
        for cached, values in ((self.keys_BGLD, keys_TGD), (self.values_BGLD, values_TGD)):
            cached.transpose(1, 2)[batch.row_T, batch.position_T] = values

    def reserve(self, length: int) -> None:
        """Grow the cache so that `length` tokens fit, by half of it at least."""
        capacity = self.keys_BGLD.shape[2]
        if length <= capacity:
            return
        wanted = max(length, capacity + capacity // 2)
        extra = -(-wanted // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE - capacity
        self.keys_BGLD, self.values_BGLD = (
            torch.cat([t, t.new_zeros((*t.shape[:2], extra, t.shape[3]))], dim=2)
            for t in (self.keys_BGLD, self.values_BGLD)
        )

    def select(self, rows_B: Tensor) -> None:
        """Keep these sequences only."""
        self.keys_BGLD = self.keys_BGLD.index_select(0, rows_B)
        self.values_BGLD = self.values_BGLD.index_select(0, rows_B)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.keys_BGLD.shape[1] * self.keys_BGLD.shape[3] * self.keys_BGLD.itemsize


class DecodeStates:
    """The states of all layers of one stack (the decoder, or the multi-token-prediction block at
    one depth), by layer number, and how many tokens of each sequence they have seen. Layers add
    theirs when they first see the states."""

    def __init__(self, num_rows: int) -> None:
        self.lengths = [0] * num_rows
        self.mamba: dict[int, MambaState] = {}
        self.attention: dict[int, KVCache] = {}
        self._before = list(self.lengths)

    def next_batch(
        self, counts: Sequence[int], device: torch.device, speculative: bool = False
    ) -> "DecodeBatch":
        """Begin a pass of `counts` new tokens a sequence; what each layer is handed."""
        assert len(counts) == len(self.lengths) and sum(counts) > 0
        self._before = self.lengths
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]
        return DecodeBatch(self, self._before, counts, device, speculative)

    def rewind(self, kept: Sequence[int]) -> None:
        """Take back all but the first `kept` tokens of the last pass, which was announced as one
        that may be taken back."""
        self.lengths = [a + b for a, b in zip(self._before, kept, strict=True)]
        for state in self.mamba.values():
            state.rewind(kept)

    def select(self, rows: Sequence[int], device: torch.device) -> None:
        """Keep these sequences only, in this order."""
        rows_B = torch.tensor(rows, device=device)
        self.lengths = [self.lengths[row] for row in rows]
        for state in (*self.mamba.values(), *self.attention.values()):
            state.select(rows_B)

    @property
    def constant_bytes(self) -> int:
        """Memory of one sequence on this rank, whatever its length."""
        tensors = [t for state in self.mamba.values() for t in state.tensors]
        return sum(t[0].numel() * t.itemsize for t in tensors)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token of context on this rank: of the attention layers alone."""
        return sum(cache.bytes_per_token for cache in self.attention.values())


class DecodeBatch(PackedSeqParams):
    """One pass over new tokens; Megatron hands it to every layer where training has
    `PackedDocuments`. `row_T` and `position_T` say where each token lies in its sequence."""

    def __init__(
        self,
        states: DecodeStates,
        before: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        speculative: bool,
    ) -> None:
        super().__init__(qkv_format="sbhd")
        self.states, self.counts, self.lengths_before = states, list(counts), list(before)
        self.speculative = speculative
        self.num_tokens = sum(counts)
        self.max_new = max(counts)
        self.is_rectangular = min(counts) == self.max_new
        self.max_length = max(states.lengths)
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        positions = [
            position
            for start, count in zip(before, counts, strict=True)
            for position in range(start, start + count)
        ]
        self.row_T = torch.tensor(rows, device=device)
        self.position_T = torch.tensor(positions, device=device)
        self.lengths_before_B = torch.tensor(self.lengths_before, device=device)
        self._place_T: Tensor | None = None
        if not self.is_rectangular:
            self._place_T = (
                self.row_T * self.max_new + self.position_T - self.lengths_before_B[self.row_T]
            )

    @functools.cached_property
    def starts(self) -> Tensor:
        """Where each sequence's new tokens begin, and after the last: int64 [B + 1], on the CPU."""
        return torch.tensor([0, *itertools.accumulate(self.counts)])

    def to_padded(self, x_T1F: Tensor) -> Tensor:
        """[T,1,F] -> [B,n,F], zeros after a sequence's last new token."""
        num_rows, width = len(self.counts), x_T1F.shape[-1]
        if self._place_T is None:
            return x_T1F.reshape(num_rows, self.max_new, width)
        rows = x_T1F.new_zeros(num_rows * self.max_new, width)
        rows.index_copy_(0, self._place_T, x_T1F.flatten(0, 1))
        return rows.view(num_rows, self.max_new, width)

    def to_packed(self, y_BnF: Tensor) -> Tensor:
        """The inverse of `to_padded`: [B,n,F] -> [T,1,F]."""
        flat = y_BnF.flatten(0, 1)
        if self._place_T is not None:
            flat = flat.index_select(0, self._place_T)
        return flat.unsqueeze(1)

    def is_token_Bn1(self) -> Tensor | None:
        """True for tokens, False for what pads them to rows: [B,n,1]; None without padding."""
        if self.is_rectangular:
            return None
        counts_B = torch.tensor(self.counts, device=self.row_T.device)
        numbers_n = torch.arange(self.max_new, device=counts_B.device)
        return (numbers_n < counts_B[:, None]).unsqueeze(-1)


def _last(inputs_BWC: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """The `width` inputs up to the last of `counts` new ones, of inputs that begin with `width` old
    ones."""
    if len(set(counts)) == 1:
        return inputs_BWC[:, counts[0] : counts[0] + width].clone()
    return torch.stack([inputs_BWC[row, c : c + width] for row, c in enumerate(counts)])
