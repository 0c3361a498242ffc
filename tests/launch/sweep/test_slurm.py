"""Sweeps as Slurm job arrays, with stand-ins for sbatch, squeue, scontrol and srun: what is
submitted, what waits for what, hostile words, and an array task run through both scripts. Not
covered: Slurm itself (tests/slurm).
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.launch.sweep import plan as sweep_module
from nemotron_train.launch.sweep.slurm import _ranges

CLUSTER = ["launcher=slurm", "cluster=local_lab"]
GRID = ["name=grid", "precision=bf16,mxfp8", "train.seed=1,2"]
CELLS = ["bf16-seed1", "bf16-seed2", "mxfp8-seed1", "mxfp8-seed2"]


class FakeSlurm:
    """Stand-ins first on the PATH. sbatch records its arguments and returns the job numbers 100,
    101, ...; squeue prints the content of `queue`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.queue = folder, folder / "queue"
        self.queue.write_text("")
        calls = folder / "sbatch_calls"
        for name, body in (
            ("sbatch", f'printf "%s\\n" "$*" >>{calls}; echo $((99 + $(wc -l <{calls})))'),
            ("squeue", f"cat {self.queue}"),
            ("scontrol", f'echo "$*" >>{folder}/scontrol_calls; [[ $1 != show ]] || echo node1'),
            ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'),
            ("scancel", ":"),
            ("sleep", ":"),
        ):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{body}\n")
            path.chmod(0o755)

    def submitted(self) -> list[list[str]]:
        """The arguments of each sbatch call."""
        path = self.folder / "sbatch_calls"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def requeued(self) -> list[str]:
        path = self.folder / "scontrol_calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix("requeue ") for line in lines if line.startswith("requeue")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path)


def option(call: list[str], name: str) -> str:
    [found] = [word for word in call if word.startswith(f"--{name}=")]
    return found.partition("=")[2]


def finish(cell: str) -> None:
    """Writes the files of a finished run that a sweep reads."""
    folder = Path("runs/grid") / cell
    summary = {"finished": True, "validation_loss": 5.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 9, "loss": 5.0}))


def test_one_array_with_a_task_a_cell(fake: FakeSlurm, tmp_path: Path) -> None:
    """Every cell has the script of a single run in its folder. Its threads are its cores."""
    assert main(["sweep", *GRID, *CLUSTER, "at_once=2", "cluster.cpus_per_rank=3"]) == 0
    [call] = fake.submitted()
    assert option(call, "array") == "0-3%2" and "--dependency" not in " ".join(call)
    assert call[-1] == "runs/grid/array/job.sh"
    for number, name in enumerate(CELLS):
        folder = tmp_path / "runs/grid" / name / "slurm"
        assert (folder / "links").read_text() == f"100_{number}\n"
        script = (folder / "job.sh").read_text()
        precision, seed = name.split("-seed")
        for word in (f"precision={precision}", f"train.seed={seed}", "train.threads=3"):
            assert f"    {word}\n" in script
    array = (tmp_path / "runs/grid/array/job.sh").read_text()
    assert "#SBATCH --job-name=grid\n" in array and "singleton" not in array
    described = json.loads((tmp_path / "runs/grid/sweep.json").read_text())
    assert [cell["name"] for cell in described["cells"]] == CELLS


