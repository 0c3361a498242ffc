"""The state of generation between decode batches: Mamba-2 states and convolution windows, of
constant size, and the KV cache of the attention layers.

Owns: the states, their memory, rewinding to an earlier token, and the packing: a decode batch holds
the new tokens of all sequences concatenated, [T,1,...]. Linears, norms and experts therefore never
see padding; only layers that mix tokens pad them to rows. Does not own: the arithmetic on the
states (`mamba.decoding`, `attention.decoding`), the choice of tokens (`generate`).

Shapes: B sequences, T new tokens of all sequences, n the largest number of new tokens of one
sequence, H heads of P channels, N state size, K - 1 past inputs of the convolution, C its channels,
G key/value heads, D head dimension, L capacity of the KV cache.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_CAPACITY_MULTIPLE = 64


class MambaState:
    """The state of one Mamba-2 layer: `ssm_BHPN` in FP32, `window_BKC` in the activations' dtype.

    A speculative batch also stores `steps`, the state before it and after each of its tokens, and
    `inputs_BWC`, the window before it followed by its inputs. `rewind` then returns exactly to any
    of its tokens.
    """

    def __init__(self, ssm_BHPN: Tensor, window_BKC: Tensor) -> None:
        self.ssm_BHPN, self.window_BKC = ssm_BHPN, window_BKC
        self.steps: list[Tensor] = []
        self.inputs_BWC: Tensor | None = None

    def update_window(self, inputs_BWC: Tensor, batch: "DecodeBatch") -> None:
        """Set the window after the batch. inputs_BWC: the window before it, then its inputs."""
        self.window_BKC = _last(inputs_BWC, batch.counts, self.window_BKC.shape[1])
        self.inputs_BWC = inputs_BWC if batch.speculative else None

    def record_states(self, steps_nBHPN: Sequence[Tensor], batch: "DecodeBatch") -> None:
        """Set the states after each of the batch's tokens: tensors that nobody writes again."""
        self.steps = [self.ssm_BHPN, *steps_nBHPN] if batch.speculative else []
        self.ssm_BHPN = steps_nBHPN[-1]

    def rewind(self, num_kept: Sequence[int]) -> None:
        """Return to the state after the first `num_kept` tokens of the last batch, a number for
        each sequence. The batch must have been speculative."""
        assert self.inputs_BWC is not None and self.steps
        self.window_BKC = _last(self.inputs_BWC, num_kept, self.window_BKC.shape[1])
        if len(set(num_kept)) == 1:
            self.ssm_BHPN = self.steps[num_kept[0]]
        else:
            rows = [self.steps[count][row] for row, count in enumerate(num_kept)]
            self.ssm_BHPN = torch.stack(rows)
        self.steps, self.inputs_BWC = [], None

    def select(self, rows_B: Tensor) -> None:
        """Keep only these sequences, in this order."""
        self.ssm_BHPN = self.ssm_BHPN.index_select(0, rows_B)
        self.window_BKC = self.window_BKC.index_select(0, rows_B)

    def blank(self, num_rows: int) -> "MambaState":
        """States of sequences without a token."""
        shapes = [(num_rows, *t.shape[1:]) for t in self.tensors]
        ssm, window = (t.new_zeros(s) for t, s in zip(self.tensors, shapes, strict=True))
        return MambaState(ssm, window)

    def append(self, other: "MambaState") -> None:
        """Add the sequences of another state. Not between a speculative batch and its `rewind`."""
        assert not self.steps and not other.steps
        self.ssm_BHPN = torch.cat([self.ssm_BHPN, other.ssm_BHPN])
        self.window_BKC = torch.cat([self.window_BKC, other.window_BKC])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that decoding keeps, without those of a speculative batch."""
        return self.ssm_BHPN, self.window_BKC


class KVCache:
    """The KV cache of one attention layer: `keys_BGLD` and `values_BGLD`, which grow on demand.
    Unwritten entries are zero: they are multiplied by a probability of zero, so they must be
    finite."""

    def __init__(self, num_rows: int, num_heads: int, width: int, like: Tensor) -> None:
        shape = (num_rows, num_heads, 0, width)
        self.keys_BGLD, self.values_BGLD = like.new_zeros(shape), like.new_zeros(shape)

    def write(self, keys_TGD: Tensor, values_TGD: Tensor, batch: "DecodeBatch") -> None:
        """Store the keys and values of the batch's tokens at their positions."""
        self.reserve(batch.max_length)
        for cached, values in ((self.keys_BGLD, keys_TGD), (self.values_BGLD, values_TGD)):
            cached.transpose(1, 2)[batch.row_T, batch.position_T] = values

    def reserve(self, length: int) -> None:
        """Grow the cache so that `length` tokens fit. It grows by at least half its capacity, so
        that the copies stay cheap on average."""
        capacity = self.keys_BGLD.shape[2]
        if length <= capacity:
            return
        needed = max(length, capacity + capacity // 2)
        extra = -(-needed // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE - capacity
        self.keys_BGLD, self.values_BGLD = (
            torch.cat([t, t.new_zeros((*t.shape[:2], extra, t.shape[3]))], dim=2)
            for t in (self.keys_BGLD, self.values_BGLD)
        )

    def select(self, rows_B: Tensor) -> None:
        """Keep only these sequences, in this order."""
        self.keys_BGLD = self.keys_BGLD.index_select(0, rows_B)
        self.values_BGLD = self.values_BGLD.index_select(0, rows_B)

    def blank(self, num_rows: int) -> "KVCache":
        """Caches of sequences without a token."""
        _, heads, _, width = self.keys_BGLD.shape
        return KVCache(num_rows, heads, width, self.keys_BGLD)

    def append(self, other: "KVCache") -> None:
        """Add the sequences of another cache."""
        capacity = max(cache.keys_BGLD.shape[2] for cache in (self, other))
        self.reserve(capacity)
        self.keys_BGLD, self.values_BGLD = (
            torch.cat([mine, _of_capacity(theirs, mine.shape[2])])
            for mine, theirs in (
                (self.keys_BGLD, other.keys_BGLD),
                (self.values_BGLD, other.values_BGLD),
            )
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one sequence, on this rank."""
        return 2 * self.keys_BGLD.shape[1] * self.keys_BGLD.shape[3] * self.keys_BGLD.itemsize


class DecodeStates:
    """The states of all layers of one stack (the decoder, or the multi-token-prediction block at
    one depth), by layer number, and the number of tokens of each sequence so far (`lengths`). A
    layer creates its state on first use."""

    def __init__(self, num_rows: int) -> None:
        self.lengths = [0] * num_rows
        self.mamba: dict[int, MambaState] = {}
        self.attention: dict[int, KVCache] = {}
        self._lengths_before = list(self.lengths)  # of the last batch

    def next_batch(
        self, counts: Sequence[int], device: torch.device, speculative: bool = False
    ) -> "DecodeBatch":
        """Advance the lengths by `counts` new tokens, one number a sequence, and return the batch
        that the layers get. `speculative`: `rewind` may follow."""
        assert len(counts) == len(self.lengths) and sum(counts) > 0
        self._lengths_before = self.lengths
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]
        return DecodeBatch(self, self._lengths_before, counts, device, speculative)

    def rewind(self, num_kept: Sequence[int]) -> None:
        """Drop all but the first `num_kept` tokens of the last batch, a number for each sequence.
        The batch must have been speculative."""
        self.lengths = [a + b for a, b in zip(self._lengths_before, num_kept, strict=True)]
        # The KV cache needs nothing: entries past a sequence's length are masked or overwritten.
        for state in self.mamba.values():
            state.rewind(num_kept)

    def select(self, rows: Sequence[int], device: torch.device) -> None:
        """Keep only these sequences, in this order."""
        rows_B = torch.tensor(rows, device=device)
        self.lengths = [self.lengths[row] for row in rows]
        for state in (*self.mamba.values(), *self.attention.values()):
            state.select(rows_B)

    def append(self, other: "DecodeStates") -> None:
        """Add the sequences of another state of the same stack, after the own ones. A layer that
        one of the two has not run yet begins there without a token."""
        sizes = len(self.lengths), len(other.lengths)
        _append_layers(self.mamba, other.mamba, *sizes)
        _append_layers(self.attention, other.attention, *sizes)
        self.lengths = [*self.lengths, *other.lengths]

    @property
    def constant_bytes(self) -> int:
        """Bytes of one sequence on this rank that do not depend on its length (Mamba-2)."""
        tensors = [t for state in self.mamba.values() for t in state.tensors]
        return sum(t[0].numel() * t.itemsize for t in tensors)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of context on this rank (KV cache of all attention layers)."""
        return sum(cache.bytes_per_token for cache in self.attention.values())


class DecodeBatch(PackedSeqParams):
    """The new tokens of one decode step. Megatron passes it to every layer in the argument that
    holds `PackedDocuments` in training.

    counts: new tokens of each sequence. max_new: the largest count. max_length: tokens of the
    longest sequence after this batch. row_T, position_T: int64, the sequence of each token and its
    position there. is_rectangular: all counts are equal, so no padding is needed.
    """

    def __init__(
        self,
        states: DecodeStates,
        before: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        speculative: bool,
    ) -> None:
        super().__init__(qkv_format="sbhd")
        self.states = states
        self.counts = list(counts)
        self.lengths_before = list(before)
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
        self._padded_index_T: Tensor | None = None  # of each token in [B x n]
        if not self.is_rectangular:
            self._padded_index_T = (
                self.row_T * self.max_new + self.position_T - self.lengths_before_B[self.row_T]
            )

    @functools.cached_property
    def starts(self) -> Tensor:
        """Index of each sequence's first new token, and T at the end: int64 [B + 1], on the CPU."""
        return torch.tensor([0, *itertools.accumulate(self.counts)])

    def to_padded(self, x_T1F: Tensor) -> Tensor:
        """[T,1,F] -> [B,n,F], zeros after a sequence's last new token."""
        num_rows, width = len(self.counts), x_T1F.shape[-1]
        if self._padded_index_T is None:
            return x_T1F.reshape(num_rows, self.max_new, width)
        rows = x_T1F.new_zeros(num_rows * self.max_new, width)
        rows.index_copy_(0, self._padded_index_T, x_T1F.flatten(0, 1))
        return rows.view(num_rows, self.max_new, width)

    def to_packed(self, y_BnF: Tensor) -> Tensor:
        """The inverse of `to_padded`: [B,n,F] -> [T,1,F]."""
        flat = y_BnF.flatten(0, 1)
        if self._padded_index_T is not None:
            flat = flat.index_select(0, self._padded_index_T)
        return flat.unsqueeze(1)

    def is_token_Bn1(self) -> Tensor | None:
        """True for tokens, False for padding: [B,n,1]; None without padding."""
        if self.is_rectangular:
            return None
        counts_B = torch.tensor(self.counts, device=self.row_T.device)
        numbers_n = torch.arange(self.max_new, device=counts_B.device)
        return (numbers_n < counts_B[:, None]).unsqueeze(-1)


def _append_layers[State: (MambaState, KVCache)](
    mine: dict[int, State], theirs: dict[int, State], num_mine: int, num_theirs: int
) -> None:
    """Add the sequences in `theirs` to `mine`, layer by layer."""
    for layer in mine.keys() | theirs.keys():
        if layer not in mine:
            mine[layer] = theirs[layer].blank(num_mine)
        mine[layer].append(theirs[layer] if layer in theirs else mine[layer].blank(num_theirs))


def _of_capacity(cached_BGLD: Tensor, capacity: int) -> Tensor:
    """The cache, zeros after its last token, with room for at least `capacity` tokens."""
    missing = capacity - cached_BGLD.shape[2]
    return torch.nn.functional.pad(cached_BGLD, (0, 0, 0, missing))


def _last(inputs_BWC: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """The last `width` inputs of each sequence after `counts` new ones. `inputs_BWC` starts with
    the `width` inputs before the batch."""
    if len(set(counts)) == 1:
        return inputs_BWC[:, counts[0] : counts[0] + width].clone()
    return torch.stack([inputs_BWC[row, c : c + width] for row, c in enumerate(counts)])
