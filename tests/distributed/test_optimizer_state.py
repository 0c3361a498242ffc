"""The distributed optimizer's state is written from where it is, not gathered first.

Second truth: Megatron's own method, which gathers everything on every rank. That the checkpoint
then resumes under another layout: test_layouts.py. Not covered: NCCL; the memory saved, which
`optim/sharded_state.py` states by construction.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "optimizer_state.py"


@pytest.mark.parametrize(
    "ranks, layout",
    [
        (3, ["train.global_batch_tokens=768", "train.micro_batch_sequences=1"]),
        (
            4,
            [
                "parallel.expert=2",
                "train.global_batch_tokens=1024",
                "parallel.tensor=2",
                "parallel.sequence=true",
            ],
        ),
    ],
    ids=["data-3", "tensor-2-expert-2-data-2"],
)
def test_equals_what_megatron_gathers(
    small_run: tuple[Path, list[str]],
    run_ranks: Callable[[list[str], Path, int], None],
    ranks: int,
    layout: list[str],
) -> None:
    folder, overrides = small_run
    words = ["parallel.distributed_optimizer=true", "train.stop_after_steps=2"]
    words += [f"name=state{ranks}", "train.validation_tokens=1536", "precision=bf16"]
    run_ranks([str(SCRIPT), *overrides, *words, *layout], folder, ranks)
