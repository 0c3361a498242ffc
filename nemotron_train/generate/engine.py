"""The decoding engine: prompts of different lengths in, tokens and their log-probabilities out.

Owns: prefill in chunks, rounds of decoding, when a sequence ends, what is counted. Does not own:
the states and the arithmetic on them (`model`), the distribution (`sampling`), drafting
(`speculative`), text and terminals.

A batch is ragged: each pass takes the new tokens of all its sequences end to end, and finished
sequences leave the states. Under tensor and expert parallelism every rank holds every sequence and
calls alike; the first rank's tokens are everyone's, since sums may differ in their last bit between
ranks.

Shapes: B sequences, T tokens of a pass, V vocabulary.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.sampling import Draws, choose
from nemotron_train.generate.speculative import Acceptance, Drafter
from nemotron_train.model.decode_state import DecodeStates
from nemotron_train.model.hybrid import NemotronModel
from nemotron_train.platform.groups import from_first_rank


@dataclass
class Continuation:
    """A prompt and what grows behind it. `log_probabilities` are the model's own, of each new token
    given all before it: temperature 1, nothing cut off."""

    number: int  # among all that were asked for; with the seed, it decides the draws
    prompt: list[int]
    draws: Draws
    new: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended_by: str = ""  # "end", "length", or what `on_token` said

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.new


@dataclass
class Costs:
    """What was spent: tokens and seconds of prefill and decoding, passes of the whole model, bytes
    a sequence and a token of context on this rank."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    passes: int = 0
    constant_bytes: int = 0
    bytes_per_token: int = 0
    draft_bytes_per_token: int = 0


# Hears of each new token; a text that is not empty ends the sequence, and says why.
OnToken = Callable[[Continuation, int], str]


