"""Plans on a checkpoint: resume under stochastic rounding, switch of the plan, branch of a run.

Second truth: the uninterrupted run, bit for bit. The two ways to another plan (switch and branch)
also check each other. One rank; tests/distributed/test_branch_layouts.py branches onto another
layout. Runs share this process unless a test needs a new one.
"""

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.precision.record import plan_record
from nemotron_train.plan.precision.resolve import resolve_plan
from tests import warm_process

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]
Metrics = Callable[[Path], list[dict]]
Weights = Callable[[Path, int], dict[str, object]]
PLAN = "nvfp4_bf16_forward"
MASTER = "optimizer.state.param."


def train(*words: str) -> int:
    return main(["pretrain", *words])


def tree(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file in a folder except the lock, whose epoch counts every start."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def whole_run(small_run: Small, plan: str) -> Path:
    """10 steps of 256 tokens under `plan`, checkpoints at 5 and 10. Trained once."""
    folder = Path("runs") / plan
    if not folder.exists():
        words = [f"name={plan}", f"precision={plan}", "train.save_every_steps=5"]
        assert train(*small_run[1], *words) == 0
    return folder


@pytest.fixture(scope="module")
def parent(small_run: Small) -> Path:
    return whole_run(small_run, PLAN)


@pytest.fixture(scope="module")
def bf16_branch(parent: Path) -> Path:
    assert train(f"branch={parent}@5", "precision=bf16") == 0
    return Path(f"runs/{PLAN}_at_5_bf16")


@pytest.mark.parametrize("plan", [PLAN, "nvfp4_then_mxfp8"])
def test_resume_with_stochastic_rounding_through_a_phase(
    small_run: Small, plan: str, metrics: Metrics, weights: Weights
) -> None:
    """Steps 1-10 against 1-5 and, in a new process, 6-10. A phase begins among the last steps."""
    config = compose_config([*small_run[1], f"precision={plan}"])
    assert any(
        formats.stochastic_rounding for formats in resolve_plan(config).at(5 * 256).formats.values()
    )
    assert 5 * 256 < resolve_plan(config).boundaries[-1] <= 9 * 256
    whole = whole_run(small_run, plan)
    name = f"{plan}_cut"
    words = [f"name={name}", f"precision={plan}", "train.stop_after_steps=5"]
    assert train(*small_run[1], *words) == 3
    command = [sys.executable, "-m", "nemotron_train", "pretrain", f"resume=runs/{name}"]
    done = warm_process.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert metrics(Path("runs") / name) == metrics(whole)
    assert weights(Path("runs") / name, 10) == weights(whole, 10)


def test_checkpoint_holds_its_plan_and_no_quantized_weight(parent: Path, weights: Weights) -> None:
    """The masters are FP32. The parameters are the masters rounded to BF16."""
    config = compose_config([f"resume={parent}"])
    checkpoint = parent / "checkpoints" / "step_00000010"
    assert json.loads((checkpoint / "precision.json").read_text()) == plan_record(
        resolve_plan(config)
    )
    saved = weights(parent, 10)
    masters = [key for key in saved if key.startswith(MASTER)]
    assert len(masters) > 50
    for key in masters:
        master, parameter = _tensor(saved[key]), _tensor(saved[key.removeprefix(MASTER)])
        assert master.dtype == torch.float32
        assert torch.equal(master.to(parameter.dtype), parameter), key


def _tensor(content: object) -> torch.Tensor:
    assert isinstance(content, bytes)
    return torch.load(io.BytesIO(content), weights_only=True)


def test_branch_under_the_same_plan_is_the_parent_again(
    parent: Path, metrics: Metrics, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, gradients and weights of steps 6-10 are bit-identical. The parent's bytes do not
    change."""
    before = tree(parent)
    assert train(f"branch={parent}@5", "name=same") == 0
    said = capsys.readouterr().out
    assert f"precision plan {PLAN} (" in said and "), unchanged" in said
    branch = Path("runs/same")
    assert metrics(branch)[1:] == metrics(parent)[5:]
    start, theirs = weights(branch, 5), weights(parent, 5)
    # Saved again before its first step, when the optimizer has no learning rate yet.
    assert {k for k in theirs if start[k] != theirs[k]} <= {"common_state/shard_0_1 None"}
    assert weights(branch, 10) == weights(parent, 10)
    assert tree(parent) == before


def test_branch_to_bf16(
    parent: Path, bf16_branch: Path, capsys: pytest.CaptureFixture[str], metrics: Metrics
) -> None:
    """Losses differ from the first step on, with the same schedule and the same data. The new
    folder records its origin and needs no file of the parent."""
    first, theirs = metrics(bf16_branch)[1], metrics(parent)[5]
    assert first["step"] == theirs["step"] == 6
    assert first["lr"] == theirs["lr"] and first["tokens"] == theirs["tokens"]
    assert first["loss"] != theirs["loss"]
    assert first["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    lineage = json.loads((bf16_branch / "lineage.json").read_text())["branched_from"]
    manifest = (parent / "checkpoints" / "step_00000005" / "manifest.json").read_bytes()
    run_id = json.loads((parent / "environment.json").read_text())["run_id"]
    assert (lineage["run"], lineage["step"], lineage["tokens"]) == (str(parent), 5, 5 * 256)
    assert (lineage["run_id"], lineage["changed"]) == (run_id, {})
    assert lineage["checkpoint"] == hashlib.sha256(manifest).hexdigest()
    assert [lineage["precision"][key]["name"] for key in ("before", "after")] == [PLAN, "bf16"]
    event = metrics(bf16_branch)[0]
    assert event["step"] == 5 and event["branched_from"] == f"{parent}@5"
    assert train(f"branch={parent}@5", "precision=bf16") == 0, "the same command again"
    assert "finished" in capsys.readouterr().out


def test_branch_goes_on_without_its_parent(
    parent: Path, bf16_branch: Path, metrics: Metrics, weights: Weights
) -> None:
    copied = shutil.copytree(parent, "runs/short_lived")
    words = [f"branch={copied}@5", "name=orphan", "precision=bf16", "train.stop_after_steps=2"]
    assert train(*words) == 3
    shutil.rmtree(copied)
    assert train("resume=runs/orphan") == 0
    assert metrics(Path("runs/orphan"))[1:] == metrics(bf16_branch)[1:]
    assert weights(Path("runs/orphan"), 10) == weights(bf16_branch, 10)


def test_branch_to_another_dtype_takes_the_masters(
    parent: Path, metrics: Metrics, weights: Weights
) -> None:
    """FP32 parameters come from the parent's masters, not from their BF16 rounding. Other
    hyperparameters come from the new run."""
    words = ["precision=fp32", "optim.peak_learning_rate=1e-4", "train.stop_after_steps=1"]
    assert train(f"branch={parent}@5", "name=wide", *words) == 3
    saved, theirs = weights(Path("runs/wide"), 5), weights(parent, 5)
    for key in filter(lambda key: key.startswith(MASTER), theirs):
        assert saved[key] == theirs[key]
        assert saved[key.removeprefix(MASTER)] == theirs[key], key
    assert metrics(Path("runs/wide"))[-1]["lr"] == 1e-4
    lineage = json.loads(Path("runs/wide/lineage.json").read_text())["branched_from"]
    assert lineage["changed"] == {"optim.peak_learning_rate": [0.003, 0.0001]}


def test_switch_is_asked_for_and_recorded(
    small_run: Small,
    parent: Path,
    bf16_branch: Path,
    capsys: pytest.CaptureFixture[str],
    metrics: Metrics,
    weights: Weights,
) -> None:
    """Refused with one line. With the knob set, the change is printed, recorded and in force from
    then on, and every step equals the branch's."""
    run = Path("runs/switched")
    shutil.copytree(parent, run)
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    before = tree(run)
    refused = [f"resume={run}", "precision=bf16"]
    assert train(*refused) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in (PLAN, "bf16", "switch_precision=true", f"branch={run}@STEP"):
        assert word in message
    assert tree(run) == before

    keep = "train.keep_checkpoints=9"
    assert train(*refused, "switch_precision=true", "train.stop_after_steps=2", keep) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert f"precision plan switched at step 5: {PLAN} (" in shown
    (switch,) = json.loads((run / "lineage.json").read_text())["switches"]
    assert (switch["step"], switch["after"]["name"]) == (5, "bf16")
    assert (run / "config.yaml").read_bytes() == (parent / "config.yaml").read_bytes()
    assert "precision plan bf16" in (run / "precision.txt").read_text()

    assert train(f"resume={run}", keep) == 0, "the new plan needs no asking again"
    assert metrics(run)[6:] == metrics(bf16_branch)[1:]
    assert metrics(run)[5]["precision_after"]["name"] == "bf16"
    assert weights(run, 10) == weights(bf16_branch, 10)

    assert train(*small_run[1], f"name={run.name}", f"precision={PLAN}") == 2, "nor the old one"
    assert "switch_precision=true" in capsys.readouterr().err
    assert train(f"branch={run}@5", "name=of_switched", "train.stop_after_steps=1") == 3
    assert metrics(Path("runs/of_switched"))[-1] == metrics(parent)[5], "the plan of that step"


def test_checkpoint_of_another_plan_than_its_folder_says(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint itself stores the plan: a folder with an edited config.yaml is refused too."""
    run = shutil.copytree(parent, tmp_path / "edited")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["precision"]["default"]["hadamard"] = False
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert train(f"resume={run}") == 2
    message = capsys.readouterr().err
    assert "step_00000010" in message and "switch_precision=true" in message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["branch=runs/nowhere@5"], ["runs/nowhere", "no such run"]),
        ([f"branch=runs/{PLAN}@7"], ["step 7", "it has 5, 10"]),
        ([f"branch=runs/{PLAN}"], [f"branch=runs/{PLAN}", "@STEP"]),
        ([f"branch=runs/{PLAN}@last"], ["@STEP"]),
        ([f"branch=runs/{PLAN}@5", f"name={PLAN}"], [f"name={PLAN}", "another name"]),
        ([f"branch=runs/{PLAN}@5", "model.moe.expert_hidden_size=64"], ["expert_hidden_size"]),
        ([f"branch=runs/{PLAN}@5", "train.seed=9"], ["train.seed was 1234, now 9"]),
        ([f"branch=runs/{PLAN}@5", "data.phases.0.blend=[]"], ["data.phases"]),
        ([f"branch=runs/{PLAN}@10"], ["train.total_tokens=2560", "nothing is left"]),
        (
            [f"branch=runs/{PLAN}@5", "precision=fp32", "parallel.distributed_optimizer=false"],
            ["parallel.distributed_optimizer=False", "saved with True"],
        ),
        ([f"branch=runs/{PLAN}@5", f"resume=runs/{PLAN}"], ["resume=", "branch=", "exclude"]),
        ([f"branch=runs/{PLAN}@5", "model=tiny"], ["model=tiny", "branch="]),
        ([f"branch=runs/{PLAN}@5", "precision=fp2"], ["precision=fp2"]),
    ],
)
def test_bad_branch(
    parent: Path, words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that names the knob, no folder left, the parent's bytes unchanged."""
    before, folders = tree(parent), set(Path("runs").iterdir())
    assert train(*words) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    assert all(part in message for part in parts), message
    assert set(Path("runs").iterdir()) == folders
    assert tree(parent) == before


def test_damaged_checkpoint_is_no_start(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(parent, tmp_path / "damaged")
    shard = next((run / "checkpoints" / "step_00000005").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert train(f"branch={run}@5") == 2
    assert shard.name in capsys.readouterr().err
    (run / "lineage.json").write_text('{"switches": [{"step": "x"}]}')
    assert train(f"branch={run}@10") == 2
    assert "lineage.json" in capsys.readouterr().err