def test_only_what_is_missing_is_submitted(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished and queued cells are left alone. A failed cell is named and tried again."""
    asked = ["sweep", *GRID, *CLUSTER]
    assert main(asked) == 0
    finish("bf16-seed1")
    fake.queue.write_text("100_1|RUNNING|1:00|2:00|1|node1\n")
    failed = Path("runs/grid/mxfp8-seed1/slurm/chain.log")
    failed.write_text("t\tend\t100_2\t0\t0\t2\tstop: wrong configuration\n")
    capsys.readouterr()
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "1 of 4 runs are finished already" in said and "in the queue: bf16-seed2" in said
    assert "mxfp8-seed1 ended before: exit 2, stop: wrong configuration" in said
    first, second = fake.submitted()
    assert option(first, "array") == "0-3" and option(second, "array") == "2-3"
    assert Path("runs/grid/mxfp8-seed2/slurm/links").read_text() == "101_3\n"
    assert Path("runs/grid/bf16-seed2/slurm/links").read_text() == "100_1\n"
    assert not Path("runs/grid/gap.md").exists()
    for cell in CELLS:
        finish(cell)
    assert main(asked) == 0 and len(fake.submitted()) == 2
    assert Path("runs/grid/gap.md").exists(), "the last time it reports"


def test_branches_wait_in_an_array_of_their_own(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One array per trunk, which depends on the trunk's task only. A branch of a finished trunk has
    no dependency and must find its checkpoint."""
    (tmp_path / "sweep").mkdir()
    branch = "{of: bf16, step: %d, overrides: [precision=mxfp8]}"
    recipe = f"branches:\n  early: {branch % 32}\n  late: {branch % 64}\n"
    (tmp_path / "sweep/grid.yaml").write_text(recipe)
    monkeypatch.setattr(sweep_module, "recipes_folder", lambda: tmp_path)
    grid = ["sweep=grid", "precision=bf16,fp32", "train.seed=1,2", "train.save_every_steps=32"]
    asked = ["sweep", *grid, "train.keep_checkpoints=9", *CLUSTER]
    assert main(asked) == 0
    calls = fake.submitted()
    assert [option(call, "array") for call in calls] == ["0-3", "4,6", "5,7"]
    assert [option(call, "dependency") for call in calls[1:]] == ["afterok:100_0", "afterok:100_1"]
    assert all("--kill-on-invalid-dep=yes" in call for call in calls[1:])
    assert Path("runs/grid/late-seed1/slurm/links").read_text() == "101_6\n"

    # The first trunk is running. The second is first finished without a checkpoint, then
    # unfinished.
    fake.queue.write_text("100_0|RUNNING|1:00|2:00|1|node1\n102_5|PENDING|0:00|2:00|1|(Dep)\n")
    finish("bf16-seed2")
    assert main(asked) == 2
    assert len(fake.submitted()) == 3
    (tmp_path / "runs/grid/bf16-seed2/summary.json").unlink()
    assert main(asked) == 0
    calls = fake.submitted()[3:]
    assert [option(call, "array") for call in calls] == ["1-3", "4,6", "7"]
    assert [option(call, "dependency") for call in calls[1:]] == ["afterok:100_0", "afterok:103_1"]


NO_DATA = ["data=prepared", "data.tokenizer=t", "data.phases=[{blend: [{path: nowhere}]}]"]
NO_DATA += ["data.validation=[{path: nowhere}]"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster=local_lob"], ("cluster=local_lob", "local_lab")),
        (["cluster.chain_links=3"], ("chain_links=3", "requeue themselves")),
        (["nodes=1,2"], ("nodes=1,2", "one value")),
        (["cluster.ranks_per_node=3", "parallel.tensor=2"], ("= 3 ranks", "nodes=2 would do")),
        (["name='a;touch x'"], ("name=a;touch x", "letters")),
        (['data.tokenizer="a\n#SBATCH --uid=0"'], ("line breaks",)),
        (["folder=50%j"], ("50%j", "%")),
        (
            NO_DATA,
            ("bf16-seed1", "nowhere holds no prepared data"),
        ),
    ],
)
def test_mistakes_are_one_line_and_submit_nothing(
    overrides: list[str],
    words: tuple[str, ...],
    fake: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sweep", *GRID, *CLUSTER, *overrides]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    for word in words:
        assert word in said.err
    assert not fake.submitted() and not Path("runs").exists()


SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("place", [[], CLUSTER])
def test_secrets_are_refused_and_not_kept(
    place: list[str], fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on this machine, where they would end up in sweep.json."""
    for override in (f"data.tokenizer=hf_{SECRET}", f"+logging.wandb_api_key={SECRET}"):
        assert main(["sweep", *GRID, *place, override]) == 2
    assert SECRET not in "".join(capsys.readouterr())
    assert not fake.submitted() and not Path("runs").exists()


def test_hostile_words_reach_a_cell_as_they_are(fake: FakeSlurm, tmp_path: Path) -> None:
    """A folder and a value contain shell syntax. The array task receives them unchanged, and
    nothing else is executed."""
    marker = tmp_path / "marker"
    folder = f"runs/$(touch {marker});'`touch {marker}` & b"
    value = f'data.tokenizer="$(touch {marker}) && `touch {marker}`"'
    assert main(["sweep", *GRID, *CLUSTER, f'folder="{folder}"', value]) == 0
    run_task(tmp_path, f"{folder}/grid", 2, 'printf "%s\\0" "$@" >said; exit 0')
    words = (tmp_path / "said").read_bytes().decode().split("\0")
    assert f'data.tokenizer="$(touch {marker}) && `touch {marker}`"' in words
    assert "name=mxfp8-seed1" in words
    assert not marker.exists()


def run_task(folder: Path, sweep: str, task: int, rank: str) -> int:
    """Runs the array's script as Slurm runs task `task`. `rank` is a shell command that replaces
    the training and receives its arguments."""
    for job in (folder / sweep).glob("*/slurm/job.sh"):
        script = job.read_text()
        start = script.index("command=(\n") + len("command=(\n")
        words = f"    bash\n    -c\n    {shlex.quote(rank)}\n    rank\n"
        job.write_text(script[:start] + words + script[start:])
    environment = os.environ | {
        "SLURM_JOB_ID": "100",  # the last task of an array has the number of the array
        "SLURM_ARRAY_JOB_ID": "100",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_JOB_NAME": "grid",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    command = ["timeout", "60", "bash", str(folder / sweep / "array/job.sh")]
    return subprocess.run(command, env=environment, cwd="/").returncode


def test_a_task_requeues_itself_and_not_the_array(fake: FakeSlurm, tmp_path: Path) -> None:
    assert main(["sweep", *GRID, *CLUSTER]) == 0
    assert run_task(tmp_path, "runs/grid", 1, "exit 3") == 3
    assert fake.requeued() == ["100_1"]
    cell = tmp_path / "runs/grid/bf16-seed2"
    events = [line.split("\t") for line in (cell / "slurm/chain.log").read_text().splitlines()]
    assert [event[1:3] for event in events] == [["begin", "100_1"], ["end", "100_1"]]
    assert "from step" in (cell / "slurm/job_100_1.log").read_text()
    assert not (tmp_path / "runs/grid/bf16-seed1/slurm/chain.log").exists()
    assert run_task(tmp_path, "runs/grid", 9, "exit 0") == 2, "no such cell"


def test_a_dry_run_prints_the_arrays_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *GRID, *CLUSTER, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    cells, _, script = printed.partition("\n\n")
    assert len(cells.splitlines()) == 4 and script.startswith("#!/usr/bin/env bash\n")
    checked = subprocess.run(["bash", "-n"], input=script, text=True)
    assert checked.returncode == 0


def test_ranges_are_read_back_as_they_were() -> None:
    """In the grammar of sbatch: numbers and first-last, separated by commas."""
    for numbers in ([0], [0, 1, 2], [1, 3, 4, 9], list(range(30))):
        back = []
        for part in _ranges(numbers).split(","):
            first, _, last = part.partition("-")
            back += range(int(first), int(last or first) + 1)
        assert back == numbers
