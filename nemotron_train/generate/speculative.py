"""Speculative decoding with the multi-token-prediction block as the draft model.

Owns: the inputs of each depth (hidden states and tokens), drafting, rollback of drafts. Does not
own: the verification forward call (`engine`), the acceptance rule (`sampling`).

Depth k takes the hidden state of depth k - 1 at position i (depth 0 is the decoder) and token
i + k, and predicts token i + k + 1. Its attention reads its own KV cache of all earlier positions.

With tokens 0 ... m known and the decoder run at positions below m, positions up to m - k of depth k
are confirmed: they used only known tokens. To draft, every depth runs up to position m - 1, where
depth k reads k - 1 drafted tokens. These unconfirmed positions are rolled back at once and run
again in the next round with the accepted tokens. For k >= 2, the last confirmed hidden state that
depth k reads has no known token yet; it stays in `_Depth.waiting`.

Shapes: B sequences, T tokens of a forward call, k drafted tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron_train.generate.knobs import Sampling
from nemotron_train.generate.sampling import (
    Draws,
    Verdict,
    choose,
    distribution,
    judge,
    judge_greedily,
    perturbed,
)
from nemotron_train.model.decode_state import DecodeStates
from nemotron_train.model.hybrid import NemotronModel


@dataclass
class Acceptance:
    """Acceptance counts. A round counts once per sequence. Depths count from 0.

    reached[k]: rounds in which draft k was judged: all drafts before it were accepted, and the
    sequence went on up to it. accepted[k]: rounds in which draft k was accepted too. tokens: drawn
    in all rounds.
    """

    rounds: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    tokens: int = 0

    def count(self, accepted: Sequence[int], taken: Sequence[int], num_drafted: int) -> None:
        """Count a round in which sequence b accepted `accepted[b]` of `num_drafted` drafts and took
        `taken[b]` tokens of the round.

        Those are the accepted drafts and the token after them, or fewer, where the sequence ended
        or got other tokens in between: the drafts from there on are neither accepted nor refused.
        """
        while len(self.reached) < num_drafted:
            self.reached.append(0)
            self.accepted.append(0)
        self.rounds += len(accepted)
        self.tokens += sum(taken)
        for depth in range(num_drafted):
            self.reached[depth] += sum(count > depth for count in taken)
            self.accepted[depth] += sum(
                min(right, count) > depth for right, count in zip(accepted, taken, strict=True)
            )

    @property
    def rates(self) -> list[float]:
        """Acceptance rate of each depth, given that all drafts before it were accepted."""
        return [
            accepted / max(reached, 1)
            for accepted, reached in zip(self.accepted, self.reached, strict=True)
        ]

    @property
    def mean_length(self) -> float:
        """Mean tokens per round: accepted drafts and the one token from verification."""
        return self.tokens / max(self.rounds, 1)


@dataclass(frozen=True)
class Drafted:
    """Drafted tokens [B,k] and the logits [B,k,V] they were drawn from."""

    tokens_Bk: Tensor
    logits_BkV: Tensor


class Drafter:
    """Drafts for a batch of sequences. Call `prefill` for each prefill chunk, then `draft`, `judge`
    and `keep` in each round. COLLECTIVE under tensor and expert parallelism.

    drawable: gives the ids that may not be drawn a logit of minus infinity. agree: as `Decoder`'s.
    """

    def __init__(
        self,
        model: NemotronModel,
        num_drafted: int,
        num_rows: int,
        sampling: Sampling,
        device: torch.device,
        drawable: Callable[[Tensor], Tensor],
        agree: Callable[[Tensor], Tensor],
    ) -> None:
        self._model = model
        self._drawable = drawable
        self._agree = agree
        self._sampling = sampling
        self._device = device
        self._depths = [_Depth(number + 1, num_rows) for number in range(num_drafted)]
        self._round_hidden: list[Tensor] | None = None  # decoder, last round: [rows,D] each

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of context on this rank: the KV cache of every depth."""
        return sum(depth.states.bytes_per_token for depth in self._depths)

    def prefill(
        self, hidden_T1D: Tensor, counts: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> None:
        """Run every depth on the next prefill chunk.

        hidden_T1D: the decoder's hidden states, ragged; counts: tokens of each sequence in it;
        prompts: the complete prompts.
        """
        hidden = list(hidden_T1D[:, 0].split(list(counts)))
        for depth in self._depths:
            inputs, first = depth.inputs(hidden)
            last_positions = [len(tokens) - 1 - depth.number for tokens in prompts]
            num_ready = [
                max(0, min(len(rows), last - start + 1))
                for rows, start, last in zip(inputs, first, last_positions, strict=True)
            ]
            depth.waiting = [rows[count:] for rows, count in zip(inputs, num_ready, strict=True)]
            if not sum(num_ready):
                hidden = [rows[:0] for rows in inputs]
                continue
            tokens = [
                prompts[row][start + depth.number : start + depth.number + count]
                for row, (start, count) in enumerate(zip(first, num_ready, strict=True))
            ]
            ready = [rows[:count] for rows, count in zip(inputs, num_ready, strict=True)]
            hidden = self._run(depth, ready, tokens)

    def draft(self, tokens_so_far: Sequence[Sequence[int]], draws: Sequence[Draws]) -> Drafted:
        """Draft one token per depth after the last token of each sequence.

        `prefill` and `keep` must have received the hidden states of all tokens but the last one.
        """
        extended = [list(tokens) for tokens in tokens_so_far]
        hidden = self._hidden_of_round()
        previous_confirmed = [len(tokens) - 1 for tokens in tokens_so_far]  # decoder positions
        tokens, logits = [], []
        for offset, depth in enumerate(self._depths):
            inputs, first = depth.inputs(hidden)
            depth_tokens = [
                extended[row][start + depth.number : start + depth.number + len(rows)]
                for row, (start, rows) in enumerate(zip(first, inputs, strict=True))
            ]
            hidden = self._run(depth, inputs, depth_tokens, speculative=True)
            confirmed = [
                max(start, len(row) - depth.number)
                for start, row in zip(first, tokens_so_far, strict=True)
            ]
            depth.rewind(inputs, first, confirmed, previous_confirmed)
            previous_confirmed = confirmed
            last_BD = torch.stack([rows[-1] for rows in hidden])
            logits_BV = self._drawable(self._model.logits(last_BD.unsqueeze(1)))
            drawn_B = self._agree(choose(logits_BV, self._sampling, draws, offset))
            for row, token in zip(extended, drawn_B.tolist(), strict=True):
                row.append(token)
            tokens.append(drawn_B)
            logits.append(logits_BV)
        return Drafted(torch.stack(tokens, dim=1), torch.stack(logits, dim=1))

    def judge(self, logits_BnV: Tensor, drafted: Drafted, draws: Sequence[Draws]) -> Verdict:
        """Verify the drafts with the decoder's drawable logits [B,n,V], n = k + 1. All ranks get
        the verdict of the first rank."""
        if self._sampling.temperature == 0:
            verdict = judge_greedily(logits_BnV, drafted.tokens_Bk)
        elif self._sampling.coupled:
            noisy = [
                perturbed(logits_BV, self._sampling, draws, offset)
                for offset, logits_BV in enumerate(logits_BnV.unbind(1))
            ]
            verdict = judge_greedily(torch.stack(noisy, dim=1), drafted.tokens_Bk)
        else:
            p, q = (
                distribution(logits, self._sampling) for logits in (logits_BnV, drafted.logits_BkV)
            )
            verdict = judge(p, q, drafted.tokens_Bk, draws)
        both = torch.tensor([verdict.accepted, verdict.following], device=self._device)
        accepted, following = self._agree(both).tolist()
        return Verdict(accepted, following)

    def keep(self, hidden_T1D: Tensor, num_kept: Sequence[int]) -> None:
        """Store the decoder's hidden states of a round for the next `draft`.

        num_kept: of each sequence, the number of leading rows whose tokens were accepted.
        """
        rows = hidden_T1D[:, 0].unflatten(0, (len(num_kept), -1))
        self._round_hidden = [row[:count] for row, count in zip(rows, num_kept, strict=True)]

    def add(self, hidden_T1D: Tensor, counts: Sequence[int]) -> None:
        """Add the decoder's hidden states of tokens that were read between two rounds, ragged."""
        parts = hidden_T1D[:, 0].split(list(counts))
        before = self._hidden_of_round()
        self._round_hidden = [torch.cat(rows) for rows in zip(before, parts, strict=True)]

    def append(self, other: "Drafter") -> None:
        """Add the sequences of another drafter, between rounds."""
        self._round_hidden = [*self._hidden_of_round(), *other._hidden_of_round()]
        for mine, theirs in zip(self._depths, other._depths, strict=True):
            mine.states.append(theirs.states)
            mine.waiting = [*mine.waiting, *theirs.waiting]

    def _hidden_of_round(self) -> list[Tensor]:
        """The decoder's hidden states of the last round; before the first one, none of each
        sequence."""
        if self._round_hidden is not None:
            return self._round_hidden
        return [rows[:0] for rows in self._depths[0].waiting]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the sequences `rows`, in this order."""
        if self._round_hidden is not None:
            self._round_hidden = [self._round_hidden[row] for row in rows]
        for depth in self._depths:
            depth.states.select(rows, self._device)
            depth.waiting = [depth.waiting[row] for row in rows]

    def _run(
        self,
        depth: "_Depth",
        inputs: Sequence[Tensor],
        tokens: Sequence[Sequence[int]],
        speculative: bool = False,
    ) -> list[Tensor]:
        """Run the block at one depth on ragged inputs [rows,D] and their tokens."""
        counts = [len(rows) for rows in inputs]
        assert counts == [len(part) for part in tokens], (counts, tokens)
        decode_batch = depth.states.next_batch(counts, self._device, speculative)
        tokens_T = torch.tensor([t for part in tokens for t in part], device=self._device)
        hidden_T1D = torch.cat(list(inputs)).unsqueeze(1)
        output_T1D = self._model.decode_depth(hidden_T1D, tokens_T, decode_batch)
        return list(output_T1D[:, 0].split(counts))


class _Depth:
    """One depth of the block.

    states: KV cache of the confirmed positions. waiting: hidden states of the previous depth,
    [rows,D] per sequence, from the first position that this depth has not run.
    """

    def __init__(self, number: int, num_rows: int) -> None:
        self.number, self.states = number, DecodeStates(num_rows)
        self.waiting: list[Tensor] = []

    def inputs(self, hidden: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The waiting hidden states with `hidden` appended, and the first position per sequence."""
        waiting = self.waiting or [rows[:0] for rows in hidden]
        joined = [
            torch.cat([old, rows]) if len(old) else rows
            for old, rows in zip(waiting, hidden, strict=True)
        ]
        return joined, list(self.states.lengths)

    def rewind(
        self,
        inputs: Sequence[Tensor],
        first: Sequence[int],
        confirmed: Sequence[int],
        previous_confirmed: Sequence[int],
    ) -> None:
        """Roll back the unconfirmed positions of a call on `inputs`, which started at `first`.

        Positions below `confirmed` stay. The inputs from there to `previous_confirmed`, the end of
        the previous depth's confirmed positions, become `waiting`.
        """
        self.states.rewind([end - start for start, end in zip(first, confirmed, strict=True)])
        self.waiting = [
            rows[end - start : previous_end - start]
            for rows, start, end, previous_end in zip(
                inputs, first, confirmed, previous_confirmed, strict=True
            )
        ]
