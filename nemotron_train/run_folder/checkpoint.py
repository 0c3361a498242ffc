"""The checkpoint that RUN@STEP names, for every verb: found, verified, and of its run's model.

Owns: the order of the checks and their messages, so that the same folder gives the same line
whichever verb is asked. Does not own: the checks (`integrity`, `folder`, `plan.derive`), loading.
No torch, except to read an index.
"""

import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, DataKind, ModelConfig, ParallelConfig
from nemotron_train.plan.architecture.layers import LayerKind, layers, tensors
from nemotron_train.plan.derive import Derived, derive
from nemotron_train.run_folder.checkpoint_index import model_shapes, read_index
from nemotron_train.run_folder.checkpoint_metadata import changed_model
from nemotron_train.run_folder.folder import read_config
from nemotron_train.run_folder.integrity import damage, step_folder, steps_in
from nemotron_train.run_folder.lineage import parse_branch

# Tensors that a checkpoint stores by component: `mixer.in_proj.weight.z` and so on.
_COMPONENTS = (".z", ".x", ".B", ".C", ".t")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A verified checkpoint: its run folder, step, folder, and the run's configuration there."""

    run: Path
    step: int
    path: Path
    config: Config


def find_checkpoint(text: str, *, contents: bool = True) -> FoundCheckpoint:
    """Find and verify the checkpoint that `text`, RUN@STEP, names.

    Without `contents`, the tensors are not read; `refuse_damaged` and `check_tensors` do it later.
    Raises ConfigError if there is no such run or step (the error lists its steps), if the
    checkpoint is damaged, or if it is not of the model in the run's config.yaml.
    """
    try:
        run, step = parse_branch(text)
    except ConfigError:
        raise ConfigError(f"{text}: give RUN_FOLDER@STEP, such as runs/tiny@100") from None
    if not os.path.isdir(run):
        raise ConfigError(f"{text}: no such run folder {run}")
    steps = steps_in(run / "checkpoints")
    if step not in steps:
        existing = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise ConfigError(f"{text}: {run} has no checkpoint of step {step}; {existing}")
    path = step_folder(run / "checkpoints", step)
    refuse_damaged(path, contents=contents)
    config = read_config(run, step)
    check_own_model(path, config)
    if contents:
        check_tensors(path, config.model)
    return FoundCheckpoint(run, step, path, config)


def refuse_damaged(path: Path, *, contents: bool = True) -> None:
    """Raise ConfigError if the checkpoint in `path` is damaged (`integrity.damage`)."""
    problem = damage(path, contents=contents)
    if problem is not None:
        raise ConfigError(f"{path} is damaged: {problem}")


def check_own_model(path: Path, config: Config) -> None:
    """Raise ConfigError if the run's configuration is impossible or is of another model than its
    checkpoint in `path`, whose JSON files are verified."""
    change = changed_model(path, config.model)
    if change:
        raise ConfigError(f"{path} is not of the model in its run's config.yaml: {change} here")
    try:
        derive_for_inference(config, ParallelConfig(), 1)
    except ConfigError as error:
        raise ConfigError(f"{path.parent.parent / 'config.yaml'}: {error}") from None


def check_tensors(path: Path, model: ModelConfig) -> None:
    """Raise ConfigError unless the undamaged checkpoint in `path` holds the tensors of `model` and
    no others. Compares names and numbers of elements."""
    stored: dict[str, int] = {}
    expected = {tensor.name: prod(tensor.shape) for tensor in tensors(model)}
    for layer in layers(model):
        if layer.kind == LayerKind.moe:
            expected[f"{layer.path}.mlp.router.expert_bias"] = model.moe.experts
    for name, shape in model_shapes(read_index(path)).items():
        base = name[:-2] if name.endswith(_COMPONENTS) and name[:-2] in expected else name
        stored[base] = stored.get(base, 0) + prod(shape)
    for name in sorted(stored.keys() | expected.keys()):
        there, here = (
            f"of {table[name]} numbers" if name in table else "missing"
            for table in (stored, expected)
        )
        if there != here:
            raise ConfigError(
                f"{path} is not of the model in its run's config.yaml: {name:.200} is {there} "
                f"there and {here} here"
            )


def derive_for_inference(
    config: Config, parallel: ParallelConfig, num_ranks: int
) -> tuple[Config, Derived]:
    """The run's configuration and what follows from it on `num_ranks` ranks in the layout
    `parallel`, where every rank processes all tokens.

    Raises ConfigError if the configuration is impossible or the model cannot be sharded this way.
    """
    model = replace(config.model, pattern=config.model.pattern.replace("|", ""))
    train = replace(
        config.train,
        global_batch_tokens=config.train.sequence_length * num_ranks,
        micro_batch_sequences=1,
    )
    config = replace(config, model=model, parallel=parallel, train=train)
    config = replace(config, resume="", branch="", fresh_data=False, weights_only=False)
    # Embedded data skips the data checks: no data is read here, and an imported run has none yet.
    checked = replace(config, data=replace(config.data, kind=DataKind.embedded))
    return config, derive(checked, num_ranks)
