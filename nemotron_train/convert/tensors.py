"""Tensors of a checkpoint one at a time, without a model: reading any layout, writing one file.

Owns: torch's distributed format as far as whole tensors go. Does not own: what is done with them
(`merge`), what makes a checkpoint trustworthy (`train.integrity`). Nothing is unpickled but through
the closed list of names and `weights_only=True`.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from nemotron_train.config.schema import ConfigError
from nemotron_train.train.integrity import METADATA, damage, load_metadata

OPTIMIZER = "optimizer."
MASTER = "optimizer.state.param."
COMMON = "common_state/shard_0_1"  # where Megatron looks for what is no tensor
SHARD = "__0_0.distcp"


class CheckpointReader:
    """The model's tensors of an undamaged checkpoint. Raises ConfigError for a damaged one."""

    def __init__(self, folder: Path) -> None:
        problem = damage(folder)
        if problem is not None:
            raise ConfigError(f"{folder} is damaged: {problem}")
        self.folder = folder
        with open(folder / METADATA, "rb") as file:
            metadata = load_metadata(file)
        self._tensors: dict[str, Any] = {
            name: tensor
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self._places: dict[Any, Any] = metadata.storage_data

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the model, the optimizer's left out."""
        return {
            name: tuple(tensor.size)
            for name, tensor in self._tensors.items()
            if not name.startswith(OPTIMIZER)
        }

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`, its FP32 master where the checkpoint has one. Memory: the tensor
        and its largest chunk, or the tensor alone where it was saved in one piece."""
        if MASTER + name in self._tensors:
            name = MASTER + name
        saved = self._tensors[name]
        if len(saved.chunks) == 1:
            return self._read_chunk(name, saved.chunks[0])
        whole = torch.empty(saved.size, dtype=saved.properties.dtype)
        for chunk in saved.chunks:
            where = tuple(
                slice(start, start + length)
                for start, length in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            whole[where] = self._read_chunk(name, chunk)
        return whole

    def _read_chunk(self, name: str, chunk: Any) -> torch.Tensor:
        place = self._places[MetadataIndex(name, chunk.offsets)]
        with open(self.folder / place.relative_path, "rb") as file:
            part: Any = _create_file_view(file, place.offset, place.length)
            return torch.load(part, weights_only=True)


class CheckpointWriter:
    """Writes whole tensors one after another into a folder that Megatron-Core loads under any
    layout; nothing is held but the tensor at hand."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = open(folder / SHARD, "wb")  # noqa: SIM115 - open until `finish`
        self._tensors: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor; it must be contiguous and own its memory."""
        start = torch.Size([0] * tensor.dim())
        self._tensors[name] = TensorStorageMetadata(
            TensorProperties(tensor.dtype),
            tensor.shape,
            [ChunkStorageMetadata(start, tensor.shape)],
        )
        self._append(MetadataIndex(name, start), tensor)

    def _append(self, index: MetadataIndex, value: Any) -> None:
        begin = self._file.tell()
        torch.save(value, self._file)
        self._places[index] = _StorageInfo(SHARD, begin, self._file.tell() - begin)

    def finish(self) -> None:
        """Write what names the tensors; the folder can then be committed."""
        buffer = io.BytesIO()
        torch.save([{}], buffer)
        begin = self._file.tell()
        self._file.write(buffer.getvalue())
        self._tensors[COMMON] = BytesStorageMetadata()
        self._places[MetadataIndex(COMMON)] = _StorageInfo(SHARD, begin, len(buffer.getvalue()))
        self._file.close()
        with open(self._folder / METADATA, "wb") as file:
            pickle.dump(Metadata(self._tensors, storage_data=self._places), file)
