"""`.metadata`, the index of a checkpoint's tensors: the only pickle, and what it may say.

Owns: the names that the pickle may contain, and the checks that every tensor is whole, lies within
a shard and is what the index says. Does not own: hashes and the manifest (`integrity`), the values
of tensors. Imports torch only to read an index.

The forger of an index may also write correct hashes. A tensor's chunks must therefore tile it
exactly, since a gap would be filled with whatever the memory held.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

METADATA = ".metadata"
SHARD = re.compile(r"__[0-9]+_[0-9]+\.distcp")
OPTIMIZER = "optimizer."  # prefix of the tensors that are not the model's

# All classes and functions that `.metadata` may name, as exact names. A pattern for torch's rebuild
# functions would also match `torch._utils._import_dotted_name`, which imports any module.
METADATA_GLOBALS = {
    ("torch", name) for name in ("Size", "float64", "float32", "float16", "bfloat16", "bool")
}
METADATA_GLOBALS |= {("torch", name) for name in ("uint8", "int8", "int16", "int32", "int64")}
METADATA_GLOBALS |= {("torch.serialization", "_get_layout")}
METADATA_GLOBALS |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
METADATA_GLOBALS |= {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}
METADATA_GLOBALS |= {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
}


class _MetadataUnpickler(pickle.Unpickler):
    """Loads plain data and the classes in METADATA_GLOBALS; refuses all others."""

    def find_class(self, module: str, name: str) -> object:
        # Exact match: pickle resolves dots in a name, so it could lead out of an allowed module.
        if (module, name) in METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in checkpoint metadata")


def load_metadata(file: Any) -> Any:
    """torch's `Metadata` from an open `.metadata` file.

    Raises UnpicklingError for a name that is not in METADATA_GLOBALS.
    """
    return _MetadataUnpickler(file).load()


def read_index(folder: Path) -> Any:
    """torch's `Metadata` of the checkpoint in `folder`. Raises OSError, or UnpicklingError and
    other exceptions of pickle for a file that is damaged or refused."""
    with open(folder / METADATA, "rb") as file:
        return load_metadata(file)


def model_shapes(index: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every model tensor of a checked index, without the optimizer's."""
    return {
        name: tuple(entry.size)
        for name, entry in index.state_dict_metadata.items()
        if hasattr(entry, "chunks") and not name.startswith(OPTIMIZER)
    }


def check_index(index: Any, lengths: Mapping[str, int]) -> None:
    """Raises an exception with a message unless every value lies within a shard of this folder and
    the chunks of every tensor make it up. lengths: bytes of each file of the checkpoint.

    torch appends the path in the index to the folder's path, even if it contains `..`.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    places, unused = index.storage_data, set(index.storage_data)
    for key, place in places.items():
        _check_place(key, place, lengths)
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            keys, lowest = [MetadataIndex(name)], [0]
        else:
            _check_chunks(name, entry)
            keys = [MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
            width = entry.properties.dtype.itemsize
            lowest = [prod(chunk.sizes) * width for chunk in entry.chunks]
        for key, least in zip(keys, lowest, strict=True):
            if key not in places:
                raise ValueError(f"a part of {name!r:.200} is in no file")
            if places[key].length < least:
                raise ValueError(f"{name!r:.200} is said to be in fewer bytes than it has")
            unused.discard(key)
    for key in unused:
        raise ValueError(f"{key.fqn!r:.200} has a place but no shape")


def _check_place(key: Any, place: Any, lengths: Mapping[str, int]) -> None:
    name, start, length = place.relative_path, place.offset, place.length
    if type(name) is not str or not SHARD.fullmatch(name) or name not in lengths:
        raise ValueError(f"{key.fqn!r:.200} is said to lie in {name!r:.200}")
    if type(start) is not int or type(length) is not int:
        raise ValueError(f"{key.fqn!r:.200} has no place in {name}")
    if not 0 <= start <= start + length <= lengths[name]:
        raise ValueError(f"{key.fqn!r:.200} is said to lie outside {name}")
    if place.transform_descriptors:
        raise ValueError(f"{key.fqn!r:.200} is said to be stored in another form")


def _check_chunks(name: Any, entry: Any) -> None:
    """Raises ValueError unless the chunks of a tensor tile it."""
    import torch

    size = list(entry.size)
    boxes = [list(zip(c.offsets, c.sizes, strict=True)) for c in entry.chunks]
    numbers = [*size, *(number for box in boxes for pair in box for number in pair)]
    if type(name) is not str or not isinstance(entry.properties.dtype, torch.dtype):
        raise ValueError(f"{name!r:.200} is no tensor")
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{name!r:.200} has an impossible shape")
    if not _tiles(boxes, size):
        raise ValueError(f"the parts of {name!r:.200} do not make up {tuple(size)}")


def _tiles(boxes: Sequence[Sequence[tuple[int, int]]], size: Sequence[int]) -> bool:
    """Whether boxes, (offset, length) by dimension, fill `size` exactly once. They must be cut by
    the first dimension first, as every sharding of Megatron-Core is."""
    if not size or 0 in size:
        return len(boxes) == 1 and all(len(box) == len(size) for box in boxes)
    rows: dict[tuple[int, int], list[Sequence[tuple[int, int]]]] = {}
    for box in boxes:
        if len(box) != len(size):
            return False
        rows.setdefault(box[0], []).append(box[1:])
    end = 0
    for (start, length), inner in sorted(rows.items()):
        if start != end or length == 0 or not _tiles(inner, size[1:]):
            return False
        end += length
    return end == size[0]


def check_archives(folder: Path, index: Any) -> None:
    """Raises an exception with a message unless every value in the shards can be loaded and is of
    the type, shape and dtype that the checked `index` says. Reads no tensor's values: the cost is
    about 0.3 ms a value."""
    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.utils import _create_file_view

    def load(key: Any, device: str) -> Any:
        place = index.storage_data[key]
        with open(folder / place.relative_path, "rb") as file:
            view: Any = _create_file_view(file, place.offset, place.length)
            return torch.load(view, weights_only=True, map_location=device)

    for name, entry in index.state_dict_metadata.items():
        try:
            if isinstance(entry, BytesStorageMetadata):
                load(MetadataIndex(name), "cpu")
                continue
            for chunk in entry.chunks:
                value = load(MetadataIndex(name, chunk.offsets), "meta")  # without its data
                _check_tensor(value, chunk, entry)
        except Exception as error:
            raise ValueError(f"{name!r:.200} cannot be loaded: {first_line(error)}") from error


def _check_tensor(value: Any, chunk: Any, entry: Any) -> None:
    """Raises ValueError unless a loaded value is the chunk that the index describes."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise ValueError("it is no tensor")
    if value.shape != torch.Size(chunk.sizes) or value.dtype != entry.properties.dtype:
        raise ValueError(
            f"it is {tuple(value.shape)} of {value.dtype}, not {tuple(chunk.sizes)} of "
            f"{entry.properties.dtype}"
        )


def first_line(error: BaseException) -> str:
    """At most 200 characters of the first line of an exception's message, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
