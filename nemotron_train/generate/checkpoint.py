"""Opens a checkpoint for inference: the model with its precision plan, and the tokenizer.

Owns: resolving `RUN` or `RUN@STEP` to a checkpoint, the inference layout. Does not own: the
checkpoint's format (`train.checkpoint`), decoding (`engine`).

The precision plan is the one active at the checkpoint's step, with one difference: NVFP4 scales the
activations of each token separately, so that a token's result does not depend on the other tokens
of the batch (docs/generate.md describes the effect).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, ParallelConfig
from nemotron_train.data.manifest import FILE_NAME as MANIFEST
from nemotron_train.data.manifest import load_manifest
from nemotron_train.data.tokenize import GENERATION, LoadedTokenizer, end_token_ids, load_tokenizer
from nemotron_train.generate.knobs import ModelKnobs, check_model_knobs
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.platform.device import Platform
from nemotron_train.platform.runtime import Runtime, start_runtime
from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.run_folder.checkpoint import (
    check_own_model,
    check_tensors,
    derive_for_inference,
    find_checkpoint,
)
from nemotron_train.run_folder.folder import read_config
from nemotron_train.run_folder.integrity import steps_in
from nemotron_train.run_folder.lineage import parse_run


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """The run and checkpoint that `RUN` or `RUN@STEP` names, before anything is loaded."""

    folder: Path
    checkpoint: Path | None  # None: the newest undamaged one
    config: Config  # of the run, with the inference layout
    plan: PrecisionPlan


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's model on this rank, in evaluation mode, with its configuration and groups."""

    model: Any  # NemotronModel
    config: Config  # of the run, with the inference layout
    groups: Any
    platform: Platform
    checkpoint: Path
    precision: Any  # NativePrecision or PrecisionControl

    @property
    def is_first_rank(self) -> bool:
        """Whether this process prints and writes files for all ranks."""
        return os.environ.get("RANK", "0") == "0"


def resolve_checkpoint(run: str, knobs: ModelKnobs) -> ResolvedCheckpoint:
    """Resolve `run` to a run folder, a checkpoint and a configuration for the ranks of this launch.

    Loads nothing. Raises ConfigError if the run or step does not exist, or if the model cannot be
    sharded over these ranks.
    """
    check_model_knobs(knobs)
    folder, step = parse_run(run)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if step is not None:
        found = find_checkpoint(f"{folder}@{step}")
        config, plan = _inference_layout(found.config, knobs, num_ranks)
        return ResolvedCheckpoint(folder, found.path, config, plan)
    if not os.path.isdir(folder):
        raise ConfigError(f"{run}: no such run folder; give RUN_FOLDER or RUN_FOLDER@STEP")
    if not steps_in(folder / "checkpoints") and not (folder / "checkpoints").is_symlink():
        raise ConfigError(f"{folder}: has no checkpoint yet")
    config, plan = _inference_layout(read_config(folder), knobs, num_ranks)
    return ResolvedCheckpoint(folder, None, config, plan)


@contextmanager
def open_checkpoint(
    run: str, knobs: ModelKnobs, say: Callable[[str], None]
) -> Iterator[LoadedCheckpoint]:
    """Load the model of `RUN` (its newest undamaged checkpoint) or `RUN@STEP`. COLLECTIVE over the
    ranks of this launch.

    say: prints one line. Raises ConfigError if the run, the step or a checkpoint does not exist, or
    if the model cannot be sharded over these ranks.
    """
    resolved = resolve_checkpoint(run, knobs)
    runtime = start_runtime(resolved.config, resolved.plan, knobs.threads, say, trains=False)
    groups = runtime.start_ranks(resolved.config.parallel)
    try:
        yield _load(resolved, runtime, groups, say)
    finally:
        runtime.stop_ranks()


