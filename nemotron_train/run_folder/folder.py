"""The run folder: its files, how they are written, and whether a run may continue in it.

Owns: `config.yaml`, `derived.yaml`, `precision.txt`, `environment.json`, `summary.json`, the paths
of the other files, the lock against a second process. Each of these files is complete or absent.
Does not own: the lines of metrics.jsonl (`run_folder.metrics`), checkpoints (`train.checkpoint`),
the contents of lineage.json (`run_folder.lineage`).

Only the first rank opens the folder. It sends the outcome to the other ranks.
"""

import contextlib
import dataclasses
import functools
import json
import platform
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
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.knobs import PHASES, adds_phases, differences, is_free, to_plain
from nemotron_train.config.schema import Config, DataPhase, PrecisionConfig
from nemotron_train.config.secrets import without_secrets
from nemotron_train.config.yaml_file import load_yaml
from nemotron_train.plan.derive import Derived
from nemotron_train.plan.precision.record import plan_record
from nemotron_train.plan.precision.resolve import PrecisionPlan, resolve_plan
from nemotron_train.platform.cores import usable_cores
from nemotron_train.platform.files import write_atomically
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
    """An opened run folder. `run_id` identifies the run in W&B and is kept across resumes."""

    path: Path
    run_id: str
    is_new: bool  # this start created the run
    plan_before: Record | None = None  # the run's plan, if this start changes it and may do so
    adds_phases: bool = False  # this start adds phases to the data blend
    lock: RunLock | None = field(repr=False, default=None)  # held until `close` or process end

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Path of metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """Path of summary.json."""
        return self.path / "summary.json"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json. Values are plain; names are as in docs/metrics.md."""
        write_atomically(self.summary, _to_json(summary))

    def record_switch(
        self, step: int, tokens: int, before: Record, after: Record, precision: PrecisionConfig
    ) -> None:
        """Record in lineage.json that the plan changes from `before` to `after` at `step`.

        precision: the knobs of the new plan.
        """
        knobs = to_plain(precision)
        lineage = with_switch(read_lineage(self.path), step, tokens, before, after, knobs)
        write_atomically(self.path / LINEAGE, _to_json(lineage))

    def record_phases(self, step: int, tokens: int, phases: Sequence[DataPhase]) -> None:
        """Record in lineage.json that the data blend has these `phases` from `step` on."""
        lineage = with_phases(read_lineage(self.path), step, tokens, to_plain(phases))
        write_atomically(self.path / LINEAGE, _to_json(lineage))

    def record_branch(self, parent: Record) -> None:
        """Record in lineage.json the checkpoint that the run began from.

        parent: the entry `branched_from`, as described in `run_folder.lineage`.
        """
        lineage = {"branched_from": dict(parent)} | read_lineage(self.path)
        write_atomically(self.path / LINEAGE, _to_json(lineage))

    def check_held(self) -> None:
        """Raise LostRunFolder if another process has taken over the folder."""
        if self.lock is not None:
            self.lock.check_held()

    def close(self) -> None:
        """Release the lock, so that another process may train here. Process end does it too."""
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
    """Create the run folder, or open it to resume, and write the files that are known at the start.

    command: the command line (default: that of this process). hosts: host names of all ranks
    (default: this host). machine: device and kernels, plain values (docs/metrics.md; default:
    unknown). say: called with a line if the previous process did not release the folder.

    An existing config.yaml is not changed. Every start is added to environment.json.

    Raises ConfigError if the folder cannot be created, belongs to another configuration, or another
    process trains in it.
    """
    knob = "resume" if config.resume else "name"  # the knob to name in error messages
    path = run_path(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = acquire(path)
    except OSError as error:
        raise ConfigError(f"{knob}={path}: cannot make the run folder ({error})") from error
    with contextlib.ExitStack() as on_error:
        on_error.callback(lock.release)
        about = {"hosts": list(hosts) or [socket.gethostname()], "machine": dict(machine or {})}
        opened = _open(path, knob, config, derived, precision_text, command, about)
        on_error.pop_all()
    if lock.took_over:
        say(f"{path}: taken over from {lock.took_over}")
    sweep(path / "checkpoints")
    return dataclasses.replace(opened, lock=lock)


def _open(
    path: Path,
    knob: str,
    config: Config,
    derived: Derived,
    precision_text: str,
    command: Sequence[str] | None,
    about: Mapping[str, Any],
) -> RunFolder:
    """The part of `open_run_folder` that runs while this process holds the lock."""
    config_path = path / "config.yaml"
    # Knobs that concern only this start are not part of the run's configuration.
    run_config = to_plain(dataclasses.replace(config, resume="", switch_precision=False))
    is_new = not config_path.exists()
    changed: dict[str, list[Any]] = {}
    plan_before: Record | None = None
    if is_new:
        if (path / "checkpoints").exists() or (path / "metrics.jsonl").exists():
            raise ConfigError(
                f"{knob}={path}: the folder holds a run without its config.yaml; "
                "put that back or give another name=..."
            )
        write_atomically(config_path, _to_yaml(run_config))
    else:
        stored = read_config(path)
        changed = differences(to_plain(stored), run_config)
        _refuse_another_run(path, changed)
        plan_before = _plan_before(path, stored, config, derived.plan, changed)
    write_atomically(path / "derived.yaml", _to_yaml(to_plain(derived.numbers())))
    write_atomically(path / "precision.txt", precision_text.rstrip("\n") + "\n")
    run_id = _record_start(path / "environment.json", command or sys.argv, about, changed)
    return RunFolder(path, run_id, is_new, plan_before, PHASES in changed)


def run_path(config: Config) -> Path:
    """Path of the run folder of `config`."""
    return Path(config.resume) if config.resume else Path(config.folder) / config.name


# Check that the configuration is that of the stored run --------------------------------------


def _refuse_another_run(path: Path, changed: Mapping[str, Sequence[Any]]) -> None:
    """Raise ConfigError if a knob in `changed` may not change within a run.

    changed: knob -> [stored value, new value]. `_plan_before` checks the precision knobs.
    """
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
    """Raise ConfigError if the run folder of `config` holds a run that `config` cannot resume.

    That is a run with another configuration or another precision plan. Writes nothing.
    """
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
    """The plan of the stored run if `plan` differs from it, else None.

    plan: the plan of `config`. Raises ConfigError if the plans differ without
    `switch_precision=true`.
    """
    knobs = [knob for knob in changed if knob.startswith("precision.")]
    if not knobs:
        return None
    before, after = plan_record(resolve_plan(stored)), plan_record(plan)
    if before["digest"] == after["digest"]:
        return None
    if config.switch_precision:
        return before
    old, new = changed[knobs[0]]
    detail = "" if "precision.name" in knobs else f" ({knobs[0]} was {old!r}, now {new!r})"
    raise ConfigError(refusal(path, before, after, path, detail))


def read_config(folder: Path, before_step: int | None = None) -> Config:
    """The configuration of a run: its config.yaml plus the changes recorded in lineage.json.

    before_step: apply only changes made before this step. Knobs that config.yaml does not have get
    their defaults. Raises ConfigError if config.yaml cannot be read or does not fit this version.
    """
    path = folder / "config.yaml"
    try:
        loaded = load_yaml(path, str(folder), Config, resolvers=False)
        apply_recorded(loaded, folder, before_step)
        merged = OmegaConf.merge(OmegaConf.structured(Config), loaded)
        return cast(Config, OmegaConf.to_object(merged))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is no configuration of this version ({reason})") from error


# Contents of the files -----------------------------------------------------------------------


def _record_start(
    path: Path,
    command: Sequence[str],
    about: Mapping[str, Any],
    changed: Mapping[str, Sequence[Any]],
) -> str:
    """Add this start to environment.json; return the run id.

    about: hosts and machine of this start. changed: knob -> [stored value, new value].
    """
    earlier = read_json(path)
    run_id = earlier.get("run_id") or uuid.uuid4().hex[:12]
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [without_secrets(word) for word in command],
        "changed": {knob: values[1] for knob, values in changed.items()},
        **about,
        "git": _git_state(),
        "versions": {"python": platform.python_version()} | package_versions(),
        "platform": platform.platform(),
        "cores": usable_cores(),
    }
    starts = [*earlier.get("starts", []), start]
    write_atomically(path, _to_json({"run_id": run_id, "starts": starts}))
    return run_id


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; {} if the file is missing, unreadable or no object."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of the installed PACKAGES, read without importing them.

    Cached, because every checkpoint stores them.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> dict[str, Any]:
    """Commit of the checkout that this package runs from; {} for an installed wheel."""
    package = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        # Fails for a wheel installed inside another project's checkout: its commit is not ours.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": git("status", "--porcelain", "--untracked-files=no") != "",
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _to_json(value: Any) -> str:
    return json_text(to_plain(value), indent=2, ensure_ascii=False) + "\n"
