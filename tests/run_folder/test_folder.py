"""The run folder: its content, when a run may continue in it, and that no secret is stored in it.

Not covered: a folder on a file system without locks, several hosts.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.plan.derive import derive
from nemotron_train.platform.files import write_atomically
from nemotron_train.run_folder.folder import RunFolder, open_run_folder


def config_in(folder: Path, *overrides: str) -> Config:
    return compose_config([f"folder={folder}", "name=a", *overrides])


def opened(config: Config, **more: object) -> RunFolder:
    folder = open_run_folder(config, derive(config, 1), "all fp32", **more)  # type: ignore[arg-type]
    folder.close()
    return folder


def test_holds_what_the_contract_says(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    folder = opened(config, command=["nemotron-train", "pretrain"])
    assert folder.path == tmp_path / "a" and folder.is_new
    names = {path.name for path in folder.path.iterdir()}
    assert names == {
        "config.yaml", "derived.yaml", "precision.txt", "environment.json", ".lock"
    }  # fmt: skip
    derived = yaml.safe_load((folder.path / "derived.yaml").read_text())
    assert derived["total_steps"] == derive(config, 1).total_steps
    assert (folder.path / "precision.txt").read_text() == "all fp32\n"
    start = json.loads((folder.path / "environment.json").read_text())["starts"][0]
    assert start["command"] == ["nemotron-train", "pretrain"]
    assert start["versions"]["megatron-core"].startswith("0.19")
    assert start["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    folder.write_summary({"loss": 1.5, "finished": True})
    assert json.loads(folder.summary.read_text()) == {"loss": 1.5, "finished": True}


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    """config.yaml stays unchanged byte for byte. The run keeps its identity. Each start is
    recorded."""
    first = opened(config_in(tmp_path, "train.stop_after_steps=3"))
    before = (first.path / "config.yaml").read_bytes()
    changed = ["train.threads=1", "logging.tensorboard=true", "train.save_every_steps=5"]
    second = opened(config_in(tmp_path, *changed))
    third = opened(compose_config([f"resume={first.path}"]))
    assert (first.path / "config.yaml").read_bytes() == before
    assert not second.is_new and first.run_id == second.run_id == third.run_id
    starts = json.loads((first.path / "environment.json").read_text())["starts"]
    assert len(starts) == 3
    assert starts[1]["changed"] == {
        "train.threads": 1,
        "train.save_every_steps": 5,
        "train.stop_after_steps": 0,
        "logging.tensorboard": True,
    }


@pytest.mark.parametrize(
    ("override", "knob", "old"),
    [
        ("model.hidden_size=384", "model.hidden_size", "192"),
        ("train.seed=9", "train.seed", "1234"),
        ("train.total_tokens=1024000", "train.total_tokens", "262144"),
        ("optim.decay_style=cosine", "optim.decay_style", "'minus_sqrt'"),
        ("data.phases.0.blend.0.weight=2", "data.phases", "'weight': 1.0"),
    ],
)
@pytest.mark.parametrize("by_resume", [False, True])
def test_another_configuration_is_refused_by_name(
    tmp_path: Path, override: str, knob: str, old: str, by_resume: bool
) -> None:
    first = opened(config_in(tmp_path))
    again = compose_config([f"resume={first.path}", override]) if by_resume else None
    with pytest.raises(ConfigError) as refused:
        opened(again or config_in(tmp_path, override))
    message = str(refused.value)
    assert f"{knob} was " in message and old in message and "name=" in message
    assert "\n" not in message


def test_a_knob_that_came_later_does_not_refuse(tmp_path: Path) -> None:
    """A config.yaml of an earlier version lacks the knob: its default was in force then."""
    first = opened(config_in(tmp_path))
    path = first.path / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["optim"]["clip_grad_norm"]
    path.write_text(yaml.safe_dump(stored))
    assert not opened(config_in(tmp_path)).is_new
    with pytest.raises(ConfigError, match=r"optim.clip_grad_norm was 1.0, now 2.0"):
        opened(config_in(tmp_path, "optim.clip_grad_norm=2.0"))


@pytest.mark.parametrize("content", ["model: [", "model: {colour: 3}", "3"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    first = opened(config_in(tmp_path))
    (first.path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        opened(config_in(tmp_path))


def test_a_run_without_its_config_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"without its config\.yaml"):
        opened(config_in(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file is in the way")
    with pytest.raises(ConfigError, match="cannot make"):
        opened(config_in(tmp_path))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """While one process holds the folder another is refused. It is free after a kill."""
    config = config_in(tmp_path)
    code = (
        "import sys, time\n"
        "from nemotron_train.compose.compose import compose_config\n"
        "from nemotron_train.run_folder.folder import open_run_folder\n"
        "config = compose_config([f'folder={sys.argv[1]}', 'name=a'])\n"
        "from nemotron_train.plan.derive import derive\n"
        "folder = open_run_folder(config, derive(config), '')\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process"):
            opened(config)
        holder.kill()
    assert not opened(config).is_new


def test_no_secret_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from the environment nor from the command line. Plain knobs stay readable."""
    monkeypatch.setenv("WANDB_API_KEY", "KEYFROMENVIRONMENT")
    command = [
        "nemotron-train", "pretrain", "train.total_tokens=5", "data.tokenizer=t",
        "logging.wandb_api_key=SECRETONE", "hub_token=SECRETTWO", "hf_abcdefghijklmnopqrstuv",
        "data=https://me:SECRETTHREE@host/x",
    ]  # fmt: skip
    folder = opened(config_in(tmp_path), command=command)
    text = "".join(path.read_text() for path in folder.path.iterdir())
    assert "SECRET" not in text and "KEYFROM" not in text and "hf_abc" not in text
    kept = json.loads((folder.path / "environment.json").read_text())["starts"][0]["command"]
    assert kept[2:4] == ["train.total_tokens=5", "data.tokenizer=t"]


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before the rename leaves the old file."""
    path = tmp_path / "x"
    write_atomically(path, "old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_config_holds_no_resume(tmp_path: Path) -> None:
    """Otherwise a replay would continue the old run."""
    first = opened(config_in(tmp_path))
    moved = first.path.rename(tmp_path / "b")
    opened(compose_config([f"resume={moved}"]))
    stored = yaml.safe_load((moved / "config.yaml").read_text())
    assert stored["resume"] == "" and stored["name"] == "a"
    assert set(stored) == {field.name for field in dataclasses.fields(Config)}
