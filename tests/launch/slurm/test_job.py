"""Job scripts without Slurm. Bash itself reads back the settings of a script. Covers hostile words,
refusals, and the decisions of the chain with stand-ins for srun and scontrol. Not covered: Slurm
(tests/slurm), GPUs, containers, torchrun.
"""

import os
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import recipes_folder
from nemotron_train.config.cluster import ClusterConfig, check_cluster
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.data.batches import DataState
from nemotron_train.launch.slurm.job import plan_job, render, templates_folder
from nemotron_train.plan.precision.record import UNKNOWN
from nemotron_train.run_folder.checkpoint_metadata import texts_of
from nemotron_train.run_folder.folder import open_run_folder
from nemotron_train.run_folder.integrity import commit, partial_folder, step_folder
from nemotron_train.run_folder.progress import Progress
from tests.conftest import checkpoint_texts

CLUSTERS = sorted(path.stem for path in (recipes_folder() / "cluster").glob("*.yaml"))
BATCH = ["train.global_batch_tokens=16384", "train.validation_tokens=16384"]
BASE = ["cluster=local_lab", "name=job", "train.micro_batch_sequences=2"]

# Bash runs a script up to its functions and prints the settings, separated by NUL.
_READ = r"""
head=$(sed '/^# --- one rank/,$d' "$1")
eval "$head"
printf '%s\0' "$workdir" "$run_folder" "$container_image" "$container_mounts" "$scratch" \
    "${EXTRA-}" "${command[@]}"
"""


def settings_of(script: str, folder: Path) -> list[str]:
    """The settings as bash reads them when it runs the script's head in `folder`."""
    path = folder / "read_me.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    done = subprocess.run(
        ["bash", "-c", _READ, "_", str(path)], cwd=folder, capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def sbatch_lines(script: str) -> list[str]:
    """Every line that sbatch could read as an option, anywhere in the script."""
    return [line for line in script.splitlines() if line.lstrip().startswith("#SBATCH")]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_renders(cluster: str, tmp_path: Path) -> None:
    job = plan_job([*BASE[1:], f"cluster={cluster}", "nodes=2", *BATCH])
    script = render(job)
    settings_of(script, tmp_path)
    lines = sbatch_lines(script)
    assert "#SBATCH --nodes=2" in lines and "#SBATCH --job-name=job" in lines
    assert f"#SBATCH --ntasks-per-node={job.cluster.ranks_per_node}" in lines
    assert f"#SBATCH --signal=B:USR1@{job.cluster.signal_lead_seconds}" in lines
    for line in ("--open-mode=append", "--dependency=singleton", "--requeue"):
        assert f"#SBATCH {line}" in lines
    first_command = next(
        n for n, line in enumerate(script.splitlines()) if line and not line.startswith("#")
    )
    assert script.splitlines()[first_command] == "set -euo pipefail"
    assert all(line in script.splitlines()[:first_command] for line in lines)
    gpus = [line for line in lines if "gpus" in line]
    assert len(gpus) == (job.cluster.gpus_per_node > 0)
    assert "@SETTINGS@" not in script and "@SBATCH@" not in script


def test_time_limit_is_written_as_slurm_reads_it() -> None:
    """Days-hours:minutes:seconds. A day has 24 hours, an hour 60 minutes."""
    script = render(plan_job([*BASE, "cluster.time_limit_minutes=3007"]))
    assert f"#SBATCH --time=2-{2:02}:{7:02}:00" in sbatch_lines(script)


hostile = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cn", "Co", "Cf"]),
    min_size=1,
    max_size=20,
)


