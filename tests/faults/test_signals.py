"""Stop requests at bad moments: one complete checkpoint, agreed on by all ranks, exit code 3.

Second truth: the uninterrupted run. Not covered: signals of a Slurm job (tests/slurm,
tests/launch/slurm).
"""

import signal
from pathlib import Path

import pytest

EVALUATE = "nemotron_train.train.trainer:validation_losses"
TAKE = "nemotron_train.data.batches:BatchSource.take"
MOMENTS = {
    "while_saving": {"signal": {"event": 4, "number": signal.SIGTERM}},
    "while_evaluating": {"at": {"function": EVALUATE, "call": 2, "signal": signal.SIGUSR1}},
    "waiting_for_data": {"at": {"function": TAKE, "call": 4, "signal": signal.SIGTERM}},
    "first_step": {"at": {"function": TAKE, "call": 1, "signal": signal.SIGUSR1}},
    "keyboard": {"at": {"function": TAKE, "call": 4, "signal": signal.SIGINT}},
}
WORDS = ["train.save_every_steps=3", "train.validate_every_steps=2"]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=[] if moment == "while_saving" else pytest.mark.faults)
        for moment in MOMENTS
    ],
)
def test_asked_to_stop(job, small_run, reference, newest, metrics, weights, moment: str) -> None:
    run = small_run[0] / "runs" / moment
    first = job(f"name={moment}", *WORDS, faults={0: MOMENTS[moment]})
    assert first.wait() == [3], first.output()
    found, said = newest(run)
    assert found is not None and not said
    assert int(found.name.removeprefix("step_")) == len(metrics(run))  # no trained step is lost
    second = job(f"name={moment}", *WORDS)
    assert second.wait() == [0], second.output()
    whole = reference(10, *WORDS)
    assert metrics(run) == metrics(whole)
    assert weights(run, 10) == weights(whole, 10)


@pytest.mark.faults
def test_asked_before_training_begins(job, small_run) -> None:
    """No handler is installed yet: the signal ends the process, and the same command starts
    cleanly."""
    fault = {"import": {"module": "nemotron_train.train.trainer", "signal": signal.SIGTERM}}
    first = job("name=too_early", faults={0: fault})
    assert first.wait() == [-signal.SIGTERM]
    second = job("name=too_early")
    assert second.wait() == [0], second.output()


@pytest.mark.faults
def test_asked_twice_while_saving(job, small_run, newest) -> None:
    """The second signal ends the process at once. The checkpoint being saved is absent or whole."""
    fault = {"signal": {"event": 4, "number": signal.SIGTERM, "times": 2}}
    first = job("name=twice", *WORDS, faults={0: fault})
    assert first.wait() == [-signal.SIGTERM]
    found, said = newest(small_run[0] / "runs" / "twice")
    assert not said, said
    assert found is None or int(found.name.removeprefix("step_")) == 3
    second = job("name=twice", *WORDS)
    assert second.wait() == [0], second.output()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_asked(job, small_run, newest, metrics, rank: int) -> None:
    """Both ranks stop after the same step, with one checkpoint."""
    name = f"rank_{rank}_asked"
    run = job(
        f"name={name}",
        "train.micro_batch_sequences=2",
        ranks=2,
        faults={rank: {"at": {"function": TAKE, "call": 4, "signal": signal.SIGTERM}}},
    )
    assert run.wait(timeout=90) == [3, 3], run.output()
    folder: Path = small_run[0] / "runs" / name
    found, said = newest(folder)
    assert found is not None and not said
    assert [path.name for path in found.parent.iterdir() if path.is_dir()] == [found.name]
    assert int(found.name.removeprefix("step_")) == len(metrics(folder)) == 4
