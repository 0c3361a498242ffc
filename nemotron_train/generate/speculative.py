"""Speculative decoding with the multi-token-prediction block as its own draft model.

Owns: which hidden state and which token each depth reads, the drafts, what is kept of them. Does
not own: verification's forward pass (`engine`), the acceptance rule (`sampling`).

Depth k reads the hidden state of depth k - 1 at position i (depth 0 is the decoder) and token
i + k, and predicts token i + k + 1; its attention sees its own keys of all positions before. With
tokens 0 ... m known and the decoder at positions below m, depth k is sure at positions up to m - k.
To draft, every depth runs up to position m - 1, depth k reading k - 1 drafted tokens there; those
positions are taken back at once and run again next round with the tokens that really came. Of the
inputs of depth k >= 2 that are sure, the last one always waits for its token: it is kept.

Shapes: B sequences, T tokens of a pass, k drafted tokens, V vocabulary.
"""

from collections.abc import Sequence
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
)
from nemotron_train.model.decode_state import DecodeStates
from nemotron_train.model.hybrid import NemotronModel
from nemotron_train.platform.groups import from_first_rank


@dataclass
class Acceptance:
    """Counts of rounds, one a sequence. `reached[k]`: all drafts before the k-th (from 0) were
    accepted; `accepted[k]`: it was too."""

    rounds: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count(self, accepted: Sequence[int], num_drafted: int) -> None:
        """Take in a round in which sequence b accepted accepted[b] of `num_drafted`."""
        while len(self.reached) < num_drafted:
            self.reached.append(0)
            self.accepted.append(0)
        self.rounds += len(accepted)
        for depth in range(num_drafted):
            self.reached[depth] += sum(count >= depth for count in accepted)
            self.accepted[depth] += sum(count > depth for count in accepted)

    @property
    def rates(self) -> list[float]:
        """Of each depth: accepted among those where all before it were."""
        return [a / max(r, 1) for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def mean_length(self) -> float:
        """Tokens a round: accepted drafts and the one that verification adds."""
        return 1 + sum(self.accepted) / max(self.rounds, 1)


@dataclass(frozen=True)
class Drafted:
    """Tokens [B,k] and the logits [B,k,V] they were drawn from."""

    tokens_Bk: Tensor
    logits_BkV: Tensor


class Drafter:
    """Drafts for a batch of sequences. In order: `see` for each prefill pass; then rounds of
    `draft`, `judge`, `keep`. COLLECTIVE under tensor and expert parallelism."""

    def __init__(
        self,
        model: NemotronModel,
        num_drafted: int,
        num_rows: int,
        sampling: Sampling,
        acceptance: Acceptance,
        device: torch.device,
    ) -> None:
        self._model, self._sampling, self._device = model, sampling, device
        self._acceptance = acceptance
        self._depths = [_Depth(number + 1, num_rows) for number in range(num_drafted)]
        self._new: list[Tensor] | None = None  # the decoder's, of the last round, [rows,D] each

    @property
    def bytes_per_token(self) -> int:
        """Memory of a token of context on this rank: the keys and values of every depth."""
        return sum(depth.states.bytes_per_token for depth in self._depths)

    def see(
        self, hidden_T1D: Tensor, counts: Sequence[int], known: Sequence[Sequence[int]]
    ) -> None:
        """The decoder has passed over more of the prompts `known`."""
        new = list(hidden_T1D[:, 0].split(list(counts)))
        for depth in self._depths:
            inputs, first = depth.inputs(new)
            lasts = [len(tokens) - 1 - depth.number for tokens in known]
            takes = [
                max(0, min(len(rows), last - start + 1))
                for rows, start, last in zip(inputs, first, lasts, strict=True)
            ]
            depth.waiting = [rows[take:] for rows, take in zip(inputs, takes, strict=True)]
            if not sum(takes):
                new = [rows[:0] for rows in inputs]
                continue
            tokens = [
                known[row][start + depth.number : start + depth.number + take]
                for row, (start, take) in enumerate(zip(first, takes, strict=True))
            ]
            taken = [rows[:take] for rows, take in zip(inputs, takes, strict=True)]
            new = self._run(depth, taken, tokens)

    def draft(self, known: Sequence[Sequence[int]], draws: Sequence[Draws]) -> Drafted:
        """Draft after the last of the tokens `known`, whose hidden states but for the last token
        were all handed to `see` or `keep`."""
        extended = [list(tokens) for tokens in known]
        new = self._new or [rows[:0] for rows in self._depths[0].waiting]
        sure_before = [len(tokens) - 1 for tokens in known]  # of the decoder
        tokens, logits = [], []
        for depth in self._depths:
            inputs, first = depth.inputs(new)
            parts = [
                extended[row][start + depth.number : start + depth.number + len(rows)]
                for row, (start, rows) in enumerate(zip(first, inputs, strict=True))
            ]
            new = self._run(depth, inputs, parts, speculative=True)
            sure = [
                max(start, len(row) - depth.number) for start, row in zip(first, known, strict=True)
            ]
            depth.take_back(inputs, first, sure, sure_before)
            sure_before = sure
            last_BD = torch.stack([rows[-1] for rows in new])
            logits_BV = self._model.logits(last_BD.unsqueeze(1))
            drawn_B = from_first_rank(choose(logits_BV, self._sampling, draws))
            for row, token in zip(extended, drawn_B.tolist(), strict=True):
                row.append(token)
            tokens.append(drawn_B)
            logits.append(logits_BV)
        return Drafted(torch.stack(tokens, dim=1), torch.stack(logits, dim=1))

    def judge(self, logits_BnV: Tensor, drafted: Drafted, draws: Sequence[Draws]) -> Verdict:
        """`sampling.judge` of what the decoder says after each drafted token, the same on every
        rank, counted."""
        if self._sampling.temperature == 0:
            verdict = judge_greedily(logits_BnV, drafted.tokens_Bk)
        else:
            p, q = (distribution(x, self._sampling) for x in (logits_BnV, drafted.logits_BkV))
            verdict = judge(p, q, drafted.tokens_Bk, draws)
        both = torch.tensor([verdict.accepted, verdict.following], device=self._device)
        accepted, following = from_first_rank(both).tolist()
        self._acceptance.count(accepted, drafted.tokens_Bk.shape[1])
        return Verdict(accepted, following)

    def keep(self, hidden_T1D: Tensor, kept: Sequence[int]) -> None:
        """The decoder's hidden states of a round, of which the first `kept` of each sequence are
        of tokens that came."""
        rows = hidden_T1D[:, 0].unflatten(0, (len(kept), -1))
        self._new = [row[:count] for row, count in zip(rows, kept, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences only."""
        if self._new is not None:
            self._new = [self._new[row] for row in rows]
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
        """The block at one depth over ragged inputs [rows,D] and their tokens."""
        counts = [len(rows) for rows in inputs]
        assert counts == [len(part) for part in tokens], (counts, tokens)
        new = depth.states.next_batch(counts, self._device, speculative)
        tokens_T = torch.tensor([t for part in tokens for t in part], device=self._device)
        hidden_T1D = torch.cat(list(inputs)).unsqueeze(1)
        output_T1D = self._model.decode_depth(hidden_T1D, tokens_T, new)
        return list(output_T1D[:, 0].split(counts))


class _Depth:
    """One depth: the states of its positions that are sure, and the hidden states of the depth
    before it that wait for their token, [rows,D] a sequence, from the first position not run."""

    def __init__(self, number: int, num_rows: int) -> None:
        self.number, self.states = number, DecodeStates(num_rows)
        self.waiting: list[Tensor] = []

    def inputs(self, new: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """All that waits with `new` behind it, and the position of each sequence's first."""
        waiting = self.waiting or [rows[:0] for rows in new]
        joined = [
            torch.cat([old, rows]) if len(old) else rows
            for old, rows in zip(waiting, new, strict=True)
        ]
        return joined, list(self.states.lengths)

    def take_back(
        self,
        inputs: Sequence[Tensor],
        first: Sequence[int],
        sure: Sequence[int],
        sure_before: Sequence[int],
    ) -> None:
        """Of a pass over `inputs` from positions `first` on, keep the positions below `sure`; what
        lies between them and `sure_before`, to which the depth before is sure, waits."""
        self.states.rewind([end - start for start, end in zip(first, sure, strict=True)])
        self.waiting = [
            rows[end - start : end_before - start]
            for rows, start, end, end_before in zip(inputs, first, sure, sure_before, strict=True)
        ]
