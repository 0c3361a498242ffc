"""Where a run stands, and what one step reports. A checkpoint records the first.

No torch: both are plain values that the training loop, its hooks and the checkpoints share.
"""

from dataclasses import dataclass
from typing import Any

from nemotron_train.data.batches import DataState


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps taken, tokens trained on, and the data's cursor."""

    step: int
    tokens: int
    data: DataState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step leaves behind.

    metrics: plain numbers of the step, or tensors on the device until a hook asks for them;
    hooks may add to it. seconds: time the step took, side jobs excluded.
    """

    progress: Progress
    metrics: dict[str, Any]
    seconds: float
