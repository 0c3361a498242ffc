"""The decoding engine: continues ragged prompts, returns tokens and log-probabilities.

Owns: what users and other layers call. Does not own: forward calls (`decoder`), the decode loop
(`batch`), KV cache and SSM states and their arithmetic (`model`), the sampling distribution
(`sampling`), drafting (`speculative`), text and terminals.
"""

import itertools
from collections.abc import Sequence

import torch

from nemotron_train.generate.batch import Batch
from nemotron_train.generate.continuation import Continuation, OnToken
from nemotron_train.generate.decoder import Decoder
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.sampling import Draws
from nemotron_train.model.decode_state import DecodeStates


class Engine(Decoder):
    """Generates from one model, which it leaves in evaluation mode. The weights may change between
    calls, for example when a trainer owns the model."""

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        knobs: DecodingKnobs,
        on_token: OnToken | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Continuation]:
        """Continue every prompt, `knobs.batch` at a time; COLLECTIVE. No prompt may be empty.

        numbers: of the prompts, which determine their random draws with the seed; default: 0, 1, …

        The place of a finished sequence goes to the next prompt. Equal prompts that are admitted
        together are run through the model once. Raises ConfigError if the model's logits are not
        finite.
        """
        assert all(prompts), "an empty prompt gives the model nothing to go on from"
        self.model.eval()
        numbers = range(len(prompts)) if numbers is None else numbers
        sequences = [
            Continuation(number, list(prompt), Draws(sampling.seed, number))
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
        Batch(self, sequences, sampling, knobs, on_token or (lambda sequence, token: "")).run()
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
