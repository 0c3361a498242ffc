"""The decode loop: a number of places, each with a sequence that is being continued.

Owns: admission of waiting sequences, prefill, rounds, when a sequence ends, cost counters. Does not
own: the model's forward calls (`decoder`), drafting (`speculative`), drawing (`sampling`).

A place whose sequence has ended is given to the next waiting sequence. Equal prompts that are
admitted together, such as the samples of one prompt, are prefilled once and their states copied.

Shapes: B sequences, U different prompts, T tokens of a forward call, V vocabulary.
"""

import math
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from nemotron_train.generate.continuation import Answer, Continuation, OnToken
from nemotron_train.generate.decoder import Decoder
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.sampling import choose
from nemotron_train.generate.speculative import Drafter
from nemotron_train.model.decode_state import DecodeStates

# Waiting sequences are admitted when this share of the places is free: a prefill of one short
# prompt costs as much as a round of a whole batch.
_FREE_SHARE = 0.25


class Batch:
    """Continues sequences in `knobs.batch` places."""

    def __init__(
        self,
        engine: Decoder,
        sequences: Sequence[Continuation],
        sampling: Sampling,
        knobs: DecodingKnobs,
        on_token: OnToken,
    ) -> None:
        self.engine = engine
        self.model = engine.model
        self.sequences = list(sequences)
        self.waiting = deque(sequences)
        self.rows: list[Continuation] = []  # admitted and unfinished
        self.sampling = sampling
        self.knobs = knobs
        self.on_token = on_token
        self.states = DecodeStates(0)
        self.drafter = self._new_drafter(0) if knobs.speculative else None
        self._asked: list[tuple[Continuation, int, Future[Answer]]] = []  # in this round
        self._enough_free = max(1, int(_FREE_SHARE * knobs.batch))

    @staticmethod
    def prefill_key(row: Continuation) -> Hashable:
        """Sequences with an equal key share one prefill."""
        return tuple(row.prompt)

    def run(self) -> None:
        """Admit, and decode in rounds, until every sequence has ended."""
        costs = self.engine.costs
        while self.rows or self.waiting:
            started = time.perf_counter()
            free = self.knobs.batch - len(self.rows)
            if self.waiting and (free >= self._enough_free or not self.rows):
                self._admit(free)
                costs.prefill_seconds += time.perf_counter() - started
                continue
            if self.drafter is not None:
                self._speculate(self.drafter)
            else:
                self._step()
            costs.decode_seconds += time.perf_counter() - started
        costs.new_tokens += sum(len(row.new) for row in self.sequences)

    def _admit(self, places: int) -> None:
        """Prefill the next sequences, draw their first tokens and add them to the rows."""
        admitted = [self.waiting.popleft() for _ in range(min(places, len(self.waiting)))]
        first: dict[Hashable, Continuation] = {}
        for row in admitted:
            first.setdefault(self.prefill_key(row), row)
        numbers = {key: number for number, key in enumerate(first)}
        copies = [numbers[self.prefill_key(row)] for row in admitted]
        states = DecodeStates(len(first))
        drafter = self._new_drafter(len(first)) if self.drafter is not None else None
        logits_UV = self._prefill([row.prompt for row in first.values()], states, drafter)
        states.select(copies, self.engine.device)
        self.states.append(states)
        if self.drafter is not None and drafter is not None:
            drafter.select(copies)
            self.drafter.append(drafter)
        self.rows += admitted
        self._count_bytes()
        self._sample(admitted, logits_UV[torch.tensor(copies, device=logits_UV.device)])

    def _prefill(
        self,
        prompts: Sequence[Sequence[int]],
        states: DecodeStates,
        drafter: Drafter | None,
    ) -> Tensor:
        """The logits after each prompt, [U,V]."""
        last: list[Tensor | None] = [None] * len(prompts)
        chunk = self.knobs.prefill_chunk
        for counts, hidden_T1D in self.engine.passes(states, prompts, chunk):
            ends = torch.tensor(counts).cumsum(0).tolist()
            for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
                if count and states.lengths[row] == len(prompts[row]):
                    last[row] = hidden_T1D[end - 1]
            if drafter is not None:
                drafter.prefill(hidden_T1D, counts, prompts)
        self.engine.costs.prefill_tokens += sum(map(len, prompts))
        return self.model.logits(torch.stack([h for h in last if h is not None]))

    def _new_drafter(self, num_rows: int) -> Drafter:
        depths = self.knobs.draft_tokens or self.model.config.mtp_num_layers or 0
        assert depths > 0, "checked where the model was opened"
        engine = self.engine
        return Drafter(
            self.model,
            depths,
            num_rows,
            self.sampling,
            engine.device,
            engine.drawable,
            engine.agree,
        )

    def _count_bytes(self) -> None:
        costs = self.engine.costs
        costs.constant_bytes = self.states.constant_bytes
        costs.bytes_per_token = self.states.bytes_per_token
        if self.drafter is not None:
            costs.draft_bytes_per_token = self.drafter.bytes_per_token

    def _sample(self, rows: Sequence[Continuation], logits_BV: Tensor) -> None:
        """Draw the next token of these sequences and drop those that end with it."""
        draws = [row.draws for row in rows]
        tokens_B = choose(self.engine.drawable(logits_BV), self.sampling, draws)
        tokens = self.engine.agree(tokens_B).tolist()
        for row, token, values in zip(
            rows, tokens, self._log_probabilities(logits_BV, tokens), strict=True
        ):
            self._append(row, token, values)
        self._drop_finished()

    def _log_probabilities(
        self, logits_TV: Tensor, tokens: Sequence[int]
    ) -> list[tuple[float, float]]:
        """Of one token per row: under the model's distribution, and under the one drawn from."""
        plain = self.engine.log_probabilities_of(logits_TV, tokens)
        drawn = self.engine.drawn_log_probabilities_of(logits_TV, tokens, self.sampling)
        return list(zip(plain, drawn, strict=True))

    def _step(self) -> None:
        """Decode one token of every sequence."""
        hidden_T1D, counts = self._read([row.pending for row in self.rows])
        ends = torch.tensor(counts, device=hidden_T1D.device).cumsum(0) - 1
        self._sample(self.rows, self.model.logits(hidden_T1D[ends]))

    def _read(self, counts: list[int]) -> tuple[Tensor, list[int]]:
        """Run the first `counts` pending tokens of each sequence; the hidden states [T,1,D]."""
        tokens: list[int] = []
        for row, count in zip(self.rows, counts, strict=True):
            begin = len(row.new) - row.pending
            tokens += row.new[begin : begin + count]
            row.pending -= count
        decode_batch = self.states.next_batch(counts, self.engine.device)
        self.engine.costs.passes += 1
        tokens_T = torch.tensor(tokens, device=self.engine.device)
        return self.model.decode(tokens_T, decode_batch), counts

    def _speculate(self, drafter: Drafter) -> None:
        """One round: draft, verify in one forward call, keep the accepted drafts and one token."""
        if any(row.pending > 1 for row in self.rows):  # given tokens; drafts follow the last one
            hidden_T1D, counts = self._read([row.pending - 1 for row in self.rows])
            drafter.add(hidden_T1D, counts)
        drafted = drafter.draft([row.tokens for row in self.rows], [r.draws for r in self.rows])
        last_B1 = torch.tensor([[row.new[-1]] for row in self.rows], device=self.engine.device)
        tokens_Bn = torch.cat([last_B1, drafted.tokens_Bk], dim=1)
        num_rows, tokens_per_row = tokens_Bn.shape
        decode_batch = self.states.next_batch(
            [tokens_per_row] * num_rows, self.engine.device, speculative=True
        )
        self.engine.costs.passes += 1
        hidden_T1D = self.model.decode(tokens_Bn.flatten(), decode_batch)
        logits_TV = self.model.logits(hidden_T1D)
        logits_BnV = logits_TV.unflatten(0, (num_rows, tokens_per_row))
        verdict = drafter.judge(
            self.engine.drawable(logits_BnV), drafted, [row.draws for row in self.rows]
        )
        proposed = drafted.tokens_Bk.tolist()
        outcome = [
            [*proposed[row][:count], verdict.following[row]]
            for row, count in enumerate(verdict.accepted)
        ]
        num_drawn = self._append_round(logits_TV, tokens_per_row, outcome)
        self.engine.acceptance.count(verdict.accepted, num_drawn, len(proposed[0]))
        # The last token was read in this round, and so were the drafts among the drawn ones.
        # Those before the last drawn one are kept. With that one the next round begins.
        num_kept = num_drawn
        for row, kept in zip(self.rows, num_kept, strict=True):
            row.pending -= kept
        self.states.rewind(num_kept)
        drafter.keep(hidden_T1D, num_kept)
        self._drop_finished()

    def _append_round(
        self, logits_TV: Tensor, tokens_per_row: int, outcome: list[list[int]]
    ) -> list[int]:
        """Append the tokens of a round; return how many of each sequence's were taken. A sequence
        may end inside the round, or get other tokens there; what follows is dropped."""
        indices = [
            row * tokens_per_row + i
            for row, tokens in enumerate(outcome)
            for i in range(len(tokens))
        ]
        flat_tokens = [token for tokens in outcome for token in tokens]
        chosen_TV = logits_TV[torch.tensor(indices, device=logits_TV.device)]
        values = iter(self._log_probabilities(chosen_TV, flat_tokens))
        taken = []
        for row, tokens in zip(self.rows, outcome, strict=True):
            row_values = [next(values) for _ in tokens]
            count, goes_on = 0, True
            while goes_on and count < len(tokens):
                goes_on = self._append(row, tokens[count], row_values[count])
                count += 1
            taken.append(count)
        return taken

    def _append(self, row: Continuation, token: int, values: tuple[float, float]) -> bool:
        """Append a drawn token and what the listener gives after it. Returns whether the next token
        may follow it directly: the sequence has not ended, and nothing was given."""
        self._add(row, token, values, given=False)
        answer = self.on_token(row, token)
        if isinstance(answer, Future):
            self._asked.append((row, token, answer))
            return False
        self._take(row, token, answer)
        return not row.ended_by and isinstance(answer, str)

    def _take(self, row: Continuation, token: int, answer: Answer) -> None:
        """Do what the listener answered to a drawn token."""
        if isinstance(answer, str):
            row.ended_by = answer
            if self.knobs.end_of_document and token in self.engine.end_tokens:
                row.ended_by = row.ended_by or "end"
        else:
            for given in answer[: self.knobs.max_new_tokens - len(row.new)]:
                self._add(row, given, (math.nan, math.nan), given=True)
        if len(row.new) >= self.knobs.max_new_tokens:
            row.ended_by = row.ended_by or "length"

    def _add(self, row: Continuation, token: int, values: tuple[float, float], given: bool) -> None:
        row.new.append(token)
        row.log_probabilities.append(values[0])
        row.drawn_log_probabilities.append(values[1])
        row.given.append(given)
        row.pending += 1
        row.draws.position = len(row.new)

    def _drop_finished(self) -> None:
        """Wait for the answers of this round, then remove finished sequences from the states."""
        for row, token, answer in self._asked:
            self._take(row, token, answer.result())
        self._asked.clear()
        active = [number for number, row in enumerate(self.rows) if not row.ended_by]
        if len(active) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in active]
        if not active:
            self.states = DecodeStates(0)
            self.drafter = self._new_drafter(0) if self.drafter is not None else None
            return
        self.states.select(active, self.engine.device)
        if self.drafter is not None:
            self.drafter.select(active)
