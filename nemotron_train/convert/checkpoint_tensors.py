"""Tensors of a checkpoint one at a time, without a model: reading any layout, writing one file.

Owns: torch's distributed format as far as whole tensors and ranges of their rows go. Does not own:
what is done with them (`merge`, `to_hf`, `from_hf`), what makes a checkpoint trustworthy
(`run_folder.integrity`). Nothing is unpickled but through the closed list of names and
`weights_only=True`.
"""

import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

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

from nemotron_train.config.errors import ConfigError
from nemotron_train.run_folder.integrity import METADATA, damage, load_metadata

OPTIMIZER = "optimizer."
MASTER = "optimizer.state.param."
COMMON = "common_state/shard_0_1"  # where Megatron looks for what is no tensor


def shard_name(number: int) -> str:
    """File name of a shard; each holds any number of tensors."""
    return f"__{number}_0.distcp"


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
        return self.read_rows(name, 0, self._tensor(name).size[0])

    def blocks(self, name: str) -> list[tuple[int, int]]:
        """The ranges of rows [start, stop), in order, in which the tensor was saved: reading these
        with `read_rows` reads no chunk twice. One range where the cut is no cut by rows."""
        saved = self._tensor(name)
        ranges = {(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in saved.chunks}
        ordered = sorted(ranges)
        if all(before[1] == after[0] for before, after in pairwise(ordered)):
            return ordered
        return [(0, saved.size[0])]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor `name`, made of `blocks`; otherwise as `read`."""
        saved = self._tensor(name)
        chunks = [c for c in saved.chunks if start <= c.offsets[0] and c.offsets[0] < stop]
        rows = torch.Size([stop - start, *saved.size[1:]])
        if len(chunks) == 1 and chunks[0].sizes == rows:
            return self._read_chunk(name, chunks[0])
        whole = torch.empty(rows, dtype=saved.properties.dtype)
        for chunk in chunks:
            first, *others = zip(chunk.offsets, chunk.sizes, strict=True)
            where = [slice(first[0] - start, first[0] - start + first[1])]
            where += [slice(offset, offset + length) for offset, length in others]
            whole[tuple(where)] = self._read_chunk(name, chunk)
        return whole

    def _stored(self, name: str) -> str:
        return MASTER + name if MASTER + name in self._tensors else name

    def _tensor(self, name: str) -> Any:
        return self._tensors[self._stored(name)]

    def _read_chunk(self, name: str, chunk: Any) -> torch.Tensor:
        place = self._places[MetadataIndex(self._stored(name), chunk.offsets)]
        with open(self.folder / place.relative_path, "rb") as file:
            part: Any = _create_file_view(file, place.offset, place.length)
            return torch.load(part, weights_only=True)


@dataclass(frozen=True)
class Place:
    """Where some rows of a tensor lie; plain values but for the dtype's name."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: str
    first_row: int
    num_rows: int
    shard: int
    offset: int
    length: int


class CheckpointWriter:
    """Writes tensors one after another, whole or in ranges of rows, into shards of a folder that
    Megatron-Core loads under any layout; nothing is held but the tensor at hand.

    `places`: what was written before, by a writer that was cut off."""

    def __init__(self, folder: Path, places: Iterable[Place] = ()) -> None:
        self._folder = folder
        self.places = list(places)
        self._shard = 0
        self._opened: BinaryIO | None = None

    def open_shard(self, number: int) -> None:
        """From here on, write into that shard, anew. The first one needs no opening."""
        self.close_shard()
        self._shard = number
        self._opened = open(self._folder / shard_name(number), "wb")  # noqa: SIM115

    def close_shard(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    @property
    def _file(self) -> BinaryIO:
        if self._opened is None:
            self.open_shard(self._shard)
        assert self._opened is not None
        return self._opened

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        self.write_rows(name, tensor.shape, 0, tensor)

    def write_rows(
        self, name: str, shape: Sequence[int], first_row: int, rows: torch.Tensor
    ) -> None:
        """Append some rows of the tensor `name`, whose `shape` is that of the whole. All rows are
        to be written in the end, each once, all of one dtype."""
        file = self._file
        offset = file.tell()
        if rows.untyped_storage().nbytes() != rows.nbytes or not rows.is_contiguous():
            rows = rows.clone(memory_format=torch.contiguous_format)  # a view is saved whole
        torch.save(rows, file)
        dtype = str(rows.dtype).removeprefix("torch.")
        place = (first_row, rows.shape[0], self._shard, offset, file.tell() - offset)
        self.places.append(Place(name, tuple(shape), dtype, *place))

    def finish(self) -> None:
        """Write what names the tensors; the folder can then be committed."""
        tensors: dict[str, Any] = {}
        where: dict[Any, Any] = {}
        for place in self.places:
            offsets = torch.Size([place.first_row, *[0] * (len(place.shape) - 1)])
            chunk = ChunkStorageMetadata(offsets, torch.Size([place.num_rows, *place.shape[1:]]))
            if place.name not in tensors:
                properties = TensorProperties(getattr(torch, place.dtype))
                tensors[place.name] = TensorStorageMetadata(properties, torch.Size(place.shape), [])
            tensors[place.name].chunks.append(chunk)
            index = MetadataIndex(place.name, offsets)
            where[index] = _StorageInfo(shard_name(place.shard), place.offset, place.length)
        buffer, file = io.BytesIO(), self._file
        torch.save([{}], buffer)
        common = _StorageInfo(shard_name(self._shard), file.tell(), len(buffer.getvalue()))
        file.write(buffer.getvalue())
        tensors[COMMON], where[MetadataIndex(COMMON)] = BytesStorageMetadata(), common
        self.close_shard()
        with open(self._folder / METADATA, "wb") as file:
            pickle.dump(Metadata(tensors, storage_data=where), file)
