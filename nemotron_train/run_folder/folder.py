"""The run folder: which files it holds, how they are written, and whether a run may go on in it.

Owns: `config.yaml`, `derived.yaml`, `precision.txt`, `environment.json`, `summary.json`, the paths
of the other files, the lock that keeps a second process out. Every file is complete or absent. Does
not own: the lines of metrics.jsonl (`run_folder.metrics`), checkpoints (`train.checkpoint`), what
lineage.json says (`run_folder.lineage`).

Only one rank opens the folder; it tells the others.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.knobs import PHASES, adds_phases, differences, is_free, to_plain
from nemotron_train.config.schema import Config, DataPhase, PrecisionConfig
from nemotron_train.plan.derive import Derived
from nemotron_train.plan.precision.record import plan_record
from nemotron_train.plan.precision.resolve import PrecisionPlan, resolve_plan
from nemotron_train.run_folder.integrity import sweep
from nemotron_train.run_folder.lineage import (
    LINEAGE,
    Record,
    apply_recorded,
    read_lineage,
    refusal,
    with_phases,
    with_switch,
)
from nemotron_train.run_folder.lock import RunLock, acquire

PACKAGES = (
    "nemotron-train",
    "torch",
    "megatron-core",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "numpy",
    "hydra-core",
    "omegaconf",
    "datasets",
    "tokenizers",
    "safetensors",
    "wandb",
)


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder. `run_id` is its identity for W&B, kept over resumes."""

    path: Path
    run_id: str
    is_new: bool  # nobody trained in it before
    plan_before: Record | None = None  # the precision plan that this start is allowed to change
    adds_phases: bool = False  # this start adds phases to the blend
    lock: RunLock | None = field(repr=False, default=None)  # held until the process ends

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces summary.json: plain values, names as in docs/metrics.md."""
        write_atomically(self.summary, _to_json(summary))

    def record_switch(
        self, step: int, tokens: int, before: Record, after: Record, precision: PrecisionConfig
    ) -> None:
        """From `step` on the run is trained under the plan `after`: `precision`'s knobs."""
        knobs = to_plain(precision)
        lineage = with_switch(read_lineage(self.path), step, tokens, before, after, knobs)
        write_atomically(self.path / LINEAGE, _to_json(lineage))

    def record_phases(self, step: int, tokens: int, phases: Sequence[DataPhase]) -> None:
        """From `step` on the run knows these phases of the blend."""
        lineage = with_phases(read_lineage(self.path), step, tokens, to_plain(phases))
        write_atomically(self.path / LINEAGE, _to_json(lineage))

    def record_branch(self, parent: Record) -> None:
        """The run began from another run's checkpoint; `parent` as `run_folder.lineage` has it."""
        lineage = {"branched_from": dict(parent)} | read_lineage(self.path)
        write_atomically(self.path / LINEAGE, _to_json(lineage))

    def check_held(self) -> None:
        """Raises LostRunFolder where another process has taken the folder over."""
        if self.lock is not None:
            self.lock.check_held()

    def close(self) -> None:
        """Lets another process train in the folder; the end of this process does it too."""
        if self.lock is not None:
            self.lock.release()


