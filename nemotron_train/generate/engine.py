"""The decoding engine: continues ragged prompts, returns tokens and log-probabilities.

Owns: chunked prefill, the decode loop, when a sequence ends, cost counters. Does not own: KV cache
and SSM states and their arithmetic (`model`), the sampling distribution (`sampling`), drafting
(`speculative`), text and terminals.

Batches are ragged: each forward call takes the new tokens of all sequences, concatenated without
padding. Finished sequences are removed from the states. Under tensor and expert parallelism every
rank holds every sequence and makes the same calls. All ranks use the tokens of the first rank,
because sums may differ in the last bit between ranks.

Shapes: B sequences, T tokens of a forward call, V vocabulary.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron_train.config.errors import ConfigError
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.sampling import Draws, choose
from nemotron_train.generate.speculative import Acceptance, Drafter
from nemotron_train.model.decode_state import DecodeStates
from nemotron_train.model.hybrid import NemotronModel
from nemotron_train.platform.groups import from_first_rank


@dataclass
class Continuation:
    """A prompt and its continuation.

    log_probabilities: of each new token given all tokens before it, under the model's unmodified
    distribution (temperature 1, no top-k or top-p).
    """

    number: int  # index of the prompt; with the seed, it determines the random draws
    prompt: list[int]
    draws: Draws
    new: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended_by: str = ""  # "end", "length", or the text that `on_token` returned; "": not finished

    @property
    def tokens(self) -> list[int]:
        """The prompt and the new tokens."""
        return self.prompt + self.new


@dataclass
class Costs:
    """Cost counters: tokens and seconds of prefill and decoding, forward calls of the whole model
    (`passes`), memory of this rank.

    constant_bytes: per sequence. bytes_per_token, draft_bytes_per_token: per token of context.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    passes: int = 0
    constant_bytes: int = 0
    bytes_per_token: int = 0
    draft_bytes_per_token: int = 0


# Called for each new token. A non-empty result ends the sequence and becomes its `ended_by`.
OnToken = Callable[[Continuation, int], str]


