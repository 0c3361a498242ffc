"""`branch=RUN@STEP`: checks for a new run that starts from the checkpoint of another run.

Owns: which checkpoint `branch` names, whether the new configuration can continue from it, the
record of the parent in lineage.json. Does not own: loading the checkpoint (`train.trainer`), the
files of the new run (`folder`), the syntax of `branch=` (`lineage`). The parent's folder is only
read. The checks run before the folder of the new run is created.
"""

import hashlib
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.knobs import changed_knobs
from nemotron_train.config.schema import Config
from nemotron_train.data.batches import BatchSource
from nemotron_train.plan.precision.record import plan_record
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.run_folder.checkpoint import find_checkpoint
from nemotron_train.run_folder.checkpoint_metadata import (
    check_data,
    check_model,
    has_data,
    has_optimizer,
    plan_of,
    progress_of,
)
from nemotron_train.run_folder.folder import read_config, read_json, run_path
from nemotron_train.run_folder.integrity import MANIFEST, steps_in
from nemotron_train.run_folder.lineage import brief, parse_branch


def branch_checkpoint(branch: str, *, contents: bool = True) -> Path:
    """Path of the checkpoint that `branch` names.

    Raises ConfigError if the run does not exist, if it has no such step (the error lists its
    steps), or if the checkpoint is damaged. Without `contents`, the damage check does not read the
    tensors.
    """
    try:
        return find_checkpoint(branch, contents=contents).path
    except ConfigError as error:
        raise ConfigError(f"branch={branch}: {error}") from None


def check_branch(
    config: Config, plan: PrecisionPlan, train_data: BatchSource
) -> dict[str, Any] | None:
    """Check the parent; return the entry `branched_from` for lineage.json.

    None if the new run already has a checkpoint and so no longer needs its parent.

    Raises ConfigError like `branch_checkpoint`, and also if the new run is in its parent's folder,
    if the model differs, if the optimizer state is stored in another format, if the data trained on
    so far differs, or if no tokens are left to train.
    """
    checkpoint = check_parent(config)
    if checkpoint is None:
        return None
    run, step = parse_branch(config.branch)
    parent = read_config(run, step)
    progress = progress_of(checkpoint)
    if has_data(checkpoint) and not (config.fresh_data or config.weights_only):
        check_data(checkpoint, train_data.description)
        train_data.take(progress.data, 0)  # raises ConfigError if the cursor does not fit
    return {
        "run": str(run),
        "step": step,
        "tokens": progress.tokens,
        "run_id": read_json(run / "environment.json").get("run_id", ""),
        "checkpoint": hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest(),
        "precision": {"before": brief(plan_of(checkpoint)), "after": brief(plan_record(plan))},
        "changed": changed_knobs(parent, config),
    }


def check_parent(config: Config, *, contents: bool = True) -> Path | None:
    """The checks of `check_branch` that need no data; return the parent's checkpoint.

    Without `contents`, tensors are not read. None and ConfigError as in `check_branch`.
    """
    path = run_path(config)
    run, step = parse_branch(config.branch)
    if path.resolve() == run.resolve():
        raise ConfigError(f"name={config.name}: is the run to branch from; give another name")
    if steps_in(path / "checkpoints"):
        return None
    checkpoint = branch_checkpoint(config.branch, contents=contents)
    check_model(checkpoint, config.model)
    parent = read_config(run, step)
    sharded, was_sharded = (c.parallel.distributed_optimizer for c in (config, parent))
    # The optimizer state has another checkpoint format if it is sharded over ranks.
    if sharded != was_sharded and has_optimizer(checkpoint) and not config.weights_only:
        raise ConfigError(
            f"parallel.distributed_optimizer={sharded}: the optimizer's state in {checkpoint} was "
            f"saved with {was_sharded} and cannot be loaded otherwise; leave it"
        )
    progress = progress_of(checkpoint)
    if progress.tokens >= config.train.total_tokens and not config.weights_only:
        raise ConfigError(
            f"branch={config.branch}: the checkpoint stands at {progress.tokens} tokens and "
            f"train.total_tokens={config.train.total_tokens}, so nothing is left to train; branch "
            "from an earlier step or give more tokens"
        )
    return checkpoint
