"""`convert to-hf`: exports a checkpoint of any layout for Hugging Face's transformers.

Owns: the files and their content, which finished files are kept. Does not own: the names and the
layout of weights (`mapping`), config.json's fields (`fields`), the tokenizer's files
(`tokenizer_files`), the bytes of a safetensors file (`safetensors_file`). Streams: only one block
of rows as stored in the checkpoint and a small copy are in memory, for any model size.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nemotron_train import __version__
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.config.quantities import format_bytes
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.convert.checkpoint_tensors import CheckpointReader
from nemotron_train.convert.hugging_face.fields import CONFIG, GENERATION, INDEX, config_fields
from nemotron_train.convert.hugging_face.mapping import Piece, Weight, our_shapes, weights
from nemotron_train.convert.hugging_face.safetensors_file import (
    Parts,
    Tensors,
    safetensors_digest,
    write_safetensors,
)
from nemotron_train.convert.hugging_face.tokenizer_files import TokenizerFiles
from nemotron_train.convert.unfinished import unfinished
from nemotron_train.platform.files import check_output_folder, file_sha256, write_durably
from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.run_folder.checkpoint import check_tensors, find_checkpoint
from nemotron_train.run_folder.integrity import MANIFEST
from nemotron_train.run_folder.lineage import longest_context

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
    found = find_checkpoint(checkpoint, contents=False)
    config, path = found.config, found.path
    check_output_folder(output, "--out", [found.run])
    kind = Dtype(dtype) if dtype else config.precision.parameter_dtype
    files = TokenizerFiles(
        Path(tokenizer or config.data.tokenizer),
        checkpoint_metadata.tokenizer_of(path),
        config.model.vocab_size,
    )
    fields = config_fields(config, kind.value, files.end_of_document_id)
    fields |= _imported_fields(files, found.run, fields["max_position_embeddings"])
    table = weights(config.model)
    shards = _cut(table, TORCH_DTYPES[kind], shard_bytes)
    source = {
        "checkpoint": hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest(),
        "dtype": kind.value,
        "shards": {name: [weight.name for weight in shard] for name, shard in shards.items()},
        "version": __version__,
    }
    ids = {key: fields[key] for key in ("eos_token_id", "pad_token_id")}
    texts: dict[str, Any] = {CONFIG: fields, GENERATION: ids | files.generation}
    texts[INDEX] = _index(shards, TORCH_DTYPES[kind])
    small = files.contents() | {
        name: (json_text(content, indent=2) + "\n").encode() for name, content in texts.items()
    }

    def is_complete() -> bool:
        if not _has_files(output, small, shards):
            return False
        rows = _Rows(_open(path, config, table))
        return all(
            safetensors_digest(*rows.shard(shard, TORCH_DTYPES[kind])) == file_sha256(output / name)
            for name, shard in shards.items()
        )

    with unfinished(output, source, "--out", is_complete) as making:
        if making is None:
            console.print(f"{output}: is there already, complete", soft_wrap=True)
            return
        rows = _Rows(_open(path, config, table))
        for name, shard in shards.items():
            if making.kept(name):
                console.print(f"{name}: is there already")
                continue
            digest = write_safetensors(making.folder / name, *rows.shard(shard, TORCH_DTYPES[kind]))
            making.done(name, digest)
            size = format_bytes((making.folder / name).stat().st_size)
            console.print(f"{name}: {len(shard)} tensors, {size}")
        for name, content in small.items():
            write_durably(making.folder / name, content)
    console.print(f"wrote {output}", soft_wrap=True)


def _open(path: Path, config: Config, table: list[Weight]) -> CheckpointReader:
    """The verified checkpoint. Raises ConfigError if it is damaged or of another model than its
    run's config.yaml."""
    reader = CheckpointReader(path)
    check_tensors(path, config.model)
    _check_tensors(reader, table)
    return reader


def _has_files(output: Path, small: Mapping[str, bytes], shards: Collection[str]) -> bool:
    """Whether `output` holds these small files, equal in every byte, the shards, and no more."""
    try:
        names = {path.name for path in output.iterdir()}
        return names == {*small, *shards} and all(
            (output / name).read_bytes() == content for name, content in small.items()
        )
    except OSError:
        return False


def _imported_fields(files: TokenizerFiles, run: Path, longest: int) -> dict[str, Any]:
    """Fields of config.json that an imported run brought along: token ids, and the longest context
    if it is longer than the run's own rows."""
    generation = files.generation
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = {name: generation[name] for name in names if name in generation}
    return fields | {"max_position_embeddings": longest_context(run, longest)}


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

    def shard(self, shard: Sequence[Weight], dtype: torch.dtype) -> tuple[Tensors, Parts]:
        """Names, shapes and dtypes of a shard's tensors, and their values."""
        tensors = [(weight.name, weight.shape, _dtype(weight, dtype)) for weight in shard]
        return tensors, (self.values(weight, _dtype(weight, dtype)) for weight in shard)

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
