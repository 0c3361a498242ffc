"""A background save writes the state of its step, and its errors end the run.

Second truth: the same run with `train.async_save=false`, byte for byte. The writer is slowed down,
so that training has changed every tensor before it is written. One rank;
tests/train/checkpoint/test_background.py covers agreement between ranks.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.cost.memory import rank_memory
from nemotron_train.plan.derive import derive
from nemotron_train.run_folder.integrity import damage, steps_in
from nemotron_train.train.checkpoint import checkpoints as checkpoints_module

Small = tuple[Path, list[str]]
Weights = Callable[[Path, int], dict[str, object]]
WORDS = ["train.save_every_steps=2", "train.keep_checkpoints=9", "train.stop_after_steps=5"]


pytestmark = pytest.mark.usefixtures("in_small_run")


def test_what_is_written_is_the_state_of_its_step(
    small_run: Small, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 4 are saved while training continues. At step 5 the run is stopped with the save
    of step 4 still in flight."""
    words = [*small_run[1], *WORDS]
    assert main(["pretrain", *words, "name=in_line"]) == 3
    write = checkpoints_module._write_shards
    began: list[float] = []
    written: list[int] = []

    def slow(*arguments: Any) -> Any:
        began.append(time.monotonic())
        tensors = [tensor for *_, (_, pairs) in arguments[1] for _, tensor in pairs]
        written.append(sum(tensor.nbytes for tensor in tensors))
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(checkpoints_module, "_write_shards", slow)
    assert main(["pretrain", *words, "name=beside", "train.async_save=true"]) == 3
    checkpoints = Path("runs/beside/checkpoints")
    assert steps_in(checkpoints) == [2, 4, 5] and len(began) == 3
    # What `plan` says of the copies, but for the router biases and other small buffers.
    config = compose_config([*words, "name=beside"])
    (memory,) = rank_memory(config, derive(config, 1))
    assert written[0] == pytest.approx(memory.saved_bytes, rel=2e-3)
    for step in (2, 4, 5):
        assert damage(checkpoints / f"step_{step:08d}") is None
        assert weights(Path("runs/beside"), step) == weights(Path("runs/in_line"), step)


def test_an_error_of_the_writer_ends_the_run(
    small_run: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk at the second save: one line, exit 1, the first checkpoint unchanged, no partial
    second checkpoint. The same command then continues the run."""
    write, began = checkpoints_module._write_shards, []

    def full(*arguments: Any) -> Any:
        began.append(arguments)
        if len(began) == 2:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    words = [*small_run[1], *WORDS, "name=full", "train.async_save=true"]
    monkeypatch.setattr(checkpoints_module, "_write_shards", full)
    assert main(["pretrain", *words]) == 1
    message = capsys.readouterr().err.strip()
    assert "No space left on device" in message and len(message.splitlines()) == 1
    folder = Path("runs/full/checkpoints")
    assert [path.name for path in folder.iterdir()] == ["step_00000002"]
    assert damage(folder / "step_00000002") is None
    rows = (Path("runs/full") / "metrics.jsonl").read_text().splitlines()
    assert len(rows) <= 5, "the loop went on for a step at most"
    monkeypatch.setattr(checkpoints_module, "_write_shards", write)
    assert main(["pretrain", *words]) == 3
    assert steps_in(folder)[-1] == 7
