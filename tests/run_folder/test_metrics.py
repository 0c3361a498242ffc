"""metrics.jsonl over crashes and resumes, and the two optional sinks.

Not covered: W&B online (no network), and a disk that is full.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.config.schema import LoggingConfig
from nemotron_train.run_folder.metric_groups import OTHER, group_of
from nemotron_train.run_folder.metrics import MetricsWriter, open_sinks
from tests import warm_process

PARTS_OF_A_STEP = [f"step_time/{part}" for part in ("data", "forward_backward")]
PARTS_OF_A_STEP += [f"step_time/{part}" for part in ("gradient_reduce", "optimizer")]


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 2.5, "note": "a\nb", "max_vio": [0.1, 0.2]})
        row = json.loads(path.read_text())  # before the file is closed
        assert row == {"step": 1, "loss": 2.5, "note": "a\nb", "max_vio": [0.1, 0.2]}


def test_not_finite_is_null_and_strict_json(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": math.nan, "by_layer": [math.inf, 1.0]})
    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "by_layer": [None, 1.0]}


def test_a_tensor_is_refused(tmp_path: Path) -> None:
    """A tensor would hide a wait for the device. It must not leave a partial line either."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        with pytest.raises(TypeError, match="Tensor"):
            writer.write({"step": 1, "loss": torch.tensor(1.0)})
        writer.write({"step": 1, "loss": 1.0})
    assert steps_in(path) == [1]


