"""Jobs on a real Slurm with two virtual nodes: `make test-slurm`.

Second truth: the same run, uninterrupted, on two ranks without Slurm; losses and gradient norms of
every step must be equal in every bit, however often Slurm ended the run. Not covered: GPUs,
containers, several machines, a loaded queue.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm
Trajectory = list[tuple[int, float, float]]


def test_two_nodes_train_as_two_local_ranks(
    lab: Any, reference: Trajectory, trajectory: Any
) -> None:
    jobs = lab.submit("two_nodes")
    chain = lab.wait_for_end("two_nodes", jobs)
    assert trajectory(lab.run("two_nodes")) == reference
    assert [event[1] for event in chain] == ["begin", "end"]
    assert chain[-1][5:] == ["0", "stop: finished at step 60"]
    assert "ExitCode=0:0" in lab.call("scontrol", "show", "job", jobs[0])
    logs = sorted(path.name for path in (lab.run("two_nodes") / "ranks").glob("*.log"))
    assert logs == ["rank_0000.log", "rank_0001.log"]
    status = lab.call(sys.executable, "-m", "nemotron_train", "slurm", "status")
    line = next(line for line in status.splitlines() if line.startswith("two_nodes"))
    assert "60/60" in line and "60 at" in line
    again = [sys.executable, "-m", "nemotron_train", "slurm", "cluster=local_lab", "nodes=2"]
    assert "is finished" in lab.call(*again, *lab.common, "name=two_nodes")


def test_signal_before_the_limit_ends_in_a_requeue(
    lab: Any, reference: Trajectory, trajectory: Any
) -> None:
    """The signal that Slurm sends to the batch script before the time limit, sent now."""
    jobs = lab.submit("signalled")
    lab.wait_for_step("signalled", 5)
    lab.call("scancel", "--signal=USR1", "--batch", *jobs)
    chain = lab.wait_for_end("signalled", jobs)
    assert trajectory(lab.run("signalled")) == reference
    assert [event[1] for event in chain] == ["begin", "end", "begin", "end"]
    assert chain[1][5:] == ["3", "requeue"] and chain[2][3] == "1"
    assert int(chain[2][4]) == int(chain[1][4]) >= 5, "no step is done twice"


def test_links_follow_each_other(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """Jobs submitted at once, each stopped on request; the one that is not needed is cancelled."""
    links = lab.submit("links", "cluster.chain_links=4", "train.stop_after_steps=25")
    chain = lab.wait_for_end("links", links)
    assert trajectory(lab.run("links")) == reference
    ends = [event for event in chain if event[1] == "end"]
    assert [event[2] for event in ends] == links[:3]
    assert [event[4] for event in ends] == ["25", "50", "60"]
    assert [event[5:] for event in ends[:-1]] == [["3", "next link"]] * 2
    assert ends[-1][5:] == ["0", "stop: finished at step 60"]
    assert "JobState=CANCELLED" in lab.call("scontrol", "show", "job", links[3])


def test_time_limit_by_slurms_clock_and_scancel(lab: Any) -> None:
    """The signal comes before the limit, the job starts again where it saved; what a person
    cancels stays cancelled."""
    clock = ["cluster.time_limit_minutes=3", "cluster.signal_lead_seconds=60"]
    [job] = lab.submit("limit", *clock, "train.total_tokens=25600000", "train.save_every_steps=0")
    lab.wait(lambda: len(lab.chain("limit")) >= 3, "no second start")
    first = lab.chain("limit")[1]
    assert first[5:] == ["3", "requeue"] and int(first[4]) > 0
    assert lab.chain("limit")[2][1:5] == ["begin", job, "1", first[4]]
    lab.wait_for_step("limit", int(first[4]) + 1)
    lab.call("scancel", job)
    last = lab.wait_for_end("limit", [job])[-1]
    assert last[1] == "begin" or last[-1] == "-", "no requeue"
    assert "JobState=CANCELLED" in lab.call("scontrol", "show", "job", job)


def test_killed_rank(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """The other rank does not hang, and the job starts again from the last checkpoint."""
    jobs = lab.submit("killed_rank")
    lab.wait_for_step("killed_rank", 15)
    os.kill(lab.rank_process("killed_rank", 1), signal.SIGKILL)
    chain = lab.wait_for_end("killed_rank", jobs)
    assert trajectory(lab.run("killed_rank")) == reference
    assert chain[1][5:] == ["137", "requeue"]
    assert int(chain[2][4]) >= 10


def test_preemption(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """A more urgent job takes the nodes; the run saves, and goes on after it."""
    jobs = lab.submit("preempted")
    lab.wait_for_step("preempted", 15)
    urgent = lab.call(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 3"),
    ).strip()
    chain = lab.wait_for_end("preempted", [*jobs, urgent])
    assert trajectory(lab.run("preempted")) == reference
    begins = [event for event in chain if event[1] == "begin"]
    assert [event[3] for event in begins] == ["0", "1"]
    assert int(begins[1][4]) >= 15, "it saved when it was told to go"


def test_killed_node(lab: Any, reference: Trajectory, trajectory: Any, request: Any) -> None:
    """Slurm finds a dead node, requeues the job, and the run goes on from its last checkpoint."""
    jobs = lab.submit("killed_node")
    lab.wait_for_step("killed_node", 15)
    lab.kill_node("node2")
    lab.wait(lambda: lab.states()[jobs[0]] == "PENDING", "the dead node is not noticed")
    lab.call(str(Path(request.config.rootpath) / "launch/lab.sh"), "node", "node2")
    chain = lab.wait_for_end("killed_node", jobs)
    assert trajectory(lab.run("killed_node")) == reference
    assert chain[-1][3] == "1" and chain[-1][-1] == "stop: finished at step 60"
    assert int([event for event in chain if event[1] == "begin"][1][4]) >= 10


def test_torchrun_on_each_node(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """The other launcher, stopped by the signal and requeued, gives the same run."""
    jobs = lab.submit("torchrun", "cluster.launcher=torchrun")
    lab.wait_for_step("torchrun", 5)
    lab.call("scancel", "--signal=USR1", "--batch", *jobs)
    chain = lab.wait_for_end("torchrun", jobs)
    assert trajectory(lab.run("torchrun")) == reference
    assert chain[1][5:] == ["3", "requeue"]


def test_mistake_found_by_the_ranks_ends_the_chain(lab: Any) -> None:
    """Exit code 2 reaches the job, and no link runs into the same mistake again."""
    links = lab.submit("mistake", "data.tokenizer=nowhere", "cluster.chain_links=3")
    chain = lab.wait_for_end("mistake", links)
    assert [event[1] for event in chain] == ["begin", "end"] and chain[1][5] == "2"
    assert "ExitCode=2:0" in lab.call("scontrol", "show", "job", links[0])
    assert "nowhere" in (lab.run("mistake") / "ranks/rank_0000.log").read_text()


def test_hostile_folder_and_secrets(lab: Any, tmp_path: Path) -> None:
    """A folder with a shell's words in its name is only a folder; a key that the user's own
    environment holds is in neither script nor log nor Slurm's description of the job."""
    key = "0123456789abcdef" * 2 + "01234567"
    folder = f"runs/$(touch {tmp_path}_marker);'`touch {tmp_path}_marker`"
    command = [sys.executable, "-m", "nemotron_train", "slurm", "cluster=local_lab", "nodes=2"]
    command += [*lab.common, "name=hostile", f'folder="{folder}"', "train.stop_after_steps=1"]
    lab.environment["WANDB_API_KEY"] = key
    lab.call(*command, "cluster.requeue=false")
    del lab.environment["WANDB_API_KEY"]
    run = lab.workdir / folder / "hostile"
    [job] = (run / "slurm/links").read_text().split()
    described = lab.call("scontrol", "show", "job", job)
    lab.wait(lambda: job not in lab.states(), "the job does not end")
    assert (run / "slurm/chain.log").read_text().splitlines()[-1].endswith("\t1\t3\t-")
    assert not Path(f"{tmp_path}_marker").exists()
    assert key not in described
    texts = [path for path in run.rglob("*") if path.suffix in (".log", ".sh", ".yaml", ".json")]
    assert len(texts) > 5 and not any(key in path.read_text() for path in texts)
