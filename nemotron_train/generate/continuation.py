"""A sequence that is being continued, the costs of continuing, and the listener's type."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from nemotron_train.generate.sampling import Draws


@dataclass
class Continuation:
    """A prompt and its continuation.

    log_probabilities: of each new token given all tokens before it, under the model's unmodified
    distribution (temperature 1, no top-k or top-p). drawn_log_probabilities: under the distribution
    that it was drawn from. Both are NaN for a given token. given: whether the listener gave the
    token, or it was drawn. pending: new tokens that the model has not read yet.
    """

    number: int  # of the prompt; with the seed, it determines the random draws
    prompt: list[int]
    draws: Draws
    new: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    drawn_log_probabilities: list[float] = field(default_factory=list)
    given: list[bool] = field(default_factory=list)
    pending: int = 0
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


# To a drawn token. A text that is not empty ends the sequence and becomes its `ended_by`. Ids go on
# the sequence as if they had been drawn: the end of reasoning that a budget forces, or what an
# environment answers. They come even after a token that would end the sequence, up to
# `max_new_tokens`.
Answer = str | Sequence[int]

# Called for each drawn token. The answers that come as futures in one round are awaited together
# when all tokens of the round have been seen.
OnToken = Callable[[Continuation, int], Answer | Future[Answer]]
