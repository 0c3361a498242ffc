"""A sequence that is being continued, the costs of continuing, and the listener's type."""

from collections.abc import Callable
from dataclasses import dataclass, field

from nemotron_train.generate.sampling import Draws


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
