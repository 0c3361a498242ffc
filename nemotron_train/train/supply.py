"""What one step trains on: the next rows of the data, or what another way of training supplies.

Owns: the type, and the supply of pretraining. Does not own: reading (`global_batch`), the step
(`train_step`).

Shapes: K heads (the main head and one per MTP depth).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron_train.config.schema import Config, TrainConfig
from nemotron_train.data.batches import Batch, BatchSource, DataState
from nemotron_train.plan.derive import Derived
from nemotron_train.run_folder.progress import Progress
from nemotron_train.train.global_batch import Tensors, micro_batches, take_together
from nemotron_train.train.prefetch import Prefetched


@dataclass(frozen=True)
class StepBatch:
    """The global batch of one step, as one rank sees it.

    batch: this rank's rows. targets_K: what the loss sum of each head is divided by, over all
    ranks, FP64. tokens: places in the rows of all data-parallel ranks. split: makes micro-batches
    of the rows. metrics: of the supply; measure: more of them, after the forward and backward
    passes. is_loss: whether the main head's loss falls in a run that goes well, so that the guard
    may judge it.
    """

    batch: Batch
    next_data: DataState
    targets_K: torch.Tensor
    tokens: int
    split: Callable[[Batch, int, str], Iterator[Tensors]] = micro_batches
    metrics: dict[str, Any] = field(default_factory=dict)
    measure: Callable[[], dict[str, Any]] = dict
    is_loss: bool = True


def is_short(train: TrainConfig, step: int) -> bool:
    """Whether step `step` (counted from 1) trains on short rows.

    A share of `short_share` of the steps is short, spread as evenly as possible. All rows of a step
    have the same length, as in the context extension of Nemotron 3 (Ultra report: 8% of the
    iterations at 4k, the rest at 1M).
    """
    share = Fraction(str(train.short_share))  # through str: 0.1 is exactly 1/10
    return math.floor(step * share) > math.floor((step - 1) * share)


class Supply(Protocol):
    """Gives each step its batch. COLLECTIVE."""

    def __call__(self, progress: Progress) -> StepBatch:
        """The batch of the step after `progress`."""
        ...


class DataSupply:
    """The next rows of the run's data. Raises ConfigError, before any change of a weight, if the
    data has changed since it was opened."""

    def __init__(
        self,
        config: Config,
        derived: Derived,
        batches: BatchSource | Prefetched,
        groups: ProcessGroupCollection,
        device: str,
    ) -> None:
        self._config = config
        self._derived = derived
        self._batches = batches
        self._groups = groups
        self._device = device
        rows = derived.sequences_per_step // derived.data_parallel
        self._rank_rows = (groups.dp.rank() * rows, (groups.dp.rank() + 1) * rows)

    def __call__(self, progress: Progress) -> StepBatch:
        """The batch after the data state of `progress`; in a short step, cut to short rows."""
        train = self._config.train
        batch, next_data, targets_K = take_together(
            self._batches,
            progress.data,
            self._derived.sequences_per_step,
            self._rank_rows,
            num_heads=1 + self._config.model.mtp.depths,
            group=self._groups.dp,
            device=self._device,
            row_length=train.short_sequence_length if is_short(train, progress.step + 1) else 0,
        )
        metrics = {}
        if train.short_sequence_length:
            metrics["sequence_length"] = batch.tokens_BS.shape[1]
        return StepBatch(
            batch, next_data, targets_K, self._derived.tokens_per_step, metrics=metrics
        )
