"""`convert to-hf`: exports a checkpoint of any layout for Hugging Face's transformers.

Owns: the files and their content, which finished files are kept. Does not own: the names and the
layout of weights (`mapping`), config.json's fields (`fields`), the tokenizer's files
(`tokenizer_files`), the bytes of a safetensors file (`safetensors_file`). Streams: only one block
of rows as stored in the checkpoint and a small copy are in memory, for any model size.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nemotron_train import __version__
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.quantities import format_bytes
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.convert.checkpoint_tensors import CheckpointReader
from nemotron_train.convert.hugging_face.fields import CONFIG, GENERATION, INDEX, config_fields
from nemotron_train.convert.hugging_face.mapping import Piece, Weight, our_shapes, weights
from nemotron_train.convert.hugging_face.safetensors_file import write_safetensors
from nemotron_train.convert.hugging_face.tokenizer_files import TokenizerFiles
from nemotron_train.convert.unfinished import unfinished
from nemotron_train.platform.files import write_durably
from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.run_folder.folder import read_config
from nemotron_train.run_folder.integrity import MANIFEST, step_folder, steps_in
from nemotron_train.run_folder.lineage import longest_context, parse_branch

COPY_BYTES = 2**24  # converted and written at a time
TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def to_hf(
    checkpoint: str,
    output: Path,
    console: Console,
    *,
    dtype: str = "",
    shard_bytes: int = 5 * 2**30,
    tokenizer: str = "",
) -> None:
    """Writes the checkpoint (RUN@STEP) to the folder `output`: weights in shards of at most
    `shard_bytes` (or one tensor), config.json, generation_config.json, the tokenizer.

    dtype: dtype of the weights, "" for the run's; A_log, D, dt_bias and router biases stay FP32.
    tokenizer: a folder, "" for the run's `data.tokenizer`. After an interruption, a second call
    continues after the last complete shard.

    Raises ConfigError if the checkpoint is missing or damaged, if Hugging Face's model cannot
    represent it, if the tokenizer is not the one used in training, or if `output` exists.
    """
    config, path = _find(checkpoint)
    kind = Dtype(dtype) if dtype else config.precision.parameter_dtype
    files = TokenizerFiles(
        Path(tokenizer or config.data.tokenizer),
        checkpoint_metadata.tokenizer_of(path),
        config.model.vocab_size,
    )
    fields = config_fields(config, kind.value, files.end_of_document_id)
    fields |= _imported_fields(files, path.parent.parent, fields["max_position_embeddings"])
    table = weights(config.model)
    reader = CheckpointReader(path)
    _check_tensors(reader, table)
    shards = _cut(table, TORCH_DTYPES[kind], shard_bytes)
    source = {
        "checkpoint": hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest(),
        "dtype": kind.value,
        "shards": {name: [weight.name for weight in shard] for name, shard in shards.items()},
        "version": __version__,
    }
    with unfinished(output, source, "--out") as making:
        rows = _Rows(reader)
        for name, shard in shards.items():
            if making.kept(name):
                console.print(f"{name}: is there already", highlight=False)
                continue
            digest = write_safetensors(
                making.folder / name,
                [(w.name, w.shape, _dtype(w, TORCH_DTYPES[kind])) for w in shard],
                (rows.values(w, _dtype(w, TORCH_DTYPES[kind])) for w in shard),
            )
            making.done(name, digest)
            size = (making.folder / name).stat().st_size
            console.print(f"{name}: {len(shard)} tensors, {format_bytes(size)}", highlight=False)
        texts: dict[str, Any] = {CONFIG: fields, INDEX: _index(shards, TORCH_DTYPES[kind])}
        ids = {key: fields[key] for key in ("eos_token_id", "pad_token_id")}
        texts[GENERATION] = ids | files.generation
        for name, content in texts.items():
            write_durably(making.folder / name, json.dumps(content, indent=2) + "\n")
        files.write(making.folder)
    console.print(f"wrote {output}", highlight=False, soft_wrap=True)


def _imported_fields(files: TokenizerFiles, run: Path, longest: int) -> dict[str, Any]:
    """Fields of config.json that an imported run brought along: token ids, and the longest context
    if it is longer than the run's own rows."""
    generation = files.generation
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = {name: generation[name] for name in names if name in generation}
    return fields | {"max_position_embeddings": longest_context(run, longest)}


