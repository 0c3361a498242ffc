"""A background save on two ranks writes the same bytes as a synchronous save.

Second truth: the same run with `train.async_save=false`. Experts are sharded over the ranks, so
that both write. tests/train/checkpoint/test_background.py covers that ranks learn of the end and of
errors together.
"""

from collections.abc import Callable
from pathlib import Path

from nemotron_train.run_folder.integrity import damage, steps_in

Small = tuple[Path, list[str]]
Weights = Callable[[Path, int], dict[str, object]]


def test_two_ranks_save_beside_the_training(
    small_run: Small, run_ranks: Callable[[list[str], Path, int], None], weights: Weights
) -> None:
    folder, common = small_run
    words = ["-m", "nemotron_train", "pretrain", *common, "train.micro_batch_sequences=2"]
    words += ["train.threads=1", "parallel.expert=2", "train.total_tokens=1536"]
    words += ["train.save_every_steps=2", "train.keep_checkpoints=9"]
    for name in ("false", "true"):
        run_ranks([*words, f"name=async_{name}", f"train.async_save={name}"], folder, 2)
    runs = [folder / "runs" / f"async_{name}" for name in ("false", "true")]
    assert [steps_in(run / "checkpoints") for run in runs] == [[2, 4, 6]] * 2
    for step in (2, 4, 6):
        assert damage(runs[1] / "checkpoints" / f"step_{step:08d}") is None
        in_line, beside = (weights(run, step) for run in runs)
        assert beside == in_line and len(beside) > 100
