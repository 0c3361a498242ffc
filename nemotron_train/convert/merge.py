"""`convert merge`: the weighted mean of checkpoints, as a run folder to branch from.

Owns: which checkpoints can be merged, the resulting folder. Does not own: the weight of each
checkpoint (`merge_weights`), the file format (`checkpoint_tensors`). Streams: only one tensor of
the mean and one of a checkpoint are in memory, for any model size.

The mean uses the FP32 master weights if there are any, and includes every buffer (router biases).
It is stored in FP32. The optimizer state is dropped: its moments do not belong to the merged
weights.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.schema import Config
from nemotron_train.convert.checkpoint_tensors import CheckpointReader, CheckpointWriter
from nemotron_train.convert.merge_weights import MergeConfig, Weights, merge_weights
from nemotron_train.convert.unfinished import unfinished
from nemotron_train.platform.files import check_output_folder, write_durably
from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.run_folder.checkpoint import check_tensors, find_checkpoint
from nemotron_train.run_folder.integrity import (
    MANIFEST,
    commit,
    damage,
    partial_folder,
    step_folder,
)
from nemotron_train.run_folder.lineage import LINEAGE, read_lineage
from nemotron_train.run_folder.progress import Progress

# Files copied unchanged from the latest checkpoint.
FROM_LAST = (
    checkpoint_metadata.PROGRESS,
    checkpoint_metadata.PRECISION,
    checkpoint_metadata.DATA,
    "metadata.json",
)


@dataclass(frozen=True)
class _Source:
    """A checkpoint to merge: as it was named, its folder, its run's configuration, its progress."""

    text: str
    path: Path
    config: Config
    progress: Progress


def merge(checkpoints: Sequence[str], config: MergeConfig, console: Console) -> Path:
    """Merges the checkpoints (each RUN@STEP) into the run folder `config.output`. Returns the new
    checkpoint folder, which has the step and data position of the latest checkpoint.

    Raises ConfigError if a checkpoint is missing or damaged, if they are not of the same model, if
    two have the same token count, or if the output is not set or exists.
    """
    if not config.output:
        raise ConfigError("output is not set: give output=RUN_FOLDER")
    output = Path(config.output)
    found = [find_checkpoint(text, contents=False) for text in checkpoints]
    check_output_folder(output, "output", [source.run for source in found])
    sources = [
        _Source(text, each.path, each.config, checkpoint_metadata.progress_of(each.path))
        for text, each in zip(checkpoints, found, strict=True)
    ]
    sources.sort(key=lambda source: source.progress.tokens)
    for before, after in pairwise(sources):
        if before.progress.tokens == after.progress.tokens:
            raise ConfigError(
                f"{after.text}: another of the checkpoints stands at its token count too"
            )
    tokens = [source.progress.tokens for source in sources]
    weights = merge_weights(config.weights, tokens, config.decay_style)
    texts = _run_files(sources, weights)
    final = step_folder(output / "checkpoints", sources[-1].progress.step)

    def is_complete() -> bool:
        return _has_texts(output, texts) and damage(final) is None

    with unfinished(output, texts, "output", is_complete) as making:
        if making is None:
            console.print(f"{output}: is there already, complete", soft_wrap=True)
            return final
        readers = [_open(source) for source in sources]
        _check_same_model(readers)
        for source, weight in zip(sources, weights, strict=True):
            line = f"{weight:8.5f}  {source.path}  {source.progress.tokens:,} tokens"
            console.print(line)
        step = making.folder / "checkpoints" / final.name
        _write(step, readers, weights, config)
        for name, text in texts.items():
            write_durably(making.folder / name, text)
    console.print(
        f"wrote {final}; go on from it with branch={output}@{sources[-1].progress.step}",
        soft_wrap=True,
    )
    return final


def _open(source: _Source) -> CheckpointReader:
    """The verified checkpoint. Raises ConfigError if it is damaged or of another model than its
    run's config.yaml."""
    reader = CheckpointReader(source.path)
    check_tensors(source.path, source.config.model)
    return reader


def _has_texts(output: Path, texts: Mapping[str, str]) -> bool:
    try:
        return all((output / name).read_bytes() == text.encode() for name, text in texts.items())
    except OSError:
        return False


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
) -> None:
    partial, last = partial_folder(final), readers[-1].folder
    partial.mkdir(parents=True)
    writer = CheckpointWriter(partial)
    for name in readers[0].shapes:
        writer.write(name, _mean(readers, weights, name))
    writer.finish()
    for name in FROM_LAST:
        if (last / name).exists():  # an imported checkpoint has no data.json
            shutil.copyfile(last / name, partial / name)
    about: dict[str, Any] = json.loads((last / checkpoint_metadata.ABOUT).read_text())
    parts = [[str(reader.folder), w] for reader, w in zip(readers, weights, strict=True)]
    style = config.decay_style.value if config.weights == Weights.wsd else ""
    about |= {"optimizer": False, "ranks": 0}
    about |= {"merged": {"weights": config.weights.value, "decay_style": style, "of": parts}}
    write_durably(partial / checkpoint_metadata.ABOUT, json_text(about, indent=1))
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


def _run_files(sources: Sequence[_Source], weights: Sequence[float]) -> dict[str, str]:
    """File name -> text of the latest run's configuration and the lineage, so that runs can branch
    from the folder. The lineage names the checkpoints' manifests, which say what was merged."""
    last = sources[-1].path.parent.parent
    parts = [
        {
            "checkpoint": source.text,
            "weight": weight,
            "manifest": hashlib.sha256((source.path / MANIFEST).read_bytes()).hexdigest(),
        }
        for source, weight in zip(sources, weights, strict=True)
    ]
    lineage = {**read_lineage(last), "merged_from": parts}
    text = (last / "config.yaml").read_text(encoding="utf-8")
    return {"config.yaml": text, LINEAGE: json_text(lineage, indent=2) + "\n"}