@given(last=st.integers(1, 8), resume_step=st.integers(0, 9), torn=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_resume_equals_an_uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, last: int, resume_step: int, torn: int
) -> None:
    """A run writes steps 1 to `last` and dies after `torn` characters of the next line. It resumes
    from a checkpoint at `resume_step` and runs to step 9. The file equals that of an uninterrupted
    run."""
    resume_step = min(resume_step, last)
    folder = tmp_path_factory.mktemp("metrics")

    def rows(begin: int) -> list[dict[str, float]]:
        return [{"step": step, "loss": step / 3} for step in range(begin, 10)]

    with MetricsWriter(folder / "whole.jsonl") as writer:
        for row in rows(1):
            writer.write(row)
    with MetricsWriter(folder / "resumed.jsonl") as writer:
        for row in rows(1)[:last]:
            writer.write(row)
    next_line = json.dumps({"step": last + 1, "loss": (last + 1) / 3})
    with open(folder / "resumed.jsonl", "a") as file:
        file.write(next_line[: min(torn, len(next_line) - 1)])
    with MetricsWriter(folder / "resumed.jsonl", resume_step=resume_step) as writer:
        for row in rows(resume_step + 1):
            writer.write(row)
    assert (folder / "resumed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert sorted(os.listdir(folder)) == ["resumed.jsonl", "whole.jsonl"]


class Fragile:
    """A sink whose service fails at step 2."""

    name = "fragile"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def write(self, step: int, numbers: object) -> None:
        if step >= 2:
            raise ConnectionError("gone\nfor good")
        self.seen.append(step)

    def close(self) -> None:
        raise AssertionError("a sink that was left out is not closed")


def test_a_failing_sink_costs_one_warning(tmp_path: Path) -> None:
    sink, said = Fragile(), []
    with MetricsWriter(tmp_path / "metrics.jsonl", sinks=[sink], say=said.append) as writer:
        for step in range(1, 5):
            writer.write({"step": step, "loss": 1.0})
    assert sink.seen == [1]
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert said == ["fragile failed and is left out from now on: gone"]


def test_no_sink_unless_asked(tmp_path: Path) -> None:
    assert open_sinks(LoggingConfig(), tmp_path, run_name="a", run_id="b", config={}) == []


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    """Second truth: TensorBoard's own reader. A resume from step 2 replaces the old step 3."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = LoggingConfig(tensorboard=True)
    for resume_step, last, scale in ((0, 3, 1.0), (2, 4, 10.0)):
        sinks = open_sinks(
            logging, tmp_path, run_name="a", run_id="b", config={}, resume_step=resume_step
        )
        path = tmp_path / "metrics.jsonl"
        with MetricsWriter(path, sinks=sinks, resume_step=resume_step) as writer:
            for step in range(resume_step + 1, last + 1):
                writer.write({"step": step, "loss": scale * step, "layer": "text is left out"})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/loss")] == [
        (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0),
    ]  # fmt: skip
    assert "layer" not in events.Tags()["scalars"]


def test_wandb_offline_keeps_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the W&B run is stored in the run folder, with its numbers and without the
    key."""
    key = "0123456789abcdef" * 2 + "feedbeef"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    said: list[str] = []
    sinks = open_sinks(
        LoggingConfig(wandb=True, wandb_project="project_of_the_test"),
        tmp_path,
        run_name="a",
        run_id="run1",
        config={"train": {"seed": 1}},
        say=said.append,
    )
    with MetricsWriter(tmp_path / "metrics.jsonl", sinks=sinks, say=said.append) as writer:
        writer.write({"step": 1, "loss_of_the_test": 2.5})
    assert said == []
    logged, deadline = b"", time.monotonic() + 60
    # W&B's own process writes the file. On a busy machine it may still write after `finish`.
    while b"loss_of_the_test" not in logged and time.monotonic() < deadline:
        time.sleep(0.1)
        logged = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
    assert b"project_of_the_test" in logged and b"loss_of_the_test" in logged
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(key.encode() not in path.read_bytes() for path in files)


def test_run_folder_and_numbers_of_a_real_run(small_run: tuple[Path, list[str]]) -> None:
    """The contract: the files a finished run leaves and the numbers every line has. Each number is
    explained in docs/metrics.md."""
    folder, overrides = small_run
    command = [sys.executable, "-m", "nemotron_train", "pretrain", "name=contract", *overrides]
    command += ["train.validate_every_steps=5", "guard.health_every=5"]
    done = warm_process.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "contract"
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "derived.yaml", "precision.txt", "environment.json", "metrics.jsonl",
        "summary.json", "loss.png", "checkpoints", "checkpoints.jsonl",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    always = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds"}
    always |= {"time", *PARTS_OF_A_STEP}
    assert all(always <= set(row) for row in rows)
    assert {"validation_loss", "mtp_loss_2", "load_balance_loss", "max_vio"} <= set(rows[-1])
    document = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    explained = set(re.findall(r"`([^`]+)`", document))
    names = {re.sub(r"_[2-9]$", "_1", name) for name in rows[-1]}
    names = {re.sub(r"(max_vio|expert_load|residual_rms)/.*", r"\1/LAYER", name) for name in names}
    names = {re.sub(r"gradient_norm/.*", "gradient_norm/PART", name) for name in names}
    names |= set(json.loads((run / "summary.json").read_text()))
    assert names <= explained
    assert all(group_of(name) != OTHER for name in rows[-1] if name != "step")
    for row in rows:  # the parts add up to the step, except for the time between two clocks
        assert sum(row[part] for part in PARTS_OF_A_STEP) == pytest.approx(
            row["step_seconds"], rel=0.01, abs=1e-3
        )
    loads = {n: load for n, load in rows[4].items() if n.startswith("expert_load/")}
    assert len(loads) == 4 and not any(name in rows[3] for name in loads)  # MEM*EME and *E
    for name, load in loads.items():  # by the definition of MaxVio
        assert len(load) == 8 and sum(load) == pytest.approx(1)
        layer = name.removeprefix("expert_load/")
        assert max(load) * len(load) == pytest.approx(rows[4][f"max_vio/{layer}"])


def test_wandb_that_cannot_start_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    said: list[str] = []
    logging = LoggingConfig(wandb=True)
    sinks = open_sinks(logging, tmp_path, run_name="a", run_id="b", config={}, say=said.append)
    assert sinks == []
    assert len(said) == 1 and "W&B cannot start" in said[0]


def test_going_back_drops_the_lines_of_later_steps(tmp_path: Path) -> None:
    """A roll-back during the run: the lines written afterwards follow the line of the target
    step."""
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for step in range(1, 6):
            writer.write({"step": step, "loss": 3.0})
        writer.rewind(3)
        writer.write({"kind": "non_finite", "step": 3, "rolled_back_from": 5})
        writer.write({"step": 4, "loss": 2.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4]
    assert rows[3]["rolled_back_from"] == 5 and rows[4]["loss"] == 2.0
