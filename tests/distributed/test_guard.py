"""Numbers broken on one of two ranks: both ranks make the same decision, at the same step, before
any weight changes. `broken_run.py` breaks them; the shipped code contains none of it.

Second truth for "no weight changed": a run that goes back to the checkpoint of the step before and
leaves the batch out. Not covered: more than two ranks, a GPU.
"""

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

BROKEN_RUN = str(Path(__file__).with_name("broken_run.py"))
KNOBS = ["train.threads=1", "train.micro_batch_sequences=2", "model.pattern=MEM*EME"]

Small = tuple[Path, list[str]]
Start = Callable[[list[str], Path, int], list[subprocess.Popen[str]]]


def train(
    start: Start, small_run: Small, broken: str, *overrides: str, ranks: int = 2
) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of all ranks. broken: WHAT, RANK and SAMPLES of broken_run.py."""
    folder, common = small_run
    words = [*broken.split(), "pretrain", *common, *KNOBS, *overrides]
    processes = start([BROKEN_RUN, *words], folder, ranks)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> dict[int, dict]:
    return {row["step"]: row for row in lines(folder) if "loss" in row}


def digest(folder: Path) -> dict[str, str]:
    """Every file under `folder` and its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("what", "where"), [
    ("loss 1", "loss not finite on rank 1; first module in the backward pass: output_layer"),
    ("gradient 0", "gradient not finite on rank 0 (loss "),
])  # fmt: skip
def test_stop(small_run: Small, start_ranks: Start, what: str, where: str) -> None:
    """Both ranks exit with 1 at step 5. One line names rank and module. The checkpoint of step 4 is
    the last thing written, and it contains no NaN."""
    name = f"stop_{what.split()[0]}"
    saving = (f"name={name}", "train.save_every_steps=4", "train.keep_checkpoints=9")
    codes, outputs = train(start_ranks, small_run, f"{what} 16", *saving)
    assert codes == [1, 1], "\n".join(outputs)
    assert "Traceback" not in outputs[0] + outputs[1]
    last = outputs[0].splitlines()[-1]
    assert last.startswith("nemotron-train: step 5: ") and where in last
    if what == "gradient 0":
        assert "backward pass: decoder.layers.2.mixer.in_proj (1 module" in last
    assert outputs[1] == ""
    folder = small_run[0] / "runs" / name
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000004"]
    assert lines(folder)[-1]["kind"] == "non_finite" and list(steps(folder)) == [1, 2, 3, 4]
    if what == "loss 1":
        return
    # The batch is no longer broken: the run continues from the good checkpoint to its end.
    before = digest(folder / "checkpoints" / "step_00000004")
    codes, outputs = train(start_ranks, small_run, f"{what} 999", *saving)
    assert codes == [0, 0] and "step_00000004" in outputs[0], outputs[0]
    assert before == digest(folder / "checkpoints" / "step_00000004")


def test_data_that_one_rank_cannot_read(small_run: Small, start_ranks: Start) -> None:
    """Both ranks exit with 2 and the same line, at step 5, and the checkpoint of step 4 is kept."""
    saving = ("name=unreadable", "train.save_every_steps=4", "train.async_save=true")
    codes, outputs = train(start_ranks, small_run, "data 1 16", *saving)
    assert codes == [2, 2], "\n".join(outputs)
    for output in outputs:
        assert output.splitlines()[-1] == "nemotron-train: data/train_00000.bin: was removed"
        assert "Traceback" not in output
    checkpoints = small_run[0] / "runs" / "unreadable" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000004"]


def test_skip_and_roll_back_agree(small_run: Small, start_ranks: Start) -> None:
    """The batch of step 5 is broken on rank 1. One run skips the update in place. Another loads the
    checkpoint of step 4 and skips the batch. The same weights then meet the same batches, one step
    apart. Exactly one batch is lost, and each run reports it once."""
    codes, outputs = train(
        start_ranks, small_run, "gradient 1 16", "name=skip", "guard.non_finite=skip"
    )
    assert codes == [0, 0], outputs
    codes, outputs = train(
        start_ranks, small_run, "gradient 1 16",
        "name=back", "guard.non_finite=roll_back",
        "train.save_every_steps=4", "train.async_save=true",
    )  # fmt: skip
    assert codes == [0, 0], outputs
    assert "rolled back to runs/back/checkpoints/step_00000004, past 4 sequences" in outputs[0]
    skip, back = (small_run[0] / "runs" / name for name in ("skip", "back"))
    # The learning rate of a step depends on its tokens. It is constant up to step 6.
    for step in (6, 7):
        for number in ("loss", "mtp_loss_1", "mtp_loss_2", "grad_norm", "max_vio"):
            assert steps(skip)[step][number] == steps(back)[step - 1][number], (step, number)
    assert steps(skip)[5]["grad_norm"] is None and steps(skip)[5]["zero_weight_gradients"] is None
    assert [row["skipped_updates"] for row in steps(skip).values()] == [0] * 4 + [1] * 6
    (event,) = (row for row in lines(skip) if row.get("kind") == "non_finite")
    assert (event["step"], event["policy"]) == (5, "skip")
    (event,) = (row for row in lines(back) if row.get("kind") == "non_finite")
    assert (event["step"], event["rolled_back_from"], event["skipped_sequences"]) == (4, 5, 4)
    assert list(steps(back)) == list(range(1, 11))


def test_a_broken_weight_is_not_skipped(small_run: Small, start_ranks: Start) -> None:
    """A NaN in a weight affects every later batch. The run ends before the weight is saved, and
    names it."""
    codes, outputs = train(
        start_ranks, small_run, "weight 0 16",
        "name=weight", "guard.non_finite=skip", "train.save_every_steps=5", ranks=1,
    )  # fmt: skip
    assert codes == [1], outputs
    last = outputs[0].splitlines()[-1]
    assert "step 5: " in last
    assert "weights not finite before the step: decoder.layers.2.mixer.in_proj" in last
    assert not (small_run[0] / "runs" / "weight" / "checkpoints").exists()


def test_a_spike_and_a_slow_rank(small_run: Small, start_ranks: Start) -> None:
    """100 times the loss on one rank, with a window short enough for ten steps: both ranks skip the
    batch. The same rank takes five times as long in each forward pass and is named."""
    knobs = ("guard.spike=skip", "guard.spike_window=4", "guard.spike_sigmas=20")
    measured = ("name=spike", "guard.straggler_every=1", "guard.straggler_ratio=1.2")
    codes, outputs = train(start_ranks, small_run, "spike,slow 1 24", *knobs, *measured)
    assert codes == [0, 0], outputs
    folder = small_run[0] / "runs" / "spike"
    (event,) = (row for row in lines(folder) if row.get("kind") == "spike")
    assert event["step"] == 7 and event["reason"].startswith("loss ")
    assert [row["skipped_updates"] for row in steps(folder).values()] == [0] * 6 + [1] * 4
    slow = [row for row in lines(folder) if row.get("kind") == "straggler"]
    assert slow and all(row["reason"].startswith("rank 1 on ") for row in slow)
    assert f"step {slow[0]['step']}: rank 1 on " in outputs[0]
