"""Reads and writes the tensors of a checkpoint one at a time, without a model. Reads any layout.

Owns: torch's distributed checkpoint format, for whole tensors and ranges of their rows. Does not
own: the use of the tensors (`merge`, `to_hf`, `from_hf`), the integrity of a checkpoint
(`run_folder.integrity`). Unpickles only with a closed list of names or with `weights_only=True`.
"""

import io
import pickle
import sys
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
from nemotron_train.run_folder.checkpoint import refuse_damaged
from nemotron_train.run_folder.checkpoint_index import (
    METADATA,
    first_line,
    model_shapes,
    read_index,
)

MASTER = "optimizer.state.param."
COMMON = "common_state/shard_0_1"  # where Megatron-Core looks for objects that are not tensors


def shard_name(number: int) -> str:
    """File name of a shard. A shard holds any number of tensors."""
    return f"__{number}_0.distcp"


class CheckpointReader:
    """Reads the model tensors of a checkpoint. Raises ConfigError if the checkpoint is damaged.

    `shapes`: name -> shape of every model tensor, without the optimizer's."""

    def __init__(self, folder: Path) -> None:
        refuse_damaged(folder)
        self.folder = folder
        index = read_index(folder)
        self._tensors: dict[str, Any] = {
            name: tensor
            for name, tensor in index.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self._places: dict[Any, Any] = index.storage_data
        self.shapes = model_shapes(index)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor `name`, from its FP32 master weights if the checkpoint has them. Memory:
        the tensor plus its largest chunk, or the tensor alone if it was saved in one piece."""
        return self.read_rows(name, 0, self._tensor(name).size[0])

    def blocks(self, name: str) -> list[tuple[int, int]]:
        """The row ranges [start, stop), ascending, in which the tensor was saved. Reading these
        ranges with `read_rows` reads no chunk twice. One range if the tensor is not split by rows
        alone."""
        saved = self._tensor(name)
        ranges = {(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in saved.chunks}
        ordered = sorted(ranges)
        if all(before[1] == after[0] for before, after in pairwise(ordered)):
            return ordered
        return [(0, saved.size[0])]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor `name`; the range must consist of whole `blocks`.
        Otherwise as `read`."""
        saved = self._tensor(name)
        chunks = [c for c in saved.chunks if start <= c.offsets[0] and c.offsets[0] < stop]
        rows = torch.Size([stop - start, *saved.size[1:]])
        if len(chunks) == 1 and chunks[0].sizes == rows:
            return self._read_chunk(name, chunks[0])
        whole = torch.empty(rows, dtype=saved.properties.dtype)
        for chunk in chunks:
            first, *others = zip(chunk.offsets, chunk.sizes, strict=True)
            target = [slice(first[0] - start, first[0] - start + first[1])]
            target += [slice(offset, offset + length) for offset, length in others]
            whole[tuple(target)] = self._read_chunk(name, chunk)
        return whole

    def _stored(self, name: str) -> str:
        """Name of the FP32 master weights if there are any, else `name`."""
        return MASTER + name if MASTER + name in self._tensors else name

    def _tensor(self, name: str) -> Any:
        return self._tensors[self._stored(name)]

    def _read_chunk(self, name: str, chunk: Any) -> torch.Tensor:
        place = self._places[MetadataIndex(self._stored(name), chunk.offsets)]
        with open(self.folder / place.relative_path, "rb") as file:
            part: Any = _create_file_view(file, place.offset, place.length)
            try:
                return torch.load(part, weights_only=True)
            except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                raise ConfigError(
                    f"{self.folder}: cannot be loaded: {name}: {first_line(error)}"
                ) from error


@dataclass(frozen=True)
class Place:
    """Location of some rows of a tensor in a shard, as JSON-serializable values."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: str
    first_row: int
    num_rows: int
    shard: int
    offset: int
    length: int


class CheckpointWriter:
    """Writes tensors one by one, whole or in row ranges, into the shards of a folder that
    Megatron-Core can load under any layout. Holds only the current tensor in memory.

    `places`: rows that an interrupted writer has already written."""

    def __init__(self, folder: Path, places: Iterable[Place] = ()) -> None:
        self._folder = folder
        self.places = list(places)
        self._shard = 0
        self._opened: BinaryIO | None = None

    def open_shard(self, number: int) -> None:
        """Starts an empty shard for the following writes. Shard 0 is opened automatically."""
        self.close_shard()
        self._shard = number
        self._opened = open(self._folder / shard_name(number), "wb")  # noqa: SIM115

    def close_shard(self) -> None:
        """Closes the current shard file, if one is open."""
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
        """Appends a whole tensor."""
        self.write_rows(name, tensor.shape, 0, tensor)

    def write_rows(
        self, name: str, shape: Sequence[int], first_row: int, rows: torch.Tensor
    ) -> None:
        """Appends some rows of the tensor `name`. `shape`: shape of the whole tensor. Every row
        must be written exactly once, all with the same dtype."""
        file = self._file
        offset = file.tell()
        if rows.untyped_storage().nbytes() != rows.nbytes or not rows.is_contiguous():
            rows = rows.clone(
                memory_format=torch.contiguous_format
            )  # saving a view would save its whole storage
        torch.save(rows, file)
        dtype = str(rows.dtype).removeprefix("torch.")
        place = (first_row, rows.shape[0], self._shard, offset, file.tell() - offset)
        self.places.append(Place(name, tuple(shape), dtype, *place))

    def finish(self) -> None:
        """Writes the checkpoint metadata. After that the folder can be committed."""
        tensors: dict[str, Any] = {}
        storage: dict[Any, Any] = {}
        for place in self.places:
            # A pickle says which equal strings are one object. A writer that goes on from the
            # places of another has read them again, and must write the same bytes.
            name = sys.intern(place.name)
            offsets = torch.Size([place.first_row, *[0] * (len(place.shape) - 1)])
            chunk = ChunkStorageMetadata(offsets, torch.Size([place.num_rows, *place.shape[1:]]))
            if name not in tensors:
                properties = TensorProperties(getattr(torch, place.dtype))
                tensors[name] = TensorStorageMetadata(properties, torch.Size(place.shape), [])
            tensors[name].chunks.append(chunk)
            index = MetadataIndex(name, offsets)
            storage[index] = _StorageInfo(shard_name(place.shard), place.offset, place.length)
        buffer, file = io.BytesIO(), self._file
        torch.save([{}], buffer)
        common = _StorageInfo(shard_name(self._shard), file.tell(), len(buffer.getvalue()))
        file.write(buffer.getvalue())
        tensors[COMMON], storage[MetadataIndex(COMMON)] = BytesStorageMetadata(), common
        self.close_shard()
        with open(self._folder / METADATA, "wb") as file:
            pickle.dump(Metadata(tensors, storage_data=storage), file)