@given(hostile, hostile)
@settings(max_examples=25, deadline=None)
def test_whatever_text_reaches_the_job_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, text: str, other: str
) -> None:
    """Printable text comes out of bash unchanged and adds no sbatch option."""
    folder = tmp_path_factory.mktemp("hostile")
    marker = folder / "marker"
    text = f"{text}'\"; touch {marker}; $(touch {marker}) `touch {marker}` \\"
    job = plan_job(BASE)
    plain = sbatch_lines(render(job))
    job.words[:] = [f"data.tokenizer={text}", other]
    job.cluster.container_image, job.cluster.scratch = text, f"/{other}"
    job.cluster.environment["EXTRA"] = text
    try:
        check_cluster(job.cluster)
    except ConfigError as error:  # the text holds a character that is not printable
        assert "line breaks and control characters" in str(error)
        return
    script = render(job)
    found = settings_of(script, folder)
    assert found[2] == found[5] == text and found[4] == f"/{other}"
    assert found[-2:] == [f"data.tokenizer={text}", other]
    assert sbatch_lines(script) == plain
    assert not marker.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster=locallab"], ("cluster=locallab", "local_lab")),
        (["cluster.partitoin=x"], ("cluster.partitoin", "partition")),
        (["cluster.partition='a b'"], ("cluster.partition='a b'", "letters")),
        (['cluster.account="x\n#SBATCH --uid=0"'], ("cluster.account",)),
        (["name='a;touch x'"], ("name=a;touch x", "letters")),
        (["nodes=0"], ("nodes=0", "1 or more")),
        (["nodes=two"], ("nodes=two", "1 or more")),
        (["cluster.ranks_per_node=3", "parallel.tensor=2"], ("= 3 ranks", "nodes=2 would do")),
        (["cluster.gpus_per_node=8"], ("cluster.ranks_per_node=1", "gpus_per_node=8")),
        (["cluster.signal_lead_seconds=600"], ("cluster.signal_lead_seconds=600", "less than")),
        (["cluster.scratch=tmp"], ("cluster.scratch='tmp'", "absolute")),
        (["cluster.container_mounts=[/a]"], ("container_mounts", "/DESTINATION")),
        (['cluster.container_mounts=["/a:/b,/c:/d"]'], ("container_mounts", "commas")),
        (['cluster.environment={"A B": "1"}'], ("cluster.environment", "A B")),
        (["cluster.environment={RANK: '0'}"], ("cluster.environment.RANK", "leave it out")),
        (['data.tokenizer="a\nb"'], ("line breaks",)),
        (["folder=50%j"], ("50%j", "%")),
    ],
)
def test_mistakes_are_one_line(
    overrides: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slurm", "--dry-run", *BASE, *overrides]) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    for word in words:
        assert word in said.err


SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "override",
    [
        f"cluster.environment={{WANDB_API_KEY: {SECRET}}}",
        f"cluster.environment={{HF_TOKEN: hf_{SECRET}}}",
        f"cluster.environment={{AWS_SECRET_ACCESS_KEY: x{SECRET}}}",
        f"cluster.environment={{HARMLESS: '{SECRET}'}}",
        f"cluster.environment.HTTPS_PROXY=http://me:x{SECRET}@proxy",
        f"+logging.wandb_api_key={SECRET}",
        f"data.tokenizer=hf_{SECRET}",
    ],
)
def test_secrets_are_refused_and_not_repeated(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slurm", "--dry-run", *BASE, override]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.err + said.out
    assert "environment" in said.err and "netrc" in said.err


def test_a_secret_of_the_surroundings_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert SECRET not in render(plan_job(BASE))


def test_tensor_and_expert_ranks_are_the_same_processes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two tensor-parallel and two expert-parallel ranks are two processes, not four."""
    layout = ["parallel.tensor=2", "parallel.sequence=true", "cluster.ranks_per_node=2"]
    assert main(["slurm", "--dry-run", *BASE, *layout, "parallel.expert=2"]) == 0
    assert main(["slurm", "--dry-run", *BASE, *layout, "parallel.expert=4"]) == 2
    assert "parallel.* = 4 ranks do not divide: nodes=2 would do" in capsys.readouterr().err


def test_memory_that_does_not_fit_names_nodes_that_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The proposed number of nodes is accepted; half of it is refused."""
    job = ["run=nano_30b_a3b", "cluster=h100_8x", "cluster.gpu_memory_gib=60", "--dry-run"]
    assert main(["slurm", *job, "nodes=1"]) == 2
    said = capsys.readouterr().err
    assert "GiB before activations" in said
    nodes = int(said.split("nodes=")[1].split()[0])
    assert nodes > 1
    assert main(["slurm", *job, f"nodes={nodes}"]) == 0
    assert main(["slurm", *job, f"nodes={nodes // 2}"]) == 2
    tighter = ["cluster.gpu_memory_gib=45", "nodes=2"]
    assert main(["slurm", *job, *tighter]) == 2
    nodes = int(capsys.readouterr().err.split("nodes=")[-1].split()[0])
    assert nodes > 2 and main(["slurm", *job, *tighter[:1], f"nodes={nodes}"]) == 0
    small = ["cluster.gpu_memory_gib=10", "nodes=1"]
    assert main(["slurm", *job, *small]) == 2
    assert "no number of nodes holds it" in capsys.readouterr().err


def test_missing_data_and_another_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written. A dry run reports the error and still prints the script."""
    monkeypatch.chdir(tmp_path)
    data = ["data=prepared", "data.tokenizer=t", "data.phases=[{blend: [{path: nowhere}]}]"]
    data.append("data.validation=[{path: nowhere}]")
    assert main(["slurm", *BASE, *data]) == 2
    assert "nowhere holds no prepared data" in capsys.readouterr().err
    assert main(["slurm", "--dry-run", *BASE, *data]) == 0
    said = capsys.readouterr()
    assert "nowhere" in said.err and "set -euo pipefail" in said.out
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["slurm", *BASE]) == 2
    assert "--dry-run" in capsys.readouterr().err
    folder = tmp_path / "runs/job"
    folder.mkdir(parents=True)
    job = plan_job([*BASE, "model.hidden_size=128"])
    open_run_folder(job.config, job.derived, "").close()
    assert main(["slurm", *BASE]) == 2
    assert "model.hidden_size was 128" in capsys.readouterr().err


def test_an_old_checkpoint_of_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Covers the run's own folder, even if its config.yaml matches, and the parent run of a branch.
    Tensors are not read. The same checkpoint with the right model is accepted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")  # sbatch is looked up last
    for run, model in (("job", "model.moe.experts=32"), ("parent", "model.pattern=ME*E")):
        job = plan_job([*BASE[::2], f"name={run}", model])
        open_run_folder(job.config, job.derived, "").close()
        write_checkpoint(Path("runs") / run / "checkpoints", 5, job.config)
    config = tmp_path / "runs/job/config.yaml"
    assert main(["slurm", *BASE, "model.moe.experts=32"]) == 2
    assert "sbatch is not on" in capsys.readouterr().err
    config.write_text(config.read_text().replace("experts: 32", "experts: 16"))
    assert main(["slurm", *BASE]) == 2
    said = capsys.readouterr().err
    assert "holds another model: model.moe" in said and len(said.splitlines()) == 1

    branch = [*BASE[::2], "name=branch"]
    assert main(["slurm", *branch, "branch=runs/parent@5"]) == 2
    assert "sbatch is not on" in capsys.readouterr().err
    for words, expected in (  # the parent's checkpoint is at 10,240 tokens
        (
            ["branch=runs/parent@5", "model.pattern=ME*EME"],
            "model.pattern is ME*E there and ME*EME here",
        ),
        (["branch=runs/parent@6"], "no checkpoint of step 6; it has 5"),
        (["branch=runs/parent@5", *SHORT, "train.total_tokens=10240"], "nothing is left"),
    ):
        assert main(["slurm", *branch, *words]) == 2
        said = capsys.readouterr().err
        assert expected in said and len(said.splitlines()) == 1
    assert not (tmp_path / "runs/branch").exists()


SHORT = ["optim.warmup_tokens=0", "optim.decay_tokens=0"]


def write_checkpoint(folder: Path, step: int, config: Config) -> None:
    """Writes the text files of a checkpoint and a manifest that covers them."""
    final = step_folder(folder, step)
    partial_folder(final).mkdir(parents=True)
    progress = Progress(step, 2048 * step, DataState("train", 256, 1, ""))
    texts = texts_of(progress, config, UNKNOWN, {}, 1) | {".metadata": ""}
    del texts["data.json"]
    texts["metadata.json"] = checkpoint_texts(step)["metadata.json"]
    for name, text in texts.items():
        (partial_folder(final) / name).write_text(text)
    commit(final, {}, lambda: None)


def test_a_container_sees_its_mounts(tmp_path: Path) -> None:
    script = render(
        plan_job(
            [
                *BASE,
                "cluster.container_image=/images/a b.sqsh",
                f"cluster.container_mounts=['{tmp_path}:{tmp_path}','/data:/data:ro']",
            ]
        )
    )
    found = settings_of(script, tmp_path)
    assert found[2:4] == ["/images/a b.sqsh", f"{tmp_path}:{tmp_path},/data:/data:ro"]
    assert found[6] == "python3", "the container's interpreter, not this one's path"


def test_the_template_has_no_logic_of_python() -> None:
    """One template for all jobs. Jobs differ only between its two marks."""
    templates = sorted(path.name for path in templates_folder().glob("*.sh"))
    assert templates == ["array.sh", "job.sh"]
    one, two = (render(plan_job([*BASE, f"nodes={nodes}"])) for nodes in (1, 2))
    different = [a for a, b in zip(one.splitlines(), two.splitlines(), strict=True) if a != b]
    assert different == ["#SBATCH --nodes=1"]


# The chain, with srun replaced by a shell command --------------------------------------------


class Chain:
    """Runs a job script as Slurm would. The ranks run `rank`, a shell command."""

    def __init__(self, folder: Path, rank: str, *overrides: str) -> None:
        self.folder, self.rank = folder, rank
        self.run = folder / "runs/job"
        bin_folder = folder / "bin"
        bin_folder.mkdir(exist_ok=True)
        calls = folder / "calls"
        for name, body in (
            # Slurm ends a job when it requeues it.
            (
                "scontrol",
                "case $1 in show) echo node1 ;; ping) echo it is UP ;; *) "
                f'echo "scontrol $*" >>{calls}; kill $PPID ;; esac',
            ),
            ("scancel", f'echo "scancel $*" >>{calls}'),
            ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'),
        ):
            path = bin_folder / name
            path.write_text(f"#!/usr/bin/env bash\n{body}\n")
            path.chmod(0o755)
        old = Path.cwd()
        os.chdir(folder)
        job = plan_job([*BASE, *overrides])
        os.chdir(old)
        script = render(job)
        start, end = script.index("command=("), script.index("# --- one rank")
        words = f"command=(bash -c {shlex.quote(rank)})\n"
        (folder / "job.sh").write_text(script[:start] + words + script[end:])

    def start(self, restart: int = 0) -> int:
        environment = os.environ | {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "TZ": "America/New_York",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_RESTART_COUNT": str(restart),
        }
        command = ["timeout", "60", "bash", str(self.folder / "job.sh")]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    def calls(self) -> list[str]:
        """The Slurm commands that were called, except those that list the nodes' names."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def outcome(self) -> str:
        """The last field of the last event. The first field is the time, in UTC on every
        machine."""
        event = (self.run / "slurm/chain.log").read_text().splitlines()[-1].split("\t")
        ago = datetime.now(UTC) - datetime.fromisoformat(event[0])
        assert event[0].endswith("Z") and abs(ago.total_seconds()) < 600
        return event[-1]


MAKE_STEP = 'f=runs/job/checkpoints/step_0000000{}; mkdir -p "$f"; touch "$f/manifest.json"; '


@pytest.mark.parametrize(
    ("code", "chain", "outcome", "calls"),
    [
        (0, 1, "stop: finished at step 5", []),
        (2, 1, "stop: wrong configuration or input", []),
        (3, 1, "requeue", ["scontrol requeue 7"]),
        (1, 1, "requeue", ["scontrol requeue 7"]),
        (4, 1, "stop: it fails at the same step", []),
        (3, 3, "next link", []),
        (1, 3, "next link", []),
        (0, 3, "stop: finished", ["scancel --state=PENDING --name=job 8"]),
        (2, 3, "stop: wrong", ["scancel --state=PENDING --name=job 8"]),
    ],
)
def test_what_follows_an_exit_code(
    tmp_path: Path, code: int, chain: int, outcome: str, calls: list[str]
) -> None:
    job = Chain(tmp_path, MAKE_STEP.format(5) + f"exit {code}", f"cluster.chain_links={chain}")
    (job.run / "slurm").mkdir(parents=True)
    (job.run / "slurm/links").write_text("7\n8\n" if chain > 1 else "7\n")
    assert job.start() == code
    assert outcome in job.outcome()
    assert job.calls() == calls
    log = (job.run / "ranks/rank_0000.log").read_text()
    assert f"rank 0 ended with exit code {code}" in log
    assert not list((job.run / "slurm").glob("ended.*"))


def test_three_starts_at_one_step_end_the_chain(tmp_path: Path) -> None:
    """A start that makes progress resets the count. Deleting chain.log, as the message advises,
    works."""
    progress = "[[ -e further ]] && { " + MAKE_STEP.format(5) + "}; exit 1"
    job = Chain(tmp_path, progress)
    assert [job.start(n) for n in range(2)] == [1, 1]
    (tmp_path / "further").touch()
    assert job.start(2) == 1 and job.outcome() == "requeue"
    assert [job.start(n) for n in range(3, 6)] == [1, 1, 4]
    assert "three starts" in job.outcome()
    assert job.start(6) == 4, "not even tried"
    assert (job.run / "ranks/rank_0000.log").read_text().count("--- job 7 start") == 6
    (job.run / "slurm/chain.log").unlink()
    assert job.start(7) == 1 and job.outcome() == "requeue"


def test_a_controller_that_restarts_is_asked_again(tmp_path: Path) -> None:
    """The controller does not answer twice, then it does. A refusal by a controller that answers is
    final."""
    job = Chain(tmp_path, MAKE_STEP.format(5) + "exit 3")
    calls = tmp_path / "calls"
    down = "Slurmctld(primary) at head is DOWN"
    for name, body in (
        ("sleep", ":"),
        (
            "scontrol",
            f'case $1 in show) echo node1 ;; ping) echo "{down}" ;; *) '
            f'echo "scontrol $*" >>{calls}; '
            f"(($(wc -l <{calls}) > 2)) && kill $PPID || exit 1 ;; esac",
        ),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    assert job.start() == 3 and job.outcome() == "requeue"
    assert job.calls() == ["scontrol requeue 7"] * 3
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(scontrol.read_text().replace("DOWN", "UP"))
    calls.unlink()
    assert job.start(1) == 3
    assert job.calls() == ["scontrol requeue 7"]


def test_starts_that_left_no_end_count(tmp_path: Path) -> None:
    """A node that dies writes no end event. Three such starts are a crash loop too."""
    job = Chain(tmp_path, "exit 0")
    (job.run / "slurm").mkdir(parents=True)
    begin = "2026-01-01T00:00:00Z\tbegin\t7\t{}\t0\tnode1\n"
    (job.run / "slurm/chain.log").write_text("".join(begin.format(n) for n in range(3)))
    assert job.start(3) == 4
    (job.run / "slurm/chain.log").write_text("".join(begin.format(n) for n in range(2)))
    assert job.start(3) == 0


def test_no_step_within_the_time_limit_ends_the_chain(tmp_path: Path) -> None:
    """A run that is stopped before its first checkpoint would be stopped again on every start. With
    a new step the chain continues."""
    # The first step takes longer than the limit. The rank signals the batch shell, two processes
    # up.
    ask = "kill -USR1 $(ps -o ppid= $PPID); sleep 0.5; "
    further = "[[ ! -e further ]] || { " + MAKE_STEP.format(5) + "}; "
    job = Chain(tmp_path, ask + further + "exit 3")
    assert job.start() == 3
    assert "no step was made within the time limit" in job.outcome() and not job.calls()
    (tmp_path / "further").touch()
    assert job.start(1) == 3 and job.outcome() == "requeue"


def test_default_cluster_knobs_are_safe() -> None:
    check_cluster(
        ClusterConfig(
            name="x",
            gpus_per_node=0,
            ranks_per_node=1,
            cpus_per_rank=1,
            time_limit_minutes=1,
            signal_lead_seconds=0,
        )
    )


def test_status_joins_queue_and_run_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A running job, a waiting link of the same run, and a run whose job has ended. squeue is a
    stand-in that prints the output of Slurm 22.05."""
    for name, links in (("going", "11\n12\n"), ("over", "9\n"), ("fresh", "")):
        (tmp_path / "runs" / name / "slurm").mkdir(parents=True)
        (tmp_path / "runs" / name / "slurm/links").write_text(links)
    going, over = tmp_path / "runs/going", tmp_path / "runs/over"
    (going / "derived.yaml").write_text("total_steps: 3000\n")
    rows = ['{"torn', '{"step": 1200, "loss": 2.5, "tokens_per_second": 1234.5, "step_seconds": 2}']
    (going / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (going / "checkpoints/step_00001000").mkdir(parents=True)
    (going / "checkpoints/step_00001000/manifest.json").touch()
    (going / "checkpoints/step_00001100").mkdir()  # an incomplete checkpoint
    (over / "slurm/chain.log").write_text("t\tend\t9\t0\t50\t2\tstop: wrong configuration\n")
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho '11|RUNNING|1:00|2:59:00|4|node[1-4]'\n"
        "echo '12|PENDING|0:00|4:00:00|4|(Dependency)'\necho '99|RUNNING|1:00|1:00|1|other'\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "status"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # 1,800 steps of two seconds take an hour.
    assert "going 11 running 4 1,200/3,000 2.500 1,23" in said and " 1:00 2:59:00 1,000 at" in said
    assert "going 12 pending 4" in said and " Dependency over" in said
    assert "over - - - 0 - - - - - exit 2, stop: wrong configuration" in said
    assert "99" not in said
    cell = tmp_path / "runs/a_sweep_with_a_rather_long_name/nvfp4_nemotron3-seed1/slurm"
    cell.mkdir(parents=True)
    (cell / "links").write_text("40_3\n")
    with open(tmp_path / "squeue", "a") as squeue:
        squeue.write("echo '40_3|PENDING|0:00|4:00:00|1|(JobArrayTaskLimit)'\n")
    assert main(["slurm", "status"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    name = "a_sweep_with_a_rather_long_name/nvfp4_nemotron3-seed1"
    assert f"{name} 40_3 pending 1 0 - - - 4:00:00 - JobArrayTaskLimit" in said
    assert "1,200/3,000" in said, "nothing is cut off"
    assert main(["slurm", "status", "runs/a_sweep_with_a_rather_long_name"]) == 0
    assert "nvfp4_nemotron3-seed1 40_3" in " ".join(capsys.readouterr().out.split())
    # A branch from step 1,000 with batches four times as large: 800,000 tokens are 200 steps.
    (going / "derived.yaml").write_text("total_steps: 450\ntokens_per_step: 4000\n")
    (going / "config.yaml").write_text("train: {total_tokens: 1800000}\n")
    with open(going / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 1201, "tokens": 1000000, "loss": 2.5, "step_seconds": 2}\n')
    assert main(["slurm", "status"]) == 0
    assert "1,201/1,401" in capsys.readouterr().out
    assert main(["slurm", "status", "runs/nothing"]) == 2
    assert "no run here was submitted" in capsys.readouterr().err