def _find(text: str) -> tuple[Config, Path]:
    """(the run's configuration at that step, checkpoint folder) of RUN@STEP. Raises ConfigError if
    there is no such checkpoint."""
    try:
        run, step = parse_branch(text)
    except ConfigError:
        raise ConfigError(f"{text}: give RUN_FOLDER@STEP, such as runs/tiny@128") from None
    if not run.is_dir():
        raise ConfigError(f"{text}: no such run folder {run}")
    steps = steps_in(run / "checkpoints")
    if step not in steps:
        available = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise ConfigError(f"{text}: {run} has no checkpoint of step {step}; {available}")
    return read_config(run, step), step_folder(run / "checkpoints", step)


def _check_tensors(reader: CheckpointReader, table: list[Weight]) -> None:
    """Raises ConfigError if the checkpoint does not match the model in its run's config.yaml."""
    ours, stored = our_shapes(table), reader.shapes
    names = ours.keys() ^ stored.keys() | {n for n, s in ours.items() if stored.get(n, s) != s}
    if names:
        name = min(names)
        raise ConfigError(
            f"{reader.folder} is not of the model in its run's config.yaml: {name} is "
            f"{stored.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        )


def _dtype(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if weight.keeps_float32 else dtype


def _bytes(weight: Weight, dtype: torch.dtype) -> int:
    return weight.num_elements * _dtype(weight, dtype).itemsize


def _cut(table: list[Weight], dtype: torch.dtype, shard_bytes: int) -> dict[str, list[Weight]]:
    """File name -> its tensors. FP32 tensors come first, so that every tensor is aligned."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in table:
        if shards[-1] and size + _bytes(weight, dtype) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += _bytes(weight, dtype)
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": sorted(
            shard, key=lambda weight: not weight.keeps_float32
        )
        for number, shard in enumerate(shards, start=1)
    }


def _index(shards: dict[str, list[Weight]], dtype: torch.dtype) -> dict[str, Any]:
    places = {weight.name: name for name, shard in shards.items() for weight in shard}
    size = sum(_bytes(weight, dtype) for shard in shards.values() for weight in shard)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}


class _Rows:
    """Values of their tensors, read from our checkpoint. Keeps the last block of rows in memory,
    because the next piece is usually in the same block (experts; query, key and value)."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._held: tuple[tuple[str, int, int], torch.Tensor] | None = None

    def values(self, weight: Weight, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The tensor's values in order, in parts of about COPY_BYTES."""
        for piece in weight.pieces:
            for rows in self._rows(piece):
                step = max(1, COPY_BYTES // max(rows[:1].numel() * 4, 1))
                for part in rows.split(step):
                    yield part.to(dtype)

    def _rows(self, piece: Piece) -> Iterator[torch.Tensor]:
        if piece.groups > 1:
            whole = self._block(piece.name, 0, piece.shape[0])
            yield whole.unflatten(0, (piece.groups, -1))[:, piece.start : piece.stop]
            return
        for start, stop in self._reader.blocks(piece.name):
            if start < piece.stop and piece.start < stop:
                block = self._block(piece.name, start, stop)
                yield block[max(piece.start - start, 0) : min(piece.stop, stop) - start]

    def _block(self, *place: Any) -> torch.Tensor:
        if self._held is None or self._held[0] != place:
            self._held = None  # free it before the next block is read
            self._held = place, self._reader.read_rows(*place)
        return self._held[1]
