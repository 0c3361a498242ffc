"""A run cut in two equals the uninterrupted one bit for bit. Damaged checkpoints are not used.

Second truth: the uninterrupted run, in another process. Same layout only. Not covered here: loading
under another layout.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import warm_process

Small = tuple[Path, list[str]]
Metrics = Callable[[Path], list[dict]]
Weights = Callable[[Path, int], dict[str, object]]
LONG = ["train.total_tokens=5120"]  # 20 steps of 256 tokens


def pretrain(small_run: Small, *overrides: str) -> subprocess.CompletedProcess[str]:
    folder, common = small_run
    command = [sys.executable, "-m", "nemotron_train", "pretrain", *common, *LONG, *overrides]
    return warm_process.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(small_run: Small) -> Path:
    done = pretrain(small_run, "name=resume_whole")
    assert done.returncode == 0, done.stderr
    return small_run[0] / "runs" / "resume_whole"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cut_in_two_equals_uninterrupted(
    small_run: Small, whole: Path, dtype: str, metrics: Metrics, weights: Weights
) -> None:
    """Steps 1-20 against 1-10 and, in a new process, 11-20: losses, gradients, weights."""
    if dtype == "bf16":
        assert pretrain(small_run, "name=resume_whole_bf16", "precision=bf16").returncode == 0
        whole = whole.with_name("resume_whole_bf16")
    knobs = (f"name=cut_{dtype}", f"precision={dtype}")
    first = pretrain(small_run, *knobs, "train.stop_after_steps=10")
    assert first.returncode == 3, first.stderr
    cut = whole.with_name(f"cut_{dtype}")
    assert len(metrics(cut)) == 10
    second = warm_process.run(
        [sys.executable, "-m", "nemotron_train", "pretrain", f"resume=runs/cut_{dtype}"],
        cwd=small_run[0],
        capture_output=True,
        text=True,
    )
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stdout
    assert metrics(cut) == metrics(whole)
    assert weights(cut, 20) == weights(whole, 20)


def test_same_command_again_finds_the_run_finished(small_run: Small, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    done = pretrain(small_run, "name=resume_whole")
    assert done.returncode == 0 and "finished" in done.stdout
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_damaged_checkpoint_is_named_and_the_one_before_used(
    small_run: Small, metrics: Metrics, weights: Weights, whole: Path
) -> None:
    """As a user encounters it. tests/run_folder/test_integrity.py covers every kind of damage."""
    done = pretrain(small_run, "name=damaged", "train.save_every_steps=10")
    assert done.returncode == 0, done.stderr
    folder = whole.with_name("damaged")
    newest = folder / "checkpoints" / "step_00000020"
    shard = next(newest.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = pretrain(small_run, "name=damaged", "train.save_every_steps=10")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert f"{shard.name} has changed since it was written; using the checkpoint before" in words
    assert metrics(folder) == metrics(whole) and weights(folder, 20) == weights(whole, 20)


def test_another_model_is_refused(small_run: Small, whole: Path) -> None:
    """The run folder names the knob. So does the checkpoint if the folder was edited."""
    done = pretrain(small_run, "name=resume_whole", "model.hidden_size=128")
    assert done.returncode == 2
    assert "hidden_size" in done.stderr and "Traceback" not in done.stderr


def test_signal_saves_and_exits_with_3(small_run: Small, metrics: Metrics) -> None:
    """SIGTERM during training: a checkpoint of the current step, exit code 3, then a resume
    works."""
    import signal

    folder, common = small_run
    command = [sys.executable, "-m", "nemotron_train", "pretrain", *common, "name=signalled"]
    process = warm_process.Popen(
        [*command, "train.total_tokens=1000000"], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait(timeout=120) == 3, output
    steps = [row["step"] for row in metrics(folder / "runs" / "signalled")]
    saved = folder / "runs" / "signalled" / "checkpoints" / f"step_{steps[-1]:08d}"
    assert (saved / "manifest.json").exists()