def open_run_folder(
    config: Config,
    derived: Derived,
    precision_text: str,
    *,
    command: Sequence[str] | None = None,
    hosts: Sequence[str] = (),
    machine: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> RunFolder:
    """Makes the run's folder, or opens it to go on, and writes all that is known at the start.

    `command`: the words typed (default: this process's).
    `hosts`: the machines of all ranks (default: this one). `machine`: what computes, plain values
    (docs/metrics.md; default: not known). An existing config.yaml stays as it was
    first asked; each start is added to environment.json. `say` hears of a holder that went away.

    Raises ConfigError when the folder cannot be made, belongs to another configuration, or another
    process is training in it.
    """
    asked = "resume" if config.resume else "name"
    path = run_path(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = acquire(path)
    except OSError as error:
        raise ConfigError(f"{asked}={path}: cannot make the run folder ({error})") from error
    with contextlib.ExitStack() as on_error:
        on_error.callback(lock.release)
        about = {"hosts": list(hosts) or [socket.gethostname()], "machine": dict(machine or {})}
        opened = _open(path, asked, config, derived, precision_text, command, about)
        on_error.pop_all()
    if lock.took_over:
        say(f"{path}: taken over from {lock.took_over}")
    sweep(path / "checkpoints")
    return dataclasses.replace(opened, lock=lock)


def _open(
    path: Path,
    asked: str,
    config: Config,
    derived: Derived,
    precision_text: str,
    command: Sequence[str] | None,
    about: Mapping[str, Any],
) -> RunFolder:
    """`open_run_folder` once the folder is this process's."""
    config_path = path / "config.yaml"
    # What is asked of this process alone is no part of the run.
    wanted = to_plain(dataclasses.replace(config, resume="", switch_precision=False))
    is_new = not config_path.exists()
    changed: dict[str, list[Any]] = {}
    plan_before: Record | None = None
    if is_new:
        if (path / "checkpoints").exists() or (path / "metrics.jsonl").exists():
            raise ConfigError(
                f"{asked}={path}: the folder holds a run without its config.yaml; "
                "put that back or give another name=..."
            )
        write_atomically(config_path, _to_yaml(wanted))
    else:
        stored = read_config(path)
        changed = differences(to_plain(stored), wanted)
        _refuse_another_run(path, changed)
        plan_before = _plan_before(path, stored, config, derived.plan, changed)
    write_atomically(path / "derived.yaml", _to_yaml(to_plain(derived.numbers())))
    write_atomically(path / "precision.txt", precision_text.rstrip("\n") + "\n")
    run_id = _record_start(path / "environment.json", command or sys.argv, about, changed)
    return RunFolder(path, run_id, is_new, plan_before, PHASES in changed)


def run_path(config: Config) -> Path:
    """Where the run folder of `config` lies."""
    return Path(config.resume) if config.resume else Path(config.folder) / config.name


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader, or a crash, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# The same run, or another one? --------------------------------------------------------------


def _refuse_another_run(path: Path, changed: Mapping[str, Sequence[Any]]) -> None:
    fixed = [
        knob
        for knob, (old, new) in changed.items()
        if not (is_free(knob) or knob.startswith("precision.") or adds_phases(knob, old, new))
    ]
    if not fixed:
        return
    shown = ", ".join(f"{k} was {changed[k][0]!r}, now {changed[k][1]!r}" for k in fixed[:3])
    more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
    raise ConfigError(
        f"{path} holds a run of another configuration: {shown}{more}; "
        f"give a new name=..., or resume={path} without these knobs"
    )


def refuse_another_run(config: Config, plan: PrecisionPlan) -> None:
    """Raises ConfigError where the run folder of `config` holds a run of another configuration or
    under another precision plan; nothing is written."""
    path = run_path(config)
    if (path / "config.yaml").exists():
        stored = read_config(path)
        changed = differences(to_plain(stored), to_plain(config))
        _refuse_another_run(path, changed)
        _plan_before(path, stored, config, plan, changed)


def _plan_before(
    path: Path,
    stored: Config,
    config: Config,
    plan: PrecisionPlan,
    changed: Mapping[str, Sequence[Any]],
) -> Record | None:
    """The stored run's plan if `config`, under `plan`, is allowed to change it. Raises ConfigError
    if it is not."""
    knobs = [knob for knob in changed if knob.startswith("precision.")]
    if not knobs:
        return None
    before, now = plan_record(resolve_plan(stored)), plan_record(plan)
    if before["digest"] == now["digest"]:
        return None
    if config.switch_precision:
        return before
    was, is_now = changed[knobs[0]]
    detail = "" if "precision.name" in knobs else f" ({knobs[0]} was {was!r}, now {is_now!r})"
    raise ConfigError(refusal(path, before, now, path, detail))


def read_config(folder: Path, before_step: int | None = None) -> Config:
    """What a run folder's config.yaml asks, with the defaults of knobs that came later and what
    lineage.json says was changed since (before a step). Raises ConfigError."""
    path = folder / "config.yaml"
    try:
        loaded = cast(DictConfig, OmegaConf.load(path))
        apply_recorded(loaded, folder, before_step)
        merged = OmegaConf.merge(OmegaConf.structured(Config), loaded)
        return cast(Config, OmegaConf.to_object(merged))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is no configuration of this version ({reason})") from error


# What the files say -------------------------------------------------------------------------


def _record_start(
    path: Path,
    command: Sequence[str],
    about: Mapping[str, Any],
    changed: Mapping[str, Sequence[Any]],
) -> str:
    """Adds this start to environment.json, `about` its machines; returns the run's id."""
    earlier = read_json(path)
    run_id = earlier.get("run_id") or uuid.uuid4().hex[:12]
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_without_secrets(word) for word in command],
        "changed": {knob: values[1] for knob, values in changed.items()},
        **about,
        "git": _git_state(),
        "versions": {"python": platform.python_version()} | package_versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
    starts = [*earlier.get("starts", []), start]
    write_atomically(path, _to_json({"run_id": run_id, "starts": starts}))
    return run_id


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small file of a run folder; {} where there is none."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of what a result depends on, where it is installed; nothing is imported. Read once:
    every checkpoint names them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any]:
    """Commit of the checkout this package runs from; empty for an installed wheel."""
    package = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # A wheel inside somebody else's checkout must not report that one's commit.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": git("status", "--porcelain", "--untracked-files=no") != "",
        }
    except (OSError, subprocess.SubprocessError):
        return {}


SECRET_NAME = re.compile(r"(api_?key|secret|password|passwd|credential|auth|_token$|^token$)", re.I)
SECRET_VALUE = re.compile(r"(hf_|ghp_|sk-)[A-Za-z0-9_-]{16,}|\b[0-9a-f]{40}\b|(?<=://)[^/@\s]+@")


def _without_secrets(word: str) -> str:
    """A word of the command line fit to be kept: what looks like a key is blotted out."""
    name, equals, _ = word.partition("=")
    if equals and SECRET_NAME.search(name.rpartition(".")[2]):
        return f"{name}=***"
    return SECRET_VALUE.sub("***", word)


def _to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _to_json(value: Any) -> str:
    return json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n"
