"""What a checkpoint says in plain words: its JSON files, written and read. No Megatron-Core.

    progress.json    step, tokens, the data's cursor, the model precision.json   the precision plan
    it was trained under (`plan.precision.record`) data.json        the data: checksums, blend
    weights, sequence length, seed, tokenizer about.json       the whole configuration, versions of
    the frameworks, ranks and their layout random.json      states of the random generators of every
    rank (`train.checkpoint.random_states`)

Read only after the manifest vouches for them (`integrity.damage`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.knobs import to_plain
from nemotron_train.config.schema import Config, ModelConfig
from nemotron_train.data.batches import DataState
from nemotron_train.data.fingerprint import REMEDY, changed_data
from nemotron_train.plan.precision.record import UNKNOWN
from nemotron_train.run_folder.folder import package_versions
from nemotron_train.run_folder.progress import Progress

PROGRESS, PRECISION = "progress.json", "precision.json"
ABOUT, RANDOM, DATA = "about.json", "random.json", "data.json"
# The cursor of weights that were not trained here: whatever data comes, it begins at its start.
NO_DATA = DataState(split="train", sequence_length=0, seed=0, fingerprint="")


def texts_of(
    progress: Progress,
    config: Config,
    plan: Mapping[str, Any],
    data: Mapping[str, Any],
    num_ranks: int,
) -> dict[str, str]:
    """File name -> content of all that is known before the tensors are written."""
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
    return {name: json.dumps(content, indent=1) for name, content in contents.items()}


def has_optimizer(path: Path) -> bool:
    """Whether the checkpoint in `path` holds the optimizer's state; a merge's does not."""
    return json.loads((path / ABOUT).read_text()).get("optimizer") is not False


def random_text(states: Sequence[Any]) -> str:
    """`random.json`: the states of all ranks, equal ones once."""
    distinct: list[Any] = []
    for state in states:
        if state not in distinct:
            distinct.append(state)
    return json.dumps({"states": distinct, "ranks": [distinct.index(state) for state in states]})


def random_state_of(path: Path, rank: int, num_ranks: int) -> Any | None:
    """The random states that `rank` had; None where the checkpoint is of another number of ranks,
    or of a time before they were saved."""
    if not (path / RANDOM).exists():
        return None
    saved = json.loads((path / RANDOM).read_text())
    if len(saved["ranks"]) != num_ranks:
        return None
    return saved["states"][saved["ranks"][rank]]


def plan_of(path: Path) -> dict[str, Any]:
    """The precision plan under which the checkpoint in `path` was trained (`plan_record`)."""
    if not (path / PRECISION).exists():  # of weights that were not trained here
        return UNKNOWN
    return json.loads((path / PRECISION).read_text())


def has_data(path: Path) -> bool:
    """Whether the checkpoint in `path` was trained on data here; an imported one was not."""
    return (path / DATA).exists()


def tokenizer_of(path: Path) -> str:
    """SHA-256 of the tokenizer.json trained with; "" where that is not known."""
    return json.loads((path / DATA).read_text())["tokenizer"] if has_data(path) else ""


def check_data(path: Path, now: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming what changed, where the data up to the checkpoint in `path` is not
    what `now` (`BatchSource.description`) says."""
    if not has_data(path):
        return
    before = json.loads((path / DATA).read_text())
    problem = changed_data(before, now, progress_of(path).data.phase)
    if problem:
        raise ConfigError(f"{problem}; {path} was trained on the former: {REMEDY}")


def progress_of(path: Path) -> Progress:
    """Where the run stood at the checkpoint in `path`; `NO_DATA` for one that was imported."""
    state = json.loads((path / PROGRESS).read_text())
    data = DataState.from_dict(state["data"]) if has_data(path) else NO_DATA
    return Progress(state["step"], state["tokens"], data)


def check_model(path: Path, model: ModelConfig) -> None:
    """Raises ConfigError when the checkpoint in `path` belongs to another model. Its name and the
    cut of its pattern into stages are no part of it."""
    theirs = json.loads((path / PROGRESS).read_text())["model"]
    for name, ours in asdict(model).items():
        before = theirs.get(name)
        if name == "pattern" and isinstance(before, str):
            before, ours = before.replace("|", ""), ours.replace("|", "")
        if name != "name" and before != json.loads(json.dumps(ours)):
            raise ConfigError(
                f"{path} holds another model: model.{name} is {before} there and {ours} "
                "here; resume with the run's own configuration or choose another name"
            )
