"""The trainer's side of a policy step: log-probabilities of rows, micro-batches with their loss.

Owns: what goes to the device. Does not own: the formulas (`objective`), the rows (`policy_rows`).

Shapes: B rows, S places of a row.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemotron_train.config.grpo_knobs import ObjectiveKnobs
from nemotron_train.data.batches import Batch
from nemotron_train.posttrain.objective import (
    TokenConstants,
    sum_metrics,
    token_losses,
    token_sums,
)
from nemotron_train.posttrain.policy_rows import PolicyRows
from nemotron_train.train.global_batch import Tensors, micro_batches
from nemotron_train.train.train_step import forward_step, run_micro_batches
from nemotron_train.train.trainer import Trainer


def unknown_ids(known: Collection[int], vocab_size: int, device: str) -> Tensor | None:
    """The ids of the model that the tokenizer does not have, bool [V]; None if there are none.

    The sampler never draws them, so the trainer must give them no probability either.
    """
    unknown_V = torch.ones(vocab_size, dtype=torch.bool)
    unknown_V[torch.tensor(sorted(known))] = False
    return unknown_V.to(device) if bool(unknown_V.any()) else None


@torch.no_grad()
def log_probabilities(
    trainer: Trainer, rows: PolicyRows, unknown_V: Tensor | None = None
) -> np.ndarray:
    """The trainer's log-probability of each label, FP64 [B,S], by the forward pass of training.

    unknown_V: as `unknown_ids`.
    """
    found: list[Tensor] = []

    def record(nll_SB: Tensor) -> Tensor:
        found.append(nll_SB.detach().t())
        return nll_SB

    def split(batch: Batch, num_rows: int, device: str) -> Iterator[Tensors]:
        for tensors in micro_batches(batch, num_rows, device):
            yield {
                **tensors,
                "token_loss": record,
                "with_mtp": False,
                "unknown_V": unknown_V,
            }

    for chunk in trainer.chunks:
        chunk.eval()
    run_micro_batches(
        trainer.chunks,
        forward_step,
        rows,
        trainer.config,
        trainer.platform.device,
        forward_only=True,
        split=split,
    )
    for chunk in trainer.chunks:
        chunk.train()
    return -torch.cat(found).double().cpu().numpy()


class TrainedTokens:
    """The rows of a step with the advantage, weight and earlier log-probability of each target."""

    def __init__(
        self,
        rows: PolicyRows,
        advantage_BS: np.ndarray,
        weight_BS: np.ndarray,
        previous_BS: np.ndarray,
        knobs: ObjectiveKnobs,
        unknown_V: Tensor | None = None,
    ) -> None:
        self._rows = rows
        self._unknown_V = unknown_V
        self._arrays = (advantage_BS, weight_BS, previous_BS)
        self._knobs = knobs
        self._sums: list[tuple[Tensor, Tensor]] = []

    def micro_batches(self, num_rows: int, device: str) -> Iterator[Tensors]:
        """Micro-batches of `num_rows` rows, whose main head has the policy's loss."""
        for number, tensors in enumerate(micro_batches(self._rows, num_rows, device)):
            piece = slice(number * num_rows, (number + 1) * num_rows)
            constants = self._constants(piece, device)

            def loss(nll_SB: Tensor, constants: TokenConstants = constants) -> Tensor:
                self._sums.append(token_sums(nll_SB, constants, self._knobs))
                return token_losses(nll_SB, constants, self._knobs)

            yield {**tensors, "token_loss": loss, "unknown_V": self._unknown_V}

    def _constants(self, rows: slice, device: str) -> TokenConstants:
        advantage, weight, previous = (
            torch.from_numpy(array[rows].T.astype(np.float32)).to(device) for array in self._arrays
        )
        sequence = torch.from_numpy(self._rows.rollout_BS[rows].T.copy()).to(device)
        return TokenConstants(advantage, weight, previous=previous, sequence=sequence)

    def measures(self, group: Any) -> dict[str, float]:
        """Measures of all ranks' tokens in the step's forward pass. COLLECTIVE. SYNC."""
        sums = torch.stack([sums for sums, _ in self._sums]).sum(0)
        peaks = torch.stack([peaks for _, peaks in self._sums]).amax(0)
        self._sums.clear()
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=group)
        return sum_metrics(sums, peaks)
