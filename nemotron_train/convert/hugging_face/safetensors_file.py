"""Safetensors files written a tensor at a time, with their digest, and read some rows at a time.

Owns: the bytes of the format (a length, a JSON header, the tensors; little-endian). Does not own:
what is in it, nor whether a file is sound, which the library says. The library's own writer wants
all tensors at once, and its reader maps the file, all of which then counts as memory.
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

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsReader:
    """One file. Raises ConfigError where the library does not accept it.

    `shapes`, `dtypes` (in the format's words): of every tensor, by name."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt"):  # checks the whole header against the length
                pass
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        header.pop("__metadata__", None)
        self.path = path
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: entry["dtype"] for name, entry in header.items()}
        self._begins = {name: 8 + length + e["data_offsets"][0] for name, e in header.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor of one of DTYPES."""
        dtype, below = DTYPES[self.dtypes[name]], self.shapes[name][1:]
        width = prod(below) * dtype.itemsize
        data = bytearray((stop - start) * width)
        with open(self.path, "rb") as file:
            file.seek(self._begins[name] + start * width)
            if file.readinto(data) != len(data):
                raise ConfigError(f"{self.path}: has changed while it was read")
        return torch.frombuffer(data, dtype=dtype).view(stop - start, *below)


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
    parts: Iterable[Iterator[torch.Tensor]],
) -> str:
    """Write `tensors` (name, shape, dtype); `parts` gives, for each, its values in order, in any
    number of parts of that dtype. The file appears under its name complete and flushed. Returns its
    SHA-256. Wider tensors should come first, so that each lies at a multiple of its width."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        begin, end = end, end + prod(shape) * dtype.itemsize
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, torn = hashlib.sha256(), path.with_name(f"{path.name}.torn")
    with open(torn, "wb") as file:
        for data in (struct.pack("<Q", len(text)), text):
            file.write(data)
            digest.update(data)
        for (name, shape, dtype), values in zip(tensors, parts, strict=True):
            count = 0
            for part in values:
                assert part.dtype == dtype, f"{name} is {part.dtype}"
                data = memoryview(part.contiguous().flatten().view(torch.uint8).numpy())
                file.write(data)
                digest.update(data)
                count += part.numel()
                del part, data  # may be all that holds a block, and the next one is read now
            assert count == prod(shape), f"{name} has {count} numbers, not {prod(shape)}"
        file.flush()
        os.fsync(file.fileno())
    torn.rename(path)
    return digest.hexdigest()