def _load(
    resolved: ResolvedCheckpoint, runtime: Runtime, groups: Any, say: Callable[[str], None]
) -> LoadedCheckpoint:
    from nemotron_train.assemble.build import build_chunks
    from nemotron_train.precision.attach import PrecisionControl
    from nemotron_train.precision.native import NativePrecision
    from nemotron_train.train.checkpoint.checkpoints import agreed_latest, load_weights

    config, plan = resolved.config, resolved.plan
    platform, native = runtime.platform, runtime.backend.native
    checkpoint = resolved.checkpoint or agreed_latest(resolved.folder / "checkpoints", say)
    if checkpoint is None:
        raise ConfigError(f"{resolved.folder}: has no checkpoint yet")
    if resolved.checkpoint is None:
        check_own_model(checkpoint, config)
        check_tensors(checkpoint, config.model)
    (model,) = build_chunks(config, plan, platform, groups, native)
    if platform.device != "cpu":
        model = model.to(platform.device)
    load_weights(checkpoint, [model], groups, config.model)
    _check_finite(model, checkpoint)
    model.eval()
    progress = checkpoint_metadata.progress_of(checkpoint)
    if native:
        precision = NativePrecision([model], plan)
    else:
        precision = PrecisionControl([model], config, plan, groups)
        precision.before_step(progress.step, progress.tokens)
        precision.set_per_token_scales(True)
    return LoadedCheckpoint(model, config, groups, platform, checkpoint, precision)


def _check_finite(model: Any, checkpoint: Path) -> None:
    """Raises ConfigError, naming the first weight that holds NaN or infinity. One pass over the
    weights: a value outside the routed experts of a text would otherwise show late or never."""
    import torch

    for name, weight in model.named_parameters():
        if weight.numel() and not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
            raise ConfigError(
                f"{checkpoint}: {name} is not finite; the checkpoint is damaged or training had "
                "diverged: take an earlier checkpoint (RUN_FOLDER@STEP)"
            )


def _inference_layout(
    config: Config, knobs: ModelKnobs, num_ranks: int
) -> tuple[Config, PrecisionPlan]:
    """The run's configuration and precision plan for inference on `num_ranks` ranks: no pipeline,
    context or data parallelism, so every rank processes all tokens.

    Raises ConfigError if the model cannot be sharded this way.
    """
    sharing_ranks = max(knobs.tensor, knobs.expert * knobs.expert_tensor)
    if num_ranks % knobs.tensor or num_ranks % (knobs.expert * knobs.expert_tensor):
        raise ConfigError(
            f"tensor={knobs.tensor} expert={knobs.expert} expert_tensor={knobs.expert_tensor}: "
            f"must divide the {num_ranks} ranks of this launch"
        )
    if num_ranks > sharing_ranks:
        raise ConfigError(
            f"{num_ranks} ranks of which tensor={knobs.tensor} expert={knobs.expert} "
            f"expert_tensor={knobs.expert_tensor} use {sharing_ranks}: every rank decodes every "
            "sequence, so start no more ranks than share the model"
        )
    parallel = ParallelConfig(
        tensor=knobs.tensor,
        expert=knobs.expert,
        expert_tensor=knobs.expert_tensor,
        sequence=knobs.tensor > 1,
    )
    config, derived = derive_for_inference(config, parallel, num_ranks)
    return replace(config, parallel=replace(parallel, sequence=False)), derived.plan


def open_tokenizer(
    loaded: LoadedCheckpoint, knobs: ModelKnobs
) -> tuple[LoadedTokenizer, tuple[int, ...]]:
    """The checkpoint's tokenizer, and the ids that end a text, the end-of-document id first.

    Raises ConfigError if the tokenizer is missing, is not the one of training, or has more ids than
    the model.
    """
    folder = Path(knobs.tokenizer or loaded.config.data.tokenizer)
    if not knobs.tokenizer and not folder.is_dir():
        raise ConfigError(
            f"{folder}: the run's tokenizer is not here (paths count from where you stand); give "
            "tokenizer=FOLDER"
        )
    tokenizer = load_tokenizer(folder)
    trained_sha256 = checkpoint_metadata.tokenizer_of(loaded.checkpoint)
    if trained_sha256 and trained_sha256 != tokenizer.sha256:
        raise ConfigError(
            f"tokenizer={folder}: is not the one that {loaded.checkpoint} was trained with "
            f"(SHA-256 {tokenizer.sha256[:12]}, then {trained_sha256[:12]})"
        )
    if tokenizer.vocab_size > loaded.config.model.vocab_size:
        raise ConfigError(
            f"tokenizer={folder}: has {tokenizer.vocab_size} ids, the model "
            f"{loaded.config.model.vocab_size}"
        )
    ends = end_token_ids(tokenizer, folder)
    if (folder.parent / MANIFEST).is_file():
        manifest = load_manifest(folder.parent)
        if manifest.tokenizer.sha256 == tokenizer.sha256:  # the documents ended so in training
            listed = ends if (folder / GENERATION).is_file() else ()
            ends = tuple(dict.fromkeys((manifest.tokenizer.end_of_document_id, *listed)))
    return tokenizer, ends
