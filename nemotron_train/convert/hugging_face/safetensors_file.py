"""Writes safetensors files one tensor at a time, with their digest, and reads them by rows.

Owns: the byte format (a length, a JSON header, the tensors; little-endian). Does not own: the
content; the validation of a file, which the safetensors library does. The library's own writer
needs all tensors at once, and its reader maps the whole file, which counts as used memory.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsReader:
    """Reads one file. Raises ConfigError if the safetensors library rejects it.

    `shapes`, `dtypes` (the format's dtype names): tensor name -> value."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt"):  # validates the header against the file size
                pass
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (OSError, SafetensorError, ValueError, struct.error, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        header.pop("__metadata__", None)
        self.path = path
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: entry["dtype"] for name, entry in header.items()}
        self._begins = {name: 8 + length + e["data_offsets"][0] for name, e in header.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor whose dtype is in DTYPES. Raises ConfigError if the file
        has become shorter."""
        dtype, below = DTYPES[self.dtypes[name]], self.shapes[name][1:]
        width = prod(below) * dtype.itemsize
        data = bytearray((stop - start) * width)
        with open(self.path, "rb") as file:
            file.seek(self._begins[name] + start * width)
            if file.readinto(data) != len(data):
                raise ConfigError(f"{self.path}: has changed while it was read")
        return torch.frombuffer(data, dtype=dtype).view(stop - start, *below)


Tensors = Sequence[tuple[str, tuple[int, ...], torch.dtype]]  # name, shape, dtype
Parts = Iterable[Iterator[torch.Tensor]]  # the values of each tensor in order, in any parts


def write_safetensors(path: Path, tensors: Tensors, parts: Parts) -> str:
    """Writes `tensors` with the values in `parts`, of their dtypes, and returns the file's SHA-256.
    The file appears at `path` only when complete and flushed. Put wider dtypes first, so that every
    tensor is aligned to its width."""
    digest, torn = hashlib.sha256(), path.with_name(f"{path.name}.torn")
    with open(torn, "wb") as file:
        for data in _content(tensors, parts):
            file.write(data)
            digest.update(data)
            del data  # free the block before the next one is read
        file.flush()
        os.fsync(file.fileno())
    torn.rename(path)
    return digest.hexdigest()


def safetensors_digest(tensors: Tensors, parts: Parts) -> str:
    """SHA-256 of the file that `write_safetensors` would write."""
    digest = hashlib.sha256()
    for data in _content(tensors, parts):
        digest.update(data)
        del data
    return digest.hexdigest()


def _content(tensors: Tensors, parts: Parts) -> Iterator[bytes | memoryview]:
    """The bytes of the file: length of the header, header, tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        begin, end = end, end + prod(shape) * dtype.itemsize
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json_text(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text))
    yield text
    for (name, shape, dtype), values in zip(tensors, parts, strict=True):
        count = 0
        for part in values:
            assert part.dtype == dtype, f"{name} is {part.dtype}"
            yield memoryview(part.contiguous().flatten().view(torch.uint8).numpy())
            count += part.numel()
            del part  # free the block before the next one is read
        assert count == prod(shape), f"{name} has {count} numbers, not {prod(shape)}"