class Engine:
    """Generates from one model, which it leaves in evaluation mode. The weights may change between
    calls, for example when a trainer owns the model.

    end_token: the id or ids that end a sequence, the end-of-document id first, or None. known_ids:
    the ids that may be drawn, those of the tokenizer; None: all of the model's vocabulary, which
    is often padded. costs, acceptance: counters over all calls.
    """

    def __init__(
        self,
        model: NemotronModel,
        end_token: int | Sequence[int] | None = None,
        device: str = "cpu",
        known_ids: Collection[int] | None = None,
    ) -> None:
        self.model = model
        ends = [end_token] if isinstance(end_token, int) else list(end_token or ())
        self.end_tokens = frozenset(ends)
        self.end_token = ends[0] if ends else None
        self.device = torch.device(device)
        self._known_ids = known_ids
        self._unknown_V: Tensor | None = None
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
        """Continue every prompt, `knobs.batch` at a time; COLLECTIVE. No prompt may be empty.

        Raises ConfigError if the model's logits are not finite.
        """
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
        """Log-probability of every token of each sequence given the tokens before it, except the
        first token; COLLECTIVE.

        chunk: prefill tokens of a sequence per forward call. Raises ConfigError if logits are not
        finite.
        """
        return [[value for value, _ in scored] for scored in self.scores(sequences, chunk)]

    @torch.inference_mode()
    def scores(
        self, sequences: Sequence[Sequence[int]], chunk: int = 512
    ) -> list[list[tuple[float, bool]]]:
        """(log-probability, whether the token is the most probable one) of every token of each
        sequence except the first; COLLECTIVE."""
        self.model.eval()
        states, results = DecodeStates(len(sequences)), [[] for _ in sequences]
        targets = [list(tokens[1:]) for tokens in sequences]
        inputs = [list(tokens[:-1]) for tokens in sequences]
        for counts, hidden in self.passes(states, inputs, chunk):
            target_tokens = [
                token
                for row, (length, count) in enumerate(zip(states.lengths, counts, strict=True))
                for token in targets[row][length - count : length]
            ]
            logits_TV = self.model.logits(hidden)
            values = self.log_probabilities_of(logits_TV, target_tokens)
            is_best = (logits_TV.argmax(1).cpu() == torch.tensor(target_tokens)).tolist()
            scored = iter(zip(values, is_best, strict=True))
            for row, count in enumerate(counts):
                results[row] += itertools.islice(scored, count)
        return results

    def drawable(self, logits: Tensor) -> Tensor:
        """Logits [..., V] with minus infinity for the ids that may not be drawn."""
        if self._known_ids is None:
            return logits
        if self._unknown_V is None:
            unknown_V = torch.ones(logits.shape[-1], dtype=torch.bool)
            unknown_V[torch.tensor(sorted(self._known_ids))] = False
            self._unknown_V = unknown_V.to(logits.device)
        return logits.masked_fill(self._unknown_V, float("-inf"))

    def log_probabilities_of(self, logits_TV: Tensor, tokens: Sequence[int]) -> list[float]:
        """Log-probability of one token per row of the logits [T,V].

        Raises ConfigError if logits are not finite.
        """
        tokens_T1 = torch.tensor(tokens, device=logits_TV.device).unsqueeze(1)
        chosen_T = logits_TV.gather(1, tokens_T1).squeeze(1)
        values = (chosen_T - logits_TV.logsumexp(1)).tolist()
        # A logit of NaN or plus infinity anywhere in the row makes its log-probability NaN.
        if not all(map(math.isfinite, values)):
            raise ConfigError(
                "the model's logits are not finite; the weights are damaged or training had "
                "diverged: take an earlier checkpoint (RUN_FOLDER@STEP)"
            )
        return values

    def passes(
        self, states: DecodeStates, inputs: Sequence[Sequence[int]], chunk: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Run ragged inputs through the decoder, at most `chunk` tokens of a sequence per call.

        Yields for each call (number of tokens of each sequence, hidden states [T,1,hidden]).
        """
        done = [0] * len(inputs)
        while any(start < len(tokens) for start, tokens in zip(done, inputs, strict=True)):
            parts = [
                list(tokens[start : start + chunk])
                for start, tokens in zip(done, inputs, strict=True)
            ]
            counts = [len(part) for part in parts]
            decode_batch = states.next_batch(counts, self.device)
            tokens_T = torch.tensor([t for part in parts for t in part], device=self.device)
            self.costs.passes += 1
            done = [start + count for start, count in zip(done, counts, strict=True)]
            yield counts, self.model.decode(tokens_T, decode_batch)


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
        self.engine = engine
        self.model = engine.model
        self.rows = sequences  # unfinished ones only
        self.sampling = sampling
        self.knobs = knobs
        self.on_token = on_token
        self.states = DecodeStates(len(sequences))
        self.drafter: Drafter | None = None
        if knobs.speculative:
            depths = knobs.draft_tokens or self.model.config.mtp_num_layers or 0
            assert depths > 0, "checked where the model was opened"
            self.drafter = Drafter(
                self.model,
                depths,
                len(sequences),
                sampling,
                engine.acceptance,
                engine.device,
                engine.drawable,
            )

    def run(self) -> None:
        """Prefill, then rounds until every sequence has ended."""
        costs, started = self.engine.costs, time.perf_counter()
        logits_BV = self._prefill()
        costs.prefill_seconds += time.perf_counter() - started
        costs.prefill_tokens += sum(len(row.prompt) for row in self.rows)
        started, sequences = time.perf_counter(), list(self.rows)
        self._sample(logits_BV)
        while self.rows:
            if self.drafter is not None:
                self._speculate(self.drafter)
            else:
                self._step()
        costs.decode_seconds += time.perf_counter() - started
        costs.new_tokens += sum(len(row.new) for row in sequences)

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
                self.drafter.prefill(hidden_T1D, counts, prompts)
        costs = self.engine.costs
        costs.constant_bytes = self.states.constant_bytes
        costs.bytes_per_token = self.states.bytes_per_token
        if self.drafter is not None:
            costs.draft_bytes_per_token = self.drafter.bytes_per_token
        return self.model.logits(torch.stack([h for h in last if h is not None]))

    def _sample(self, logits_BV: Tensor) -> None:
        """Draw the next token of every sequence and drop the sequences that end with it."""
        draws = [row.draws for row in self.rows]
        tokens_B = from_first_rank(choose(self.engine.drawable(logits_BV), self.sampling, draws))
        tokens = tokens_B.tolist()
        values = self.engine.log_probabilities_of(logits_BV, tokens)
        for row, token, value in zip(self.rows, tokens, values, strict=True):
            self._append(row, token, value)
        self._drop_finished()

    def _step(self) -> None:
        """Decode one token of every sequence."""
        decode_batch = self.states.next_batch([1] * len(self.rows), self.engine.device)
        tokens_T = torch.tensor([row.new[-1] for row in self.rows], device=self.engine.device)
        self.engine.costs.passes += 1
        self._sample(self.model.logits(self.model.decode(tokens_T, decode_batch)))

    def _speculate(self, drafter: Drafter) -> None:
        """One round: draft, verify in one forward call, keep the accepted drafts and one token."""
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
        num_kept = [count + 1 for count in verdict.accepted]
        self.states.rewind(num_kept)
        drafter.keep(hidden_T1D, num_kept)
        proposed = drafted.tokens_Bk.tolist()
        outcome = [
            [*proposed[row][:count], verdict.following[row]]
            for row, count in enumerate(verdict.accepted)
        ]
        self._append_round(logits_TV, tokens_per_row, outcome)
        self._drop_finished()

    def _append_round(
        self, logits_TV: Tensor, tokens_per_row: int, outcome: list[list[int]]
    ) -> None:
        indices = [
            row * tokens_per_row + i
            for row, tokens in enumerate(outcome)
            for i in range(len(tokens))
        ]
        flat_tokens = [token for tokens in outcome for token in tokens]
        chosen_TV = logits_TV[torch.tensor(indices, device=logits_TV.device)]
        values = iter(self.engine.log_probabilities_of(chosen_TV, flat_tokens))
        for row, tokens in zip(self.rows, outcome, strict=True):
            row_values = [next(values) for _ in tokens]
            for token, value in zip(tokens, row_values, strict=True):
                # The sequence may end inside the round; the tokens after its end are dropped.
                if not row.ended_by:
                    self._append(row, token, value)

    def _append(self, row: Continuation, token: int, value: float) -> None:
        row.new.append(token)
        row.log_probabilities.append(value)
        row.ended_by = self.on_token(row, token)
        if self.knobs.end_of_document and token in self.engine.end_tokens:
            row.ended_by = row.ended_by or "end"
        if len(row.new) >= self.knobs.max_new_tokens:
            row.ended_by = row.ended_by or "length"

    def _drop_finished(self) -> None:
        """Remove finished sequences from the states."""
        active = [number for number, row in enumerate(self.rows) if not row.ended_by]
        if len(active) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in active]
        if active:
            self.states.select(active, self.engine.device)
            if self.drafter is not None:
                self.drafter.select(active)
