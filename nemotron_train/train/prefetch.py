"""The next batch, read by a thread while the GPU computes the step before it.

Owns: which batch is read ahead, and that its arrays are in pinned memory, from which a copy to the
GPU does not hold up the host. Does not own: what a batch contains (`data.batches`), the copies
(`global_batch`).

The position in the data stays that of the batch that was trained on: `take` returns the state after
the batch that it returns, and never that of the one read ahead. A batch read ahead that nobody asks
for, as after a return to a checkpoint, is dropped.
"""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from nemotron_train.data.batches import Batch, BatchSource, DataState
from nemotron_train.platform.device import own_device, pinned, use_in_thread

Place = tuple[DataState, int, tuple[int, int] | None]


class Prefetched:
    """A `BatchSource` for `TrainStep` with one batch read ahead. At most one thread reads, so the
    source is never used by two."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="next batch",
            initializer=use_in_thread,
            initargs=(own_device(),),
        )
        self._next: tuple[Place, Future[tuple[Batch, DataState]]] | None = None
        # Copies from its memory may still be under way until the step has ended.
        self._in_use: Batch | None = None

    def take(
        self, state: DataState, num_sequences: int, rank_slice: tuple[int, int] | None = None
    ) -> tuple[Batch, DataState]:
        """As `BatchSource.take`, also its ConfigError, which a batch read ahead raises only when it
        is asked for. Begins to read the batch after this one."""
        place = (state, num_sequences, rank_slice)
        if self._next is None or self._next[0] != place:
            self._next = (place, self._thread.submit(self._read, place))  # after what is under way
        batch, after = self._next[1].result()
        following = (after, num_sequences, rank_slice)
        self._next = (following, self._thread.submit(self._read, following))
        self._in_use = batch
        return batch, after

    def _read(self, place: Place) -> tuple[Batch, DataState]:
        batch, after = self._source.take(*place)
        arrays = {
            name: pinned(value)
            for name, value in vars(batch).items()
            if isinstance(value, np.ndarray)
        }
        return dataclasses.replace(batch, **arrays), after
