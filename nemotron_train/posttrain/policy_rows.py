"""Rollouts packed into training rows, with what the loss of each token needs. NumPy, no torch.

Owns: the arrays. Does not own: advantages and corrections, the forward pass.

Each rollout, its prompt and all that followed, is one document of a row, so rollouts do not see
each other. A place of a row holds a token, and its label is the next token. What belongs to a
target stands at the place that predicts it: whether it was sampled, its log-probability by the
sampler, the number of its rollout.

Array legend: B rows, S places of a row, n trained targets of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotron_train.data.batches import Batch
from nemotron_train.data.packed import pack
from nemotron_train.posttrain.rollout import SAMPLED, Rollout


@dataclass(frozen=True)
class PolicyRows(Batch):
    """Rows of rollouts. `loss_mask_BS` is 1 where the target was sampled by the policy.

    sampler_BS: FP64 log-probabilities by the sampler, 0 elsewhere. rollout_BS: index of the rollout
    that a place belongs to, -1 for padding.
    """

    sampler_BS: np.ndarray
    rollout_BS: np.ndarray

    @property
    def trained_BS(self) -> np.ndarray:
        """Whether the target of a place was sampled: bool [B,S]."""
        return self.loss_mask_BS > 0


def pack_rollouts(
    rollouts: Sequence[Rollout], length: int, multiple: int, padding_id: int, least_rows: int = 0
) -> PolicyRows:
    """The rows of these rollouts, each at most `length` + 1 tokens long.

    The number of rows is a multiple of `multiple` and at least `least_rows`; the rows that this
    needs are padding. A rollout without tokens is in no row.
    """
    sequences = [rollout.prompt_ids + rollout.ids for rollout in rollouts]
    filled = [number for number, ids in enumerate(sequences) if rollouts[number].ids]
    lengths = np.array([len(sequences[number]) for number in filled], dtype=np.int64)
    packed = pack(lengths, length + 1)
    num_rows = max(len(packed), least_rows, 1)
    num_rows = -(-num_rows // multiple) * multiple
    tokens_BT = np.full((num_rows, length + 1), padding_id, dtype=np.int64)
    documents_BT = np.zeros_like(tokens_BT)
    rollout_BT = np.full_like(tokens_BT, -1)
    sampled_BT = np.zeros(tokens_BT.shape, dtype=bool)
    sampler_BT = np.zeros(tokens_BT.shape, dtype=np.float64)
    for row, members in enumerate(packed):
        begin = 0
        for document, member in enumerate(members):
            number = filled[member]
            rollout, ids = rollouts[number], sequences[number]
            place, answer = slice(begin, begin + len(ids)), begin + len(rollout.prompt_ids)
            tokens_BT[row, place] = ids
            documents_BT[row, place] = document
            rollout_BT[row, place] = number
            kinds = np.array([kind == SAMPLED for kind in rollout.kinds], dtype=bool)
            sampled_BT[row, answer : place.stop] = kinds
            values = np.array(rollout.log_probabilities, dtype=np.float64)
            sampler_BT[row, answer : place.stop] = np.where(kinds, values, 0.0)
            begin = place.stop
        documents_BT[row, begin:] = len(members)
    return PolicyRows(
        tokens_BS=tokens_BT[:, :-1].copy(),
        labels_BS=tokens_BT[:, 1:].copy(),
        loss_mask_BS=sampled_BT[:, 1:].astype(np.float32),
        document_ids_BS=documents_BT[:, :-1].copy(),
        sample_ids_B=np.arange(num_rows),
        origins_B3=np.zeros((num_rows, 3), dtype=np.int64),
        sampler_BS=sampler_BT[:, 1:].copy(),
        rollout_BS=np.where(rollout_BT[:, 1:] >= 0, rollout_BT[:, 1:], -1),
    )
