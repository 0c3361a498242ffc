"""Reading ahead: the same batches and positions as without, whatever is asked for.

Second truth: the source itself, asked directly. Not covered: pinned memory, which needs a GPU, and
the time that it saves.
"""

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.batches import Batch
from nemotron_train.train import prefetch
from nemotron_train.train.prefetch import Prefetched


@dataclass(frozen=True)
class Position:
    """The only thing that the reader ahead knows of a position: whether it equals another."""

    samples: int


class Source:
    """Rows of the sample's number. Fails for the positions in `faults`; counts its callers."""

    def __init__(self, faults: frozenset[int] = frozenset()) -> None:
        self.faults, self.inside, self.taken = faults, threading.Lock(), []
        self.began = threading.Event()

    def take(self, state: Any, num: int, rank_slice: Any = None) -> tuple[Batch, Any]:
        assert self.inside.acquire(blocking=False), "two threads read at once"
        self.taken.append(state.samples)
        self.began.set()
        try:
            if state.samples in self.faults:
                raise ConfigError(f"data changed at {state.samples}")
            start, stop = rank_slice or (0, num)
            rows = np.arange(state.samples + start, state.samples + stop)
            tokens = np.repeat(rows[:, None], 3, axis=1)
            batch = Batch(tokens, tokens, tokens, tokens, rows, np.zeros((len(rows), 3)))
            return batch, replace(state, samples=state.samples + num)
        finally:
            self.inside.release()


@pytest.fixture(autouse=True, scope="module")
def _no_gpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "pinned", lambda array: array.copy())
        yield


asked = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 4), st.sampled_from([None, (0, 1), (1, 1)])),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(jumps=asked, faults=st.frozensets(st.integers(0, 12)), follows=st.booleans())
def test_every_batch_is_the_source_s_own(jumps, faults, follows) -> None:
    """Jumps to any position, repeats, other sizes, and positions followed as a run does. A fault is
    raised for its own batch and for no other."""
    direct, ahead = Source(faults), Prefetched(Source(faults))  # type: ignore[arg-type]
    state: Any = Position(0)
    for samples, num, rank_slice in jumps:
        place: Any = (state if follows else Position(samples), num, rank_slice)
        try:
            expected, after = direct.take(*place)
        except ConfigError as error:
            with pytest.raises(ConfigError, match=f"^{error}$"):
                ahead.take(*place)
            state = Position(state.samples + 1)
            continue
        batch, ours = ahead.take(*place)
        assert ours == after
        for name, array in vars(expected).items():
            assert np.array_equal(getattr(batch, name), array), name
        state = after


def test_the_next_batch_is_read_while_the_step_runs() -> None:
    source = Source()
    ahead = Prefetched(source)  # type: ignore[arg-type]
    _, after = ahead.take(Position(0), 2)  # type: ignore[arg-type]
    ahead._next[1].result(timeout=60)  # type: ignore[index]
    assert source.taken == [0, 2] and after == Position(2)
    ahead.take(after, 2)
    ahead._next[1].result(timeout=60)  # type: ignore[index]
    assert source.taken == [0, 2, 4], "the batch read ahead was used"
