"""Environments for ranks that share one model: the first rank asks them, all get the answer.

Ranks of a tensor- or expert-parallel model decode the same sequences. An environment that draws at
random, or whose call runs out of time on one rank alone, would give them different answers, and
they would then wait for each other in different collectives.

Owns: the exchange. Does not own: workers and their limits (`environments.scoring`).
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch.distributed as dist

from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.environments.protocol import Episode, Message, Row, Score


class Environments(Protocol):
    """What the sampler asks environments for. `Scoring` has it, and `SharedScoring`."""

    def load(self, names: Iterable[str]) -> dict[str, int]:
        """Name → most turns of an episode."""
        ...

    def start(self, rows: Sequence[Row]) -> list[list[Message] | Score]:
        """The first messages of each row's episode, or its score."""
        ...

    def begin_step[Result](
        self, episode: Episode, then: Callable[[list[Message] | Score | None], Result]
    ) -> Future[Result]:
        """The reply to the last completion, and what `then` makes of it."""
        ...

    def begin_score(self, episode: Episode) -> Future[Score]:
        """The score of an episode."""
        ...


class SharedScoring:
    """`Environments` over all ranks of this launch, which make the same calls and wait for the
    futures in the same order; COLLECTIVE.

    scoring: on the first rank; None on the others. An exception of the first rank is raised on all.
    `then` runs on every rank, in the thread that waits.
    """

    def __init__(self, scoring: Environments | None) -> None:
        self._scoring = scoring

    def load(self, names: Iterable[str]) -> dict[str, int]:
        """Name → most turns of an episode. Raises ConfigError as `Scoring.load`."""
        return self._shared(lambda scoring: scoring.load(names))

    def start(self, rows: Sequence[Row]) -> list[list[Message] | Score]:
        """The first messages of each row's episode, or its score."""
        return self._shared(lambda scoring: scoring.start(rows))

    def begin_step[Result](
        self, episode: Episode, then: Callable[[list[Message] | Score | None], Result]
    ) -> Future[Result]:
        """The reply to the last completion. The first rank's environment works meanwhile."""
        asked = _begun(self._scoring, lambda scoring: scoring.begin_step(episode, _same))
        return _Shared(lambda: then(self._shared(lambda _: asked.result())))

    def begin_score(self, episode: Episode) -> Future[Score]:
        """The score of an episode. The first rank's environment works meanwhile."""
        asked = _begun(self._scoring, lambda scoring: scoring.begin_score(episode))
        return _Shared(lambda: self._shared(lambda _: asked.result()))

    def _shared(self, ask: Callable[[Environments], Any]) -> Any:
        """What `ask` gives on the first rank, on every rank."""
        outcome: list[Any] = [None, None]
        if self._scoring is not None:
            try:
                outcome[0] = ask(self._scoring)
            except ConfigError as error:
                outcome[1] = error
            except Exception as error:  # of any type; not every exception can be sent
                outcome[1] = RuntimeError(f"{type(error).__name__}: {error}")
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _same[Value](value: Value) -> Value:
    return value


def _begun(
    scoring: Environments | None, begin: Callable[[Environments], Future[Any]]
) -> Future[Any]:
    """The call that has begun on the first rank; on the others nothing."""
    return Future() if scoring is None else begin(scoring)


class _Shared[Result](Future[Result]):
    """A future whose result is exchanged when it is asked for, once."""

    def __init__(self, exchange: Callable[[], Result]) -> None:
        super().__init__()
        self._exchange = exchange

    def result(self, timeout: float | None = None) -> Result:
        if not self.done():
            self.set_result(self._exchange())
        return super().result(timeout)
