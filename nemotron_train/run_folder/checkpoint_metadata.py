"""The JSON files of a checkpoint: what they contain, and how they are read. No Megatron-Core.

    progress.json    step, tokens, data cursor, model configuration
    precision.json   precision plan (`plan.precision.record`)
    data.json        checksums, blend weights, sequence length, seed, tokenizer
    about.json       whole configuration (also the parallel layout), package versions, ranks
    random.json      random states of every rank (`train.checkpoint.random_states`)

Read them only after `integrity.damage` has verified them against the manifest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.knobs import to_plain
from nemotron_train.config.schema import Config, ModelConfig
from nemotron_train.data.batches import DataState
from nemotron_train.data.fingerprint import REMEDY, changed_data
from nemotron_train.plan.precision.record import UNKNOWN
from nemotron_train.run_folder.checkpoint_json import NO_DATA
from nemotron_train.run_folder.folder import package_versions
from nemotron_train.run_folder.progress import Progress

PROGRESS, PRECISION = "progress.json", "precision.json"
ABOUT, RANDOM, DATA = "about.json", "random.json", "data.json"


def texts_of(
    progress: Progress,
    config: Config,
    plan: Mapping[str, Any],
    data: Mapping[str, Any],
    num_ranks: int,
) -> dict[str, str]:
    """File name -> text of all JSON files except random.json.

    plan: record of the precision plan. data: `BatchSource.description`.
    """
    state = {
        "step": progress.step,
        "tokens": progress.tokens,
        "data": progress.data.to_dict(),
        "model": asdict(config.model),
    }
    about = {
        "versions": package_versions(),
        "ranks": num_ranks,
        "config": to_plain(config),
    }
    contents = {PROGRESS: state, PRECISION: plan, DATA: data, ABOUT: about}
    return {name: json_text(content, indent=1) for name, content in contents.items()}


def has_optimizer(path: Path) -> bool:
    """Whether the checkpoint has optimizer state. One made by `convert merge` does not."""
    return json.loads((path / ABOUT).read_text()).get("optimizer") is not False


def random_text(states: Sequence[Any]) -> str:
    """Text of random.json. states: by rank; equal states are stored once."""
    distinct: list[Any] = []
    for state in states:
        if state not in distinct:
            distinct.append(state)
    return json_text({"states": distinct, "ranks": [distinct.index(state) for state in states]})


def random_state_of(path: Path, rank: int, num_ranks: int) -> Any | None:
    """Random states of `rank`.

    None if the checkpoint was saved with another number of ranks, or has no random.json.
    """
    if not (path / RANDOM).exists():
        return None
    saved = json.loads((path / RANDOM).read_text())
    if len(saved["ranks"]) != num_ranks:
        return None
    return saved["states"][saved["ranks"][rank]]


def plan_of(path: Path) -> dict[str, Any]:
    """Record of the precision plan under which the checkpoint was trained (`plan_record`)."""
    if not (path / PRECISION).exists():  # imported weights, not trained here
        return UNKNOWN
    return json.loads((path / PRECISION).read_text())


def has_data(path: Path) -> bool:
    """Whether the checkpoint records its training data. An imported one does not."""
    return (path / DATA).exists()


def tokenizer_of(path: Path) -> str:
    """SHA-256 of the tokenizer.json of the training data; "" if unknown."""
    return json.loads((path / DATA).read_text())["tokenizer"] if has_data(path) else ""


def check_data(path: Path, now: Mapping[str, Any]) -> None:
    """Raise ConfigError if the data trained on so far differs from the current data.

    now: `BatchSource.description` of the current data. The error names what changed.
    """
    if not has_data(path):
        return
    before = json.loads((path / DATA).read_text())
    problem = changed_data(before, now, progress_of(path).data.phase)
    if problem:
        raise ConfigError(f"{problem}; {path} was trained on the former: {REMEDY}")


def progress_of(path: Path) -> Progress:
    """Progress at the checkpoint, with data cursor `NO_DATA` if it was imported."""
    state = json.loads((path / PROGRESS).read_text())
    data = DataState.from_dict(state["data"]) if has_data(path) else NO_DATA
    return Progress(state["step"], state["tokens"], data)


def check_model(path: Path, model: ModelConfig) -> None:
    """Raise ConfigError if the checkpoint belongs to another model.

    The model's name and the stage boundaries `|` in its pattern may differ.
    """
    change = changed_model(path, model)
    if change:
        raise ConfigError(
            f"{path} holds another model: {change} here; resume with the run's own configuration "
            "or choose another name"
        )


def changed_model(path: Path, model: ModelConfig) -> str:
    """Text for the first field in which `model` differs from the checkpoint's; "" if none does."""
    saved_model = json.loads((path / PROGRESS).read_text())["model"]
    for name, value in asdict(model).items():
        saved_value = saved_model.get(name)
        if name == "pattern" and isinstance(saved_value, str):
            saved_value, value = saved_value.replace("|", ""), value.replace("|", "")
        # Through text: null there is infinity here, and older versions wrote it as Infinity.
        texts = [json_text(one, sort_keys=True) for one in (saved_value, value)]
        if name != "name" and texts[0] != texts[1]:
            return f"model.{name} is {saved_value!s:.200} there and {value!s:.200}"
    return ""
