"""The next rows of every rank and the number of targets of all of them together.

Owns: reading together, so that a fault of the data on one rank ends every rank with the same line;
the micro-batches on the device. Does not own: which rows (`data.batches`).

Shapes: B rows, S tokens per row, K heads (the main head and one per MTP depth).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.batches import Batch, BatchSource, DataState
from nemotron_train.model.documents import PackedDocuments
from nemotron_train.model.mtp import depth_mask
from nemotron_train.platform.device import to_device
from nemotron_train.platform.groups import sum_over
from nemotron_train.train.prefetch import Prefetched

Tensors = dict[str, Any]  # arguments of the model's forward pass


def count_targets(batch: Batch, num_heads: int) -> np.ndarray:
    """Number of targets that count in the loss of each head in `batch`: float64 [K]."""
    return np.array(
        [
            depth_mask(batch.loss_mask_BS, batch.document_ids_BS, depth).astype(np.float64).sum()
            for depth in range(num_heads)
        ]
    )


def take_together(
    batches: BatchSource | Prefetched,
    state: DataState,
    num_sequences: int,
    rank_rows: tuple[int, int],
    *,
    num_heads: int,
    group: dist.ProcessGroup,
    device: str,
    row_length: int = 0,
) -> tuple[Batch, DataState, torch.Tensor]:
    """This rank's rows, the state after the global batch, and the number of targets of each head
    over `group`: FP64 [K]. COLLECTIVE.

    row_length: cut the rows to this length; 0: leave them. Raises ConfigError on every rank of
    `group` if `BatchSource.take` raises it on one; the message is that of the lowest such rank. The
    ranks learn of it from the sum of the targets, so a step without a fault costs no further
    collective. SYNC on a GPU if `group` has several ranks: one number, before the step's work.
    """
    problem, batch, after = "", None, state
    counts = np.zeros(num_heads + 1)  # the last: ranks that could not read
    try:
        batch, after = batches.take(state, num_sequences, rank_rows)
    except ConfigError as error:
        problem, counts[-1] = str(error), 1
    else:
        batch = batch.cut(row_length) if row_length else batch
        counts[:-1] = count_targets(batch, num_heads)
    summed = sum_over(torch.from_numpy(counts).to(device), group)
    if group.size() == 1:
        if problem:
            raise ConfigError(problem)
    elif summed[-1] > 0:
        problems: list[str] = [""] * group.size()
        dist.all_gather_object(problems, problem, group=group)
        raise ConfigError(next(filter(None, problems)))
    assert batch is not None
    return batch, after, summed[:-1]


def micro_batches(batch: Batch, rows: int, device: str) -> Iterator[Tensors]:
    """Split the rows of this data-parallel replica into micro-batches of `rows` rows on `device`.

    Rows are not cut along S: every context-parallel rank gets whole rows.
    """
    for start in range(0, len(batch.tokens_BS), rows):
        micro_rows = slice(start, start + rows)
        tensors: dict[str, Any] = {
            name: to_device(torch.from_numpy(array[micro_rows]), device)
            for name, array in (
                ("tokens_BS", batch.tokens_BS),
                ("labels_BS", batch.labels_BS),
                ("loss_mask_BS", batch.loss_mask_BS),
            )
        }
        host_ids_BS = torch.from_numpy(batch.document_ids_BS[micro_rows])
        tensors["document_ids_BS"] = PackedDocuments.of(to_device(host_ids_BS, device), host_ids_BS)
        yield tensors
