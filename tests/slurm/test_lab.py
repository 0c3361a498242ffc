"""Jobs on a real Slurm with two virtual nodes: `make test-slurm`.

Second truth: the same run, uninterrupted, on two ranks without Slurm. Losses and gradient norms of
every step must be bit-identical, however often Slurm ended the run. Not covered: GPUs, containers,
several machines, a loaded queue.
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
    """Sends now the signal that Slurm sends to the batch script before the time limit."""
    jobs = lab.submit("signalled")
    lab.wait_for_step("signalled", 5)
    lab.call("scancel", "--signal=USR1", "--batch", *jobs)
    chain = lab.wait_for_end("signalled", jobs)
    assert trajectory(lab.run("signalled")) == reference
    assert [event[1] for event in chain] == ["begin", "end", "begin", "end"]
    assert chain[1][5:] == ["3", "requeue"] and chain[2][3] == "1"
    assert int(chain[2][4]) == int(chain[1][4]) >= 5, "no step is done twice"


def test_links_follow_each_other(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """Jobs submitted at once, each stopped on request. The job that is not needed is cancelled."""
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
    """The signal comes before the limit, and the job restarts from its checkpoint. A job that a
    person cancels stays cancelled."""
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
    """The other rank does not hang, and the job restarts from the last checkpoint."""
    jobs = lab.submit("killed_rank")
    lab.wait_for_step("killed_rank", 15)
    os.kill(lab.rank_process("killed_rank", 1), signal.SIGKILL)
    chain = lab.wait_for_end("killed_rank", jobs)
    assert trajectory(lab.run("killed_rank")) == reference
    assert chain[1][5:] == ["137", "requeue"]
    assert int(chain[2][4]) >= 10


def test_preemption(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """A more urgent job takes the nodes. The run saves and continues after it."""
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
    """Slurm finds a dead node, requeues the job, and the run continues from its last checkpoint.

    This happens once or twice. For a minute Slurm keeps telling the node to end the job's first
    start. A node that is back by then ends the second start, which has the same job number.
    """
    jobs = lab.submit("killed_node")
    lab.wait_for_step("killed_node", 15)
    lab.kill_node("node2")
    lab.wait(lambda: lab.states()[jobs[0]] == "PENDING", "the dead node is not noticed")
    lab.call(str(Path(request.config.rootpath) / "launch/lab.sh"), "node", "node2")
    chain = lab.wait_for_end("killed_node", jobs)
    assert trajectory(lab.run("killed_node")) == reference
    assert chain[-1][3] in ("1", "2") and chain[-1][-1] == "stop: finished at step 60"
    assert int([event for event in chain if event[1] == "begin"][1][4]) >= 10


def test_requeue_by_a_person(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """`scontrol requeue`, which gives the ranks ten seconds (the lab's KillWait)."""
    jobs = lab.submit("requeued")
    lab.wait_for_step("requeued", 15)
    lab.call("scontrol", "requeue", *jobs)
    chain = lab.wait_for_end("requeued", jobs)
    assert trajectory(lab.run("requeued")) == reference
    begins = [event for event in chain if event[1] == "begin"]
    assert [event[3] for event in begins] == ["0", "1"] and int(begins[1][4]) >= 10


def test_controller_dies_and_comes_back(
    lab: Any, reference: Trajectory, trajectory: Any, request: Any
) -> None:
    """The job continues to train without the controller. It is signalled in the meantime, cannot
    requeue itself, and retries until the controller is back."""
    [job] = lab.submit("controller")
    lab.wait_for_step("controller", 15)
    lab.kill_controller()
    step = lab.steps("controller")
    lab.wait_for_step("controller", step + 3)
    os.kill(lab.batch_shell(job), signal.SIGUSR1)
    log = lab.run("controller") / f"slurm/job_{job}.log"
    lab.wait(
        lambda: "controller does not answer" in log.read_text(), "nothing asked for it", alone=True
    )
    lab.call(str(Path(request.config.rootpath) / "launch/lab.sh"), "controller")
    chain = lab.wait_for_end("controller", [job])
    assert trajectory(lab.run("controller")) == reference
    assert [event[1] for event in chain] == ["begin", "end", "begin", "end"]
    assert chain[1][5:] == ["3", "requeue"] and chain[-1][-1] == "stop: finished at step 60"


SWEEP = ["sweep=branch_bf16", "train.seed=1", "train.total_tokens=65536"]  # 256 steps
SWEEP += ["train.save_every_steps=64"]


def test_sweep_is_an_array_with_branches(lab: Any, trajectory: Any) -> None:
    """Five cells. The signal interrupts the trunk, which requeues itself and not the array.
    Branches start after it, from its checkpoints. The trunk's curve is that of an uninterrupted run
    without Slurm. A second call submits nothing and shows the gaps."""
    folder = lab.run("branch_bf16")
    said = lab.sweep(*SWEEP, "at_once=2")
    trunk, bf16 = (f"branch_bf16/{name}-seed1" for name in ("nvfp4_nemotron3", "bf16"))
    branches = [f"branch_bf16/bf16_from_{step}-seed1" for step in (64, 128, 192)]
    numbers = {
        n: (lab.run(n) / "slurm/links").read_text().strip() for n in (trunk, bf16, *branches)
    }
    assert "2 cells" in said and "3 cells, after nvfp4_nemotron3-seed1" in said
    again = lab.sweep(*SWEEP)
    assert "in the queue: nvfp4_nemotron3-seed1, bf16-seed1, bf16_from_64-seed1" in again
    assert "submitted" not in again
    lab.wait_for_step(trunk, 70)
    assert all(lab.states()[numbers[name]] == "PENDING" for name in branches)
    lab.call("scancel", "--signal=USR1", "--batch", numbers[trunk])
    status = lab.call(sys.executable, "-m", "nemotron_train", "slurm", "status", str(folder))
    assert {line.split()[0] for line in status.splitlines()[1:] if "seed1" in line} == {
        name.partition("/")[2] for name in numbers
    }
    chains = {name: lab.wait_for_end(name, list(numbers.values())) for name in numbers}
    assert [event[1:4] for event in chains[trunk][:3]] == [
        ["begin", numbers[trunk], "0"],
        ["end", numbers[trunk], "0"],
        ["begin", numbers[trunk], "1"],
    ]
    assert chains[trunk][1][5:] == ["3", "requeue"]
    assert [event[3] for event in chains[bf16]] == ["0", "0"], "not requeued with it"
    for name in numbers:
        assert chains[name][-1][5:] == ["0", "stop: finished at step 256"]
    for name, step in zip(branches, (64, 128, 192), strict=True):
        assert chains[name][0][0] >= chains[trunk][-1][0], "it waited"
        assert trajectory(lab.run(name))[0][0] == step + 1

    command = [sys.executable, "-m", "nemotron_train", "pretrain", *lab.common, "run=tiny"]
    command += [*SWEEP[1:], "precision=nvfp4_nemotron3", "name=alone"]
    lab.call(*command)
    assert trajectory(lab.run(trunk)) == trajectory(lab.run("alone"))
    last = lab.sweep(*SWEEP)
    assert "5 of 5 runs are finished" in last and "submitted" not in last
    assert "bf16_from_192" in (folder / "gap.md").read_text()


def test_failed_cells_are_named_and_stop_no_other(lab: Any) -> None:
    """One cell cannot work, which only the ranks can detect. The folder of both has a hostile
    name."""
    folder = "runs/$(touch marker);'`touch marker`"
    asked = ["name=failing", f'folder="{folder}"', "data.tokenizer=data/tokenizer,nowhere"]
    asked += ["train.stop_after_steps=2", "cluster.requeue=false"]
    lab.sweep(*asked)
    cells = {n: lab.workdir / folder / f"failing/{n}-seed1234" for n in ("tokenizer", "nowhere")}
    jobs = {name: (cell / "slurm/links").read_text().strip() for name, cell in cells.items()}
    lab.wait(lambda: not set(jobs.values()) & set(lab.states()), "the cells do not end")
    assert "ExitCode=2:0" in lab.call("scontrol", "show", "job", jobs["nowhere"])
    assert (cells["tokenizer"] / "slurm/chain.log").read_text().splitlines()[-1].endswith("\t3\t-")
    said = lab.sweep(*asked)
    assert "nowhere-seed1234 ended before: exit 2, stop: wrong configuration or input" in said
    assert "tokenizer-seed1234 ended before: exit 3" in said and "2 cells" in said
    again = [(cell / "slurm/links").read_text().strip() for cell in cells.values()]
    lab.wait(lambda: not set(again) & set(lab.states()), "the cells do not end")
    assert not list(lab.workdir.rglob("marker"))


def test_hostile_names_submit_nothing(lab: Any) -> None:
    """In the run's name, in a cluster knob, in the sweep's name."""
    before = lab.states()
    job = [sys.executable, "-m", "nemotron_train", "slurm", "cluster=local_lab", *lab.common]
    for words in (["name='a;touch marker'"], ["name=a", "cluster.partition='main --uid=0'"]):
        lab.call(*job, *words, code=2)
    array = [sys.executable, "-m", "nemotron_train", "sweep", "launcher=slurm", *lab.common]
    lab.call(*array, "cluster=local_lab", "name='$(touch marker)'", "train.seed=1,2", code=2)
    assert lab.states() == before and not list(lab.workdir.rglob("marker"))


def test_torchrun_on_each_node(lab: Any, reference: Trajectory, trajectory: Any) -> None:
    """The other launcher, stopped by the signal and requeued, gives the same run."""
    jobs = lab.submit("torchrun", "cluster.launcher=torchrun")
    lab.wait_for_step("torchrun", 5)
    lab.call("scancel", "--signal=USR1", "--batch", *jobs)
    chain = lab.wait_for_end("torchrun", jobs)
    assert trajectory(lab.run("torchrun")) == reference
    assert chain[1][5:] == ["3", "requeue"]


def test_mistake_found_by_the_ranks_ends_the_chain(lab: Any) -> None:
    """Exit code 2 reaches the job, and no later link repeats the same mistake."""
    links = lab.submit("mistake", "data.tokenizer=nowhere", "cluster.chain_links=3")
    chain = lab.wait_for_end("mistake", links)
    assert [event[1] for event in chain] == ["begin", "end"] and chain[1][5] == "2"
    assert "ExitCode=2:0" in lab.call("scontrol", "show", "job", links[0])
    assert "nowhere" in (lab.run("mistake") / "ranks/rank_0000.log").read_text()


def test_hostile_folder_and_secrets(lab: Any, tmp_path: Path) -> None:
    """A folder with shell syntax in its name is only a folder. A key from the user's environment is
    in neither script nor log nor Slurm's description of the job."""
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
