"""`convert merge`: the weighted mean of checkpoints, as a run folder to branch from.

Owns: which checkpoints can be merged, the resulting folder. Does not own: the weight of each
checkpoint (`merge_weights`), the file format (`checkpoint_tensors`). Streams: only one tensor of
the mean and one of a checkpoint are in memory, for any model size.

The mean uses the FP32 master weights if there are any, and includes every buffer (router biases).
It is stored in FP32. The optimizer state is dropped: its moments do not belong to the merged
weights.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nemotron_train.config.errors import ConfigError
from nemotron_train.convert.checkpoint_tensors import CheckpointReader, CheckpointWriter
from nemotron_train.convert.merge_weights import MergeConfig, Weights, merge_weights
from nemotron_train.platform.files import write_atomically, write_durably
from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.run_folder.branch import branch_checkpoint
from nemotron_train.run_folder.integrity import commit, partial_folder, step_folder
from nemotron_train.run_folder.lineage import LINEAGE, parse_branch, read_lineage
from nemotron_train.run_folder.progress import Progress

# Files copied unchanged from the latest checkpoint.
FROM_LAST = (
    checkpoint_metadata.PROGRESS,
    checkpoint_metadata.PRECISION,
    checkpoint_metadata.DATA,
    "metadata.json",
)


def merge(checkpoints: Sequence[str], config: MergeConfig, console: Console) -> Path:
    """Merges the checkpoints (each RUN@STEP) into the run folder `config.output`. Returns the new
    checkpoint folder, which has the step and data position of the latest checkpoint.

    Raises ConfigError if a checkpoint is missing or damaged, if they are not of the same model, if
    two have the same token count, or if the output is not set or exists.
    """
    if not config.output:
        raise ConfigError("output is not set: give output=RUN_FOLDER")
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"output={output}: is there already; give another")
    sources = sorted(
        ((branch_checkpoint(text), text) for text in checkpoints),
        key=lambda source: checkpoint_metadata.progress_of(source[0]).tokens,
    )
    progress = [checkpoint_metadata.progress_of(path) for path, _ in sources]
    for before, after, (_, text) in zip(progress, progress[1:], sources[1:], strict=False):
        if before.tokens == after.tokens:
            raise ConfigError(f"{text}: another of the checkpoints stands at its token count too")
    readers = [CheckpointReader(path) for path, _ in sources]
    _check_same_model(readers)
    tokens = [place.tokens for place in progress]
    weights = merge_weights(config.weights, tokens, config.decay_style)
    for (path, _), place, weight in zip(sources, progress, weights, strict=True):
        console.print(f"{weight:8.5f}  {path}  {place.tokens:,} tokens", highlight=False)
    final = step_folder(output / "checkpoints", progress[-1].step)
    try:
        _write(final, readers, weights, config, progress[-1])
        _make_run_folder(output, parse_branch(sources[-1][1])[0], sources, weights)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    console.print(
        f"wrote {final}; go on from it with branch={output}@{progress[-1].step}",
        highlight=False,
        soft_wrap=True,
    )
    return final


def _check_same_model(readers: Sequence[CheckpointReader]) -> None:
    """Raises ConfigError if names or shapes of tensors differ."""
    first = readers[0]
    for other in readers[1:]:
        names = first.shapes.keys() ^ other.shapes.keys()
        names |= {n for n, shape in first.shapes.items() if other.shapes.get(n) != shape}
        if names:
            name = min(names)
            raise ConfigError(
                f"{other.folder} holds another model than {first.folder}: {name} is "
                f"{other.shapes.get(name, 'missing')} there and {first.shapes.get(name, 'missing')}"
                " here"
            )


def _write(
    final: Path,
    readers: Sequence[CheckpointReader],
    weights: Sequence[float],
    config: MergeConfig,
    progress: Progress,
) -> None:
    partial, last = partial_folder(final), readers[-1].folder
    partial.mkdir(parents=True)
    writer = CheckpointWriter(partial)
    for name in readers[0].shapes:
        writer.write(name, _mean(readers, weights, name))
    writer.finish()
    for name in FROM_LAST:
        if name == checkpoint_metadata.DATA and not checkpoint_metadata.has_data(last):
            continue
        shutil.copyfile(last / name, partial / name)
    about: dict[str, Any] = json.loads((last / checkpoint_metadata.ABOUT).read_text())
    parts = [[str(reader.folder), w] for reader, w in zip(readers, weights, strict=True)]
    style = config.decay_style.value if config.weights == Weights.wsd else ""
    about |= {"optimizer": False, "ranks": 0}
    about |= {"merged": {"weights": config.weights.value, "decay_style": style, "of": parts}}
    write_durably(partial / checkpoint_metadata.ABOUT, json.dumps(about, indent=1))
    commit(final, {}, lambda: None)


def _mean(readers: Sequence[CheckpointReader], weights: Sequence[float], name: str) -> torch.Tensor:
    """Weighted mean of a tensor in FP32. A tensor that is not floating-point is taken from the
    latest checkpoint."""
    mean: torch.Tensor | None = None
    for reader, weight in zip(reversed(readers), reversed(weights), strict=True):
        tensor = reader.read(name)
        if not tensor.is_floating_point():
            return tensor
        if mean is None:
            mean = tensor.float().mul_(weight)
        else:
            mean.add_(tensor, alpha=weight)
        del tensor
    assert mean is not None
    return mean


def _make_run_folder(
    output: Path, last: Path, sources: Sequence[tuple[Path, str]], weights: Sequence[float]
) -> None:
    """Writes the latest run's configuration and the lineage, so that runs can branch from the
    folder."""
    write_atomically(output / "config.yaml", (last / "config.yaml").read_text())
    parts = [{"checkpoint": t, "weight": w} for (_, t), w in zip(sources, weights, strict=True)]
    lineage = {**read_lineage(last), "merged_from": parts}
    write_atomically(output / LINEAGE, json.dumps(lineage, indent=2) + "\n")