class Engine:
    """Generates from one model, which it leaves in evaluation mode. Makes no assumption on who
    holds the weights: a trainer may change them between calls."""

    def __init__(
        self, model: NemotronModel, end_token: int | None = None, device: str = "cpu"
    ) -> None:
        self.model, self.end_token, self.device = model, end_token, torch.device(device)
        self.costs = Costs()
        self.acceptance = Acceptance()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        knobs: DecodingKnobs,
        on_token: OnToken | None = None,
    ) -> list[Continuation]:
        """Continue every prompt, `knobs.batch` at a time; COLLECTIVE. Prompts hold a token or
        more."""
        assert all(prompts), "an empty prompt gives the model nothing to go on from"
        self.model.eval()
        sequences = [
            Continuation(number, list(prompt), Draws(sampling.seed, number))
            for number, prompt in enumerate(prompts)
        ]
        for start in range(0, len(sequences), knobs.batch):
            batch = sequences[start : start + knobs.batch]
            _Batch(self, batch, sampling, knobs, on_token or (lambda sequence, token: "")).run()
        return sequences

    def log_probabilities(
        self, sequences: Sequence[Sequence[int]], chunk: int = 512
    ) -> list[list[float]]:
        """The model's log-probability of every token but the first of each sequence, given those
        before it, by chunked prefill; COLLECTIVE."""
        return [[value for value, _ in found] for found in self.scores(sequences, chunk)]

    @torch.inference_mode()
    def scores(
        self, sequences: Sequence[Sequence[int]], chunk: int = 512
    ) -> list[list[tuple[float, bool]]]:
        """The same, and whether the token is the most probable one; COLLECTIVE."""
        self.model.eval()
        states, found = DecodeStates(len(sequences)), [[] for _ in sequences]
        targets = [list(tokens[1:]) for tokens in sequences]
        inputs = [list(tokens[:-1]) for tokens in sequences]
        for counts, hidden in self.passes(states, inputs, chunk):
            wanted = [
                token
                for row, (length, count) in enumerate(zip(states.lengths, counts, strict=True))
                for token in targets[row][length - count : length]
            ]
            logits_TV = self.model.logits(hidden)
            values = self.log_probabilities_of(logits_TV, wanted)
            largest = (logits_TV.argmax(1).cpu() == torch.tensor(wanted)).tolist()
            scored = iter(zip(values, largest, strict=True))
            for row, count in enumerate(counts):
                found[row] += itertools.islice(scored, count)
        return found

    def log_probabilities_of(self, logits_TV: Tensor, tokens: Sequence[int]) -> list[float]:
        """log softmax of one token a row."""
        tokens_T1 = torch.tensor(tokens, device=logits_TV.device).unsqueeze(1)
        chosen_T = logits_TV.gather(1, tokens_T1).squeeze(1)
        return (chosen_T - logits_TV.logsumexp(1)).tolist()

    def passes(
        self, states: DecodeStates, inputs: Sequence[Sequence[int]], chunk: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Run ragged inputs through the decoder, at most `chunk` tokens of a sequence at a time:
        (tokens of each sequence, their hidden states [T,1,hidden]) a pass."""
        done = [0] * len(inputs)
        while any(d < len(tokens) for d, tokens in zip(done, inputs, strict=True)):
            parts = [list(tokens[d : d + chunk]) for d, tokens in zip(done, inputs, strict=True)]
            counts = [len(part) for part in parts]
            new = states.next_batch(counts, self.device)
            tokens_T = torch.tensor([t for part in parts for t in part], device=self.device)
            self.costs.passes += 1
            done = [d + count for d, count in zip(done, counts, strict=True)]
            yield counts, self.model.decode(tokens_T, new)


class _Batch:
    """Sequences that are decoded together."""

    def __init__(
        self,
        engine: Engine,
        sequences: list[Continuation],
        sampling: Sampling,
        knobs: DecodingKnobs,
        on_token: OnToken,
    ) -> None:
        self.engine, self.model, self.rows = engine, engine.model, sequences
        self.sampling, self.knobs, self.on_token = sampling, knobs, on_token
        self.states = DecodeStates(len(sequences))
        self.drafter: Drafter | None = None
        if knobs.speculative:
            depths = knobs.draft_tokens or self.model.config.mtp_num_layers or 0
            assert depths > 0, "checked where the model was opened"
            self.drafter = Drafter(
                self.model, depths, len(sequences), sampling, engine.acceptance, engine.device
            )

    def run(self) -> None:
        """Prefill, then rounds until every sequence has ended."""
        costs, started = self.engine.costs, time.perf_counter()
        logits_BV = self._prefill()
        costs.prefill_seconds += time.perf_counter() - started
        costs.prefill_tokens += sum(len(row.prompt) for row in self.rows)
        started, rows = time.perf_counter(), list(self.rows)
        self._sample(logits_BV)
        while self.rows:
            if self.drafter is not None:
                self._speculate(self.drafter)
            else:
                self._step()
        costs.decode_seconds += time.perf_counter() - started
        costs.new_tokens += sum(len(row.new) for row in rows)

    def _prefill(self) -> Tensor:
        """The logits after each prompt, [B,V]."""
        last: list[Tensor | None] = [None] * len(self.rows)
        prompts = [row.prompt for row in self.rows]
        for counts, hidden_T1D in self.engine.passes(
            self.states, prompts, self.knobs.prefill_chunk
        ):
            ends = torch.tensor(counts).cumsum(0).tolist()
            for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
                if count and self.states.lengths[row] == len(prompts[row]):
                    last[row] = hidden_T1D[end - 1]
            if self.drafter is not None:
                self.drafter.see(hidden_T1D, counts, prompts)
        costs = self.engine.costs
        costs.constant_bytes = self.states.constant_bytes
        costs.bytes_per_token = self.states.bytes_per_token
        if self.drafter is not None:
            costs.draft_bytes_per_token = self.drafter.bytes_per_token
        return self.model.logits(torch.stack([h for h in last if h is not None]))

    def _sample(self, logits_BV: Tensor) -> None:
        """Draw a token for every sequence, and let those go that end with it."""
        draws = [row.draws for row in self.rows]
        tokens_B = from_first_rank(choose(logits_BV, self.sampling, draws))
        tokens = tokens_B.tolist()
        values = self.engine.log_probabilities_of(logits_BV, tokens)
        for row, token, value in zip(self.rows, tokens, values, strict=True):
            self._append(row, token, value)
        self._let_go()

    def _step(self) -> None:
        """One token more for every sequence."""
        new = self.states.next_batch([1] * len(self.rows), self.engine.device)
        tokens_T = torch.tensor([row.new[-1] for row in self.rows], device=self.engine.device)
        self.engine.costs.passes += 1
        self._sample(self.model.logits(self.model.decode(tokens_T, new)))

    def _speculate(self, drafter: Drafter) -> None:
        """One round: draft, verify in one pass, keep what was accepted and one token more."""
        drafted = drafter.draft([row.tokens for row in self.rows], [r.draws for r in self.rows])
        last_B1 = torch.tensor([[row.new[-1]] for row in self.rows], device=self.engine.device)
        tokens_Bn = torch.cat([last_B1, drafted.tokens_Bk], dim=1)
        num_rows, each = tokens_Bn.shape
        new = self.states.next_batch([each] * num_rows, self.engine.device, speculative=True)
        self.engine.costs.passes += 1
        hidden_T1D = self.model.decode(tokens_Bn.flatten(), new)
        logits_TV = self.model.logits(hidden_T1D)
        logits_BnV = logits_TV.unflatten(0, (num_rows, each))
        verdict = drafter.judge(logits_BnV, drafted, [row.draws for row in self.rows])
        kept = [count + 1 for count in verdict.accepted]
        self.states.rewind(kept)
        drafter.keep(hidden_T1D, kept)
        proposed = drafted.tokens_Bk.tolist()
        outcome = [
            [*proposed[row][:count], verdict.following[row]]
            for row, count in enumerate(verdict.accepted)
        ]
        self._append_round(logits_TV, each, outcome)
        self._let_go()

    def _append_round(self, logits_TV: Tensor, each: int, outcome: list[list[int]]) -> None:
        places = [row * each + i for row, tokens in enumerate(outcome) for i in range(len(tokens))]
        flat = [token for tokens in outcome for token in tokens]
        chosen_TV = logits_TV[torch.tensor(places, device=logits_TV.device)]
        values = iter(self.engine.log_probabilities_of(chosen_TV, flat))
        for row, tokens in zip(self.rows, outcome, strict=True):
            own = [next(values) for _ in tokens]
            for token, value in zip(tokens, own, strict=True):
                if not row.ended_by:
                    self._append(row, token, value)

    def _append(self, row: Continuation, token: int, value: float) -> None:
        row.new.append(token)
        row.log_probabilities.append(value)
        row.ended_by = self.on_token(row, token)
        if self.knobs.end_of_document and token == self.engine.end_token:
            row.ended_by = row.ended_by or "end"
        if len(row.new) >= self.knobs.max_new_tokens:
            row.ended_by = row.ended_by or "length"

    def _let_go(self) -> None:
        """Drop ended sequences from the states."""
        going_on = [number for number, row in enumerate(self.rows) if not row.ended_by]
        if len(going_on) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in going_on]
        if going_on:
            self.states.select(going_on, self.engine.device)
            if self.drafter is not None:
                self.drafter.select(going_on)
