"""Checkpoints: Megatron-Core's distributed format inside a shell of trust of our own.

A checkpoint is a folder `step_00000100/`, complete or absent: written under another name,
listed in `manifest.json` with the SHA-256 of every file, flushed, and renamed into place. The
newest is found by scanning folders whose manifest holds, by step number, never by a pointer or
a modification time; a damaged one is named and the one before it is used. A folder that is not
exactly named like a step is never touched.

Saved: weights, optimizer, router biases (buffers of the model), the data's cursor, what the model
was and under which precision plan it was trained (`precision.json`). Weights are the parameters
and their FP32 masters, never quantized, so any plan can go on from them. Training draws no random
numbers after initialization, and stochastic rounding's words are a function of the step, so there
are no random states to save. Shards carry global names and offsets: another layout can load them.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron_train.config.schema import ConfigError, ModelConfig
from nemotron_train.data.batches import DataState
from nemotron_train.optim.build import load_optimizer_state
from nemotron_train.precision.record import UNKNOWN
from nemotron_train.train.loop import Progress

STEP_FOLDER = re.compile(r"step_(\d{8})")
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
PRECISION = "precision.json"

# What Megatron's torch_dist `.metadata` (a pickle) may name; anything else is refused unread.
METADATA_GLOBALS = re.compile(
    r"(torch\.distributed\.checkpoint\.(metadata|planner|filesystem)\..*"
    r"|torch\.(Size|device|strided|float\d+|bfloat16|u?int\d+|bool)"
    r"|torch\.serialization\._get_layout|torch\._utils\._.*|torch\.memory_format"
    r"|collections\.OrderedDict|builtins\.(set|frozenset|slice|bytearray)"
    r"|pathlib\.(Posix|Windows|Pure\w*)?Path|_codecs\.encode)"
)


class _NamesOnly(pickle.Unpickler):
    """Loads plain data and the metadata classes of torch's checkpoints; refuses the rest."""

    def find_class(self, module: str, name: str) -> object:
        if METADATA_GLOBALS.fullmatch(f"{module}.{name}"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in checkpoint metadata")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, in one line; None when nothing is."""
    try:
        listed: dict[str, str] = json.loads((folder / MANIFEST).read_text())["sha256"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(present ^ set(listed)):
        return f"{name} is {'not listed' if name in present else 'missing'}"
    for name, expected in listed.items():
        if (folder / name).is_symlink() or _sha256(folder / name) != expected:
            return f"{name} has changed since it was written"
    try:
        with open(folder / ".metadata", "rb") as file:
            _NamesOnly(file).load()
    except Exception as error:
        return f".metadata is refused: {error}"
    return None


def steps_in(folder: Path) -> list[int]:
    """Steps of all checkpoints under `folder`, damaged ones included, ascending."""
    if not folder.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def step_folder(folder: Path, step: int) -> Path:
    """`folder`/step_00000100."""
    return folder / f"step_{step:08d}"


def latest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint under `folder`; damaged newer ones are named with `say`."""
    for step in reversed(steps_in(folder)):
        path = step_folder(folder, step)
        problem = damage(path)
        if problem is None:
            return path
        say(f"{path}: {problem}; using the checkpoint before it")
    return None


def plan_of(path: Path) -> dict[str, Any]:
    """The precision plan under which the checkpoint in `path` was trained (`plan_record`)."""
    if not (path / PRECISION).exists():  # saved before checkpoints knew their plan
        return UNKNOWN
    return json.loads((path / PRECISION).read_text())


def progress_of(path: Path) -> Progress:
    """Where the run stood at the checkpoint in `path`."""
    state = json.loads((path / PROGRESS).read_text())
    return Progress(state["step"], state["tokens"], DataState.from_dict(state["data"]))


def check_model(path: Path, model: ModelConfig) -> None:
    """Raises ConfigError when the checkpoint in `path` belongs to another model."""
    theirs = json.loads((path / PROGRESS).read_text())["model"]
    for name, ours in asdict(model).items():
        if name != "name" and theirs.get(name) != json.loads(json.dumps(ours)):
            raise ConfigError(
                f"{path} holds another model: model.{name} is {theirs.get(name)} there and {ours} "
                "here; resume with the run's own configuration or choose another name"
            )


class Checkpoints:
    """Saves and loads the run's checkpoints; every method is COLLECTIVE."""

    def __init__(
        self,
        folder: Path,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        groups: ProcessGroupCollection,
        model_config: ModelConfig,
        plan: dict[str, Any],
        keep: int,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._keep, self._say = folder, keep, say
        self._model, self._optimizer = model, optimizer
        self._model_config, self._plan = model_config, plan
        self._metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": groups.dp_cp,
        }

    def _sharded_state(self, is_loading: bool) -> dict:
        core: Any = self._model.module
        model_state = core.sharded_state_dict(metadata=self._metadata)
        return {
            "model": model_state,
            "optimizer": self._optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=self._metadata
            ),
        }

    def save(self, progress: Progress) -> Path:
        """Write the checkpoint of `progress` and drop those past the newest `keep`."""
        final = step_folder(self._folder, progress.step)
        partial = self._folder / f".{final.name}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self._sharded_state(is_loading=False), str(partial))
        if dist.get_rank() == 0:
            state = {
                "step": progress.step,
                "tokens": progress.tokens,
                "data": progress.data.to_dict(),
                "model": asdict(self._model_config),
            }
            _write_durably(partial / PRECISION, json.dumps(self._plan, indent=1))
            _write_durably(partial / PROGRESS, json.dumps(state, indent=1))
            sums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
            _write_durably(partial / MANIFEST, json.dumps({"sha256": sums}, indent=1))
            _sync_folder(partial)
            if final.exists():  # saved before by a process that was cut off after this step
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(self._folder)
            self._drop_old()
        dist.barrier()
        return final

    def _drop_old(self) -> None:
        """Keep the newest `keep` undamaged checkpoints; damaged ones take up no place."""
        kept = 0
        for step in reversed(steps_in(self._folder)):
            path = step_folder(self._folder, step)
            if kept >= self._keep:
                shutil.rmtree(path)
            elif (path / MANIFEST).exists():
                kept += 1

    def load(self, path: Path) -> Progress:
        """Load the checkpoint in `path` into model and optimizer.

        Raises ConfigError when it belongs to another model.
        """
        check_model(path, self._model_config)
        loaded: Any = dist_checkpointing.load(self._sharded_state(is_loading=True), str(path))
        self._model.module.load_state_dict(loaded["model"])
        load_optimizer_state(self._optimizer, loaded["optimizer"])
        return progress_of(path)
