"""The model's forward calls in generation: ragged inputs, logits that may be drawn from, scores.

Owns: what one forward call takes and gives, the check that logits are finite, cost counters. Does
not own: the decode loop (`batch`), what users call (`engine`).

Batches are ragged: each forward call takes the new tokens of all sequences, concatenated without
padding. Under tensor and expert parallelism every rank holds every sequence and makes the same
calls. All ranks use the tokens of the first rank, because sums may differ in the last bit between
ranks.

Shapes: T tokens of a forward call, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from nemotron_train.config.errors import ConfigError
from nemotron_train.generate.continuation import Costs
from nemotron_train.generate.knobs import Sampling
from nemotron_train.generate.sampling import distribution
from nemotron_train.generate.speculative import Acceptance
from nemotron_train.model.decode_state import DecodeStates
from nemotron_train.model.hybrid import NemotronModel
from nemotron_train.platform.groups import from_first_rank


class Decoder:
    """Runs one model. The weights may change between calls.

    end_token: the id or ids that end a sequence, the end-of-document id first, or None. known_ids:
    the ids that may be drawn, those of the tokenizer; None: all of the model's vocabulary, which
    is often padded. agree: gives all ranks that share the model the same tokens; COLLECTIVE. costs,
    acceptance: counters over all calls.
    """

    def __init__(
        self,
        model: NemotronModel,
        end_token: int | Sequence[int] | None = None,
        device: str = "cpu",
        known_ids: Collection[int] | None = None,
        agree: Callable[[Tensor], Tensor] = from_first_rank,
    ) -> None:
        self.model = model
        ends = [end_token] if isinstance(end_token, int) else list(end_token or ())
        self.end_tokens = frozenset(ends)
        self.end_token = ends[0] if ends else None
        self.device = torch.device(device)
        self._known_ids = known_ids
        self.agree = agree
        self._unknown_V: Tensor | None = None
        self.costs = Costs()
        self.acceptance = Acceptance()

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

    def drawn_log_probabilities_of(
        self, logits_TV: Tensor, tokens: Sequence[int], sampling: Sampling
    ) -> list[float]:
        """Log-probability of one token per row under the distribution that it was drawn from: the
        drawable ids at the sampling's temperature, top-k and top-p; 0 if greedy.

        Call `log_probabilities_of` before it, which checks that the logits are finite.
        """
        if sampling.temperature == 0:
            return [0.0] * len(tokens)
        drawable_TV = self.drawable(logits_TV)
        if sampling.top_k or sampling.top_p < 1:
            log_TV = distribution(drawable_TV, sampling).log()
        else:
            log_TV = torch.log_softmax(drawable_TV / sampling.temperature, dim=-1)
        tokens_T1 = torch.tensor(tokens, device=logits_TV.device).unsqueeze(1)
        return log_TV.gather(1, tokens_T1).squeeze(1).tolist()

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
