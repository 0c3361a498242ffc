"""Validation: mean loss of each head over a fixed part of the validation split.

K heads: the main head and one per MTP depth.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron_train.config.schema import Config
from nemotron_train.data.batches import BatchSource
from nemotron_train.plan.derive import Derived
from nemotron_train.platform.groups import sum_over
from nemotron_train.train.global_batch import take_together
from nemotron_train.train.train_step import forward_step, run_micro_batches


@torch.no_grad()
def validation_losses(
    config: Config,
    derived: Derived,
    chunks: Sequence[DistributedDataParallel],
    batches: BatchSource,
    groups: ProcessGroupCollection,
    device: str,
) -> list[float]:
    """Mean loss of the main head and of each MTP depth, in nats per token. COLLECTIVE.

    Every call evaluates the same sequences. Each data-parallel rank takes the same number of whole
    micro-batches. The remainder at the end of `validation_tokens` is not evaluated. Raises
    ConfigError if the data has changed since it was opened.
    """
    rows = config.train.micro_batch_sequences
    num_micro = derived.validation_sequences // (rows * groups.dp.size())
    start = groups.dp.rank() * num_micro * rows
    batch, _, targets_K = take_together(
        batches,
        batches.state_at_start(),
        num_micro * rows * groups.dp.size(),
        (start, start + num_micro * rows),
        num_heads=1 + config.model.mtp.depths,
        group=groups.dp,
        device=device,
    )
    for chunk in chunks:
        chunk.eval()
    reports = run_micro_batches(chunks, forward_step, batch, config, device, forward_only=True)
    for chunk in chunks:
        chunk.train()
    sums_K = torch.stack(reports).double().sum(0) if reports else torch.zeros_like(targets_K)
    sum_over(sums_K, groups.pp)
    sum_over(sums_K, groups.dp_cp)
    return (sums_K / targets_K.clamp(min=1)).tolist()
