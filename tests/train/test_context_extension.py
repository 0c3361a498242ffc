"""Steps of short rows between steps of long ones, and a branch with rows of another length.

Second truths: a training whose data source supplies those rows itself; the uninterrupted run, bit
for bit; for layouts, one rank (tests/distributed/test_short_steps.py). Not covered: lengths at
which memory matters.
"""

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import TrainConfig
from nemotron_train.data.batches import Batch, BatchSource, DataState
from nemotron_train.evaluate.knobs import LossConfig
from nemotron_train.evaluate.loss import evaluate_loss
from nemotron_train.train.supply import is_short
from tests import warm_process

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]
Metrics = Callable[[Path], list[dict]]
Weights = Callable[[Path, int], dict[str, object]]
SHORT = ["train.short_sequence_length=16", "train.micro_batch_sequences=2"]


def train(*words: str) -> int:
    return main(["pretrain", *words])


@given(share=st.floats(0.001, 1), num_steps=st.integers(1, 300))
def test_short_steps_are_their_share_at_any_time(share: float, num_steps: int) -> None:
    config = TrainConfig(short_share=share)
    found = sum(is_short(config, step) for step in range(1, num_steps + 1))
    assert found == int(Fraction(str(share)) * num_steps)


def test_short_rows_train_as_a_source_of_such_rows(
    small_run: Small, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is short, against a run with that sequence length and the same rows."""
    assert train(*small_run[1], "name=rows_all_short", *SHORT, "train.short_share=1") == 0
    take = BatchSource.take

    def take_long(
        self: BatchSource, state: DataState, count: int, part: tuple[int, int] | None = None
    ) -> tuple[Batch, DataState]:
        if self._split == "validation":
            return take(self, state, count, part)
        long = BatchSource(
            compose_config(small_run[1]).data,
            sequence_length=64,
            seed=1234,
            split="train",
            vocab_size=512,
        )
        start = DataState("train", 64, 1234, long.state_at_start().fingerprint)
        first = state.samples // 4
        batch, _ = take(long, start, first + count // 4, (first, first + count // 4))
        return batch.cut(16), take(self, state, count, part)[1]

    monkeypatch.setattr(BatchSource, "take", take_long)
    words = ["train.sequence_length=16", "train.micro_batch_sequences=8", "name=rows_given_short"]
    assert train(*small_run[1], *words) == 0
    compared = ("loss", "mtp_loss_1", "mtp_loss_2", "grad_norm", "load_balance_loss")
    ours, theirs = metrics(Path("runs/rows_all_short")), metrics(Path("runs/rows_given_short"))
    assert [row["sequence_length"] for row in ours if "loss" in row] == [16] * 10
    for a, b in zip(
        (row for row in ours if "loss" in row),
        (row for row in theirs if "loss" in row),
        strict=True,
    ):
        assert {name: a[name] for name in compared} == {name: b[name] for name in compared}


def test_branch_into_longer_rows(
    small_run: Small, metrics: Metrics, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """From rows of 64 to rows of 128, a third of the steps at 64, with a constant learning rate.
    The branch, interrupted and continued in a new process, equals the uninterrupted one. Its data
    start from the beginning."""
    assert train(*small_run[1], "name=rows_parent", "train.save_every_steps=5") == 0
    extend = ["branch=runs/rows_parent@10", "run=context_extension", "train.total_tokens=5120"]
    extend += ["train.sequence_length=128", "train.short_sequence_length=64"]
    extend += ["train.short_share=0.34", "train.global_batch_tokens=256"]
    extend += ["train.validation_tokens=512", "train.save_every_steps=5"]
    extend += ["precision.telemetry.every=100", "precision.telemetry.probe=nvfp4"]
    assert train(*extend, "name=rows_whole") == 0
    steps = [row for row in metrics(Path("runs/rows_whole")) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(11, 21))
    assert [row["sequence_length"] for row in steps] == [
        64 if step in (12, 15, 18) else 128 for step in range(11, 21)
    ]
    # All periodic jobs are due at the last step, whatever the parent's batch was.
    assert train(*extend, "name=rows_other_batch", "train.global_batch_tokens=512") == 0
    last = [row for row in metrics(Path("runs/rows_other_batch")) if "loss" in row][-1]
    assert last["step"] == 15 and "validation_loss" in last
    records = (Path("runs/rows_other_batch/metrics.jsonl").read_text()).count('"kind": "precision"')
    assert records == 1
    parent = compose_config(["resume=runs/rows_parent"])
    assert {row["lr"] for row in steps} == {parent.optim.min_learning_rate}
    assert train(*extend, "name=rows_cut", "train.stop_after_steps=5") == 3
    command = [sys.executable, "-m", "nemotron_train", "pretrain", "resume=runs/rows_cut"]
    done = warm_process.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cut = [row for row in metrics(Path("runs/rows_cut")) if "loss" in row]
    assert cut == steps
    assert weights(Path("runs/rows_cut"), 20) == weights(Path("runs/rows_whole"), 20)

    # A branch of the branch continues its data. Its checkpoint opens like any other.
    assert not compose_config(["branch=runs/rows_whole@20", "train.total_tokens=5632"]).fresh_data
    assert train("branch=runs/rows_whole@15", "name=rows_same_again") == 0
    assert [r for r in metrics(Path("runs/rows_same_again")) if "loss" in r] == steps[5:]
    (loss,) = evaluate_loss("runs/rows_whole", LossConfig(max_tokens=512))
    assert loss.loss == pytest.approx(steps[-1]["validation_loss"], rel=1e-6)

    capsys.readouterr()
    assert train(*extend, "name=rows_same_data", "fresh_data=false") == 2
    assert "data" in capsys.readouterr().err
    assert train("branch=runs/rows_parent@10", "run=proxy_10m", "name=rows_other") == 2
    assert "run=proxy_10m: picks other recipes" in capsys.readouterr().err
    assert train("branch=runs/rows_parent@10", "run=context_extention", "name=rows_other") == 2
    assert "did you mean context_extension?" in capsys.readouterr().err
