"""Which checkpoints can be trusted: hashes, damage, the newest good one, which may be dropped.

Owns: `manifest.json` of a checkpoint, `checkpoints.jsonl` of a run folder, the allow list for the
one pickle in a checkpoint, names and removal of checkpoint folders. Does not own: what the tensors
are (`checkpoint`), nor when a checkpoint is written. No torch until a `.metadata` is read.

    RUN/checkpoints.jsonl                 step, the manifest's SHA-256, time: a line a checkpoint
    RUN/checkpoints/step_00000100/        complete or absent
        manifest.json                     SHA-256 and length of every other file; written last
        .metadata, metadata.json, __R_N.distcp   Megatron-Core's distributed format
        progress.json, precision.json …   ours
    RUN/checkpoints/.step_00000100.partial    being written, never read
    RUN/checkpoints/.step_00000100.dropped    being removed, never read

Trust goes from the run folder down: its record vouches for the manifest, the manifest for every
file, and only a file that is vouched for is parsed. docs/decisions/0005 has the reasons.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.platform.files import flush_to_disk

STEP_FOLDER = re.compile(r"step_([0-9]{8})")
LEFTOVER = re.compile(r"\.step_[0-9]{8}\.(partial|dropped)")
MANIFEST, RECORD = "manifest.json", "checkpoints.jsonl"
METADATA = ".metadata"
SHARD = re.compile(r"__[0-9]+_[0-9]+\.distcp")
# Every file a checkpoint may hold besides shards. Not common.pt: Megatron would load it first.
OWN_FILES = {MANIFEST, METADATA, "metadata.json"} | {
    f"{name}.json" for name in ("progress", "precision", "about", "data", "random")
}
FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 64 * 2**20

# All that `.metadata` names, by full name. No patterns: `torch._utils._import_dotted_name` would
# fit one for torch's rebuilding functions, and it imports whatever it is told.
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


class _ListedNames(pickle.Unpickler):
    """Loads plain data and the metadata classes of torch's checkpoints; refuses the rest."""

    def find_class(self, module: str, name: str) -> object:
        # Exact names: a name with dots in it would be walked, out of an allowed module.
        if (module, name) in METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in checkpoint metadata")


def load_metadata(file: Any) -> Any:
    """torch's `Metadata` from an open `.metadata`. Raises UnpicklingError for any other name."""
    return _ListedNames(file).load()


# Reading ------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """Steps of all checkpoints under `folder`, damaged ones included, ascending. What is not a
    folder itself, a symbolic link for instance, is none."""
    if not _is_folder(folder):
        return []
    with os.scandir(folder) as entries:
        matches = [
            STEP_FOLDER.fullmatch(entry.name)
            for entry in entries
            if entry.is_dir(follow_symlinks=False)
        ]
    return sorted(int(match[1]) for match in matches if match)


def step_folder(folder: Path, step: int) -> Path:
    """`folder`/step_00000100."""
    return folder / f"step_{step:08d}"


def latest(
    folder: Path, say: Callable[[str], None], verified: set[int] | None = None
) -> Path | None:
    """The newest undamaged checkpoint under `folder`, None where there is no checkpoint at all.

    Found by step number and content, never by a pointer or a time. Damaged newer ones are named
    with `say`; the steps that were read whole are added to `verified`. Raises ConfigError where
    every checkpoint is damaged: training from the beginning would not be what was asked.
    """
    if folder.is_symlink():
        raise ConfigError(f"{folder}: is a symbolic link; checkpoints are not read through one")
    first_problem, steps = "", steps_in(folder)
    for step in reversed(steps):
        path = step_folder(folder, step)
        problem = damage(path)
        if problem is None:
            if verified is not None:
                verified.add(step)
            return path
        first_problem = first_problem or f"{path.name}: {problem}"
        if step != steps[0]:
            say(f"{path}: {problem}; using the checkpoint before it")
    if steps:
        raise ConfigError(
            f"{folder}: no checkpoint in it is undamaged ({first_problem}); restore one, or "
            "move the folder away to train from the beginning"
        )
    return None


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with the checkpoint in `folder`, in one line; None when nothing is.

    Without `contents` only what costs no reading: the manifest and its record, names, kinds and
    lengths of the files. Opens nothing but regular files of the folder itself and runs no code
    found in them.
    """
    try:
        if not _is_folder(folder.parent) or not _is_folder(folder):
            return "is not a folder, or is reached through a symbolic link"
        content = _read_plain(folder / MANIFEST, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror or error})"
    recorded = recorded_manifests(folder.parent)
    if recorded is not None:
        digest, known = hashlib.sha256(content).hexdigest(), recorded.get(_step_of(folder), set())
        if digest not in known:
            return f"{MANIFEST} is not the one that {RECORD} of the run folder records"
    try:
        sums, lengths = _parse_manifest(content, _step_of(folder))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({str(error).splitlines()[0][:200]})"
    return _damaged_file(folder, sums, lengths, contents)


def _step_of(folder: Path) -> int:
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _parse_manifest(content: bytes, step: int) -> tuple[dict[str, str], dict[str, int]]:
    """File name -> SHA-256, and -> length. Raises ValueError, KeyError or TypeError."""
    raw = json.loads(content)
    if raw["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version is {raw['format_version']!r}, not {FORMAT_VERSION}")
    if raw["step"] != step:
        raise ValueError(f"it belongs to step {raw['step']!r}")
    sums, lengths = raw["sha256"], raw["bytes"]
    if set(sums) != set(lengths):
        raise ValueError("its two lists name other files")
    for name in sums:
        if not (name in OWN_FILES or SHARD.fullmatch(name)) or name == MANIFEST:
            raise ValueError(f"{name!r} is no file of a checkpoint")
    return sums, lengths


def _damaged_file(
    folder: Path, sums: Mapping[str, str], lengths: Mapping[str, int], contents: bool
) -> str | None:
    try:
        with os.scandir(folder) as entries:
            present = {entry.name: entry for entry in entries if entry.name != MANIFEST}
        for name in sorted(set(present) ^ set(sums)):
            return f"{name!r} is {'not listed' if name in present else 'missing'}"
        for name in sorted(sums):
            status = present[name].stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != lengths[name]:
                return f"{name} has {status.st_size} bytes instead of {lengths[name]}"
        if not contents:
            return None
        for name in sorted(sums):
            if file_sha256(folder / name) != sums[name]:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    try:
        with open(folder / METADATA, "rb") as file:
            _check_places(load_metadata(file), lengths)
    except Exception as error:
        return f"{METADATA} is refused: {error}"
    return None


def _check_places(metadata: Any, lengths: Mapping[str, int]) -> None:
    """Every tensor lies in a shard of this folder, within its length: torch joins the path it
    finds here to the folder's, `..` and all."""
    for index, place in metadata.storage_data.items():
        name, start, length = place.relative_path, place.offset, place.length
        if type(name) is not str or not SHARD.fullmatch(name) or name not in lengths:
            raise ValueError(f"{index.fqn} is said to lie in {name!r}")
        if type(start) is not int or type(length) is not int:
            raise ValueError(f"{index.fqn} has no place in {name}")
        if not 0 <= start <= start + length <= lengths[name]:
            raise ValueError(f"{index.fqn} is said to lie outside {name}")


def recorded_manifests(folder: Path) -> dict[int, set[str]] | None:
    """Step -> digests of manifests that the run wrote for it; None where the run folder keeps no
    record (a checkpoint that was copied out of its run). Lines that cannot be read vouch for
    nothing."""
    path = folder.parent / RECORD
    try:
        lines = _read_plain(path, MAX_MANIFEST_BYTES).splitlines()
    except FileNotFoundError:
        return None
    except OSError:
        return {}
    found: dict[int, set[str]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            found.setdefault(entry["step"], set()).add(entry["manifest"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _read_plain(path: Path, limit: int) -> bytes:
    """A regular file's content, no link followed. Raises OSError, also for one that is longer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        if status.st_size > limit:
            raise OSError(f"it has {status.st_size} bytes")
        return file.read()


# Writing ------------------------------------------------------------------------------------


def file_sha256(path: Path, *, flush: bool = False) -> str:
    """Digest of a file; with `flush` its content is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if flush:
            os.fsync(descriptor)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    """A new file, flushed."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def partial_folder(final: Path) -> Path:
    """Where the checkpoint `final` is written until it is complete."""
    return final.with_name(f".{final.name}.partial")


def commit(final: Path, sums: Mapping[str, str], check_held: Callable[[], None]) -> None:
    """Make the checkpoint in `partial_folder(final)` visible as `final`.

    `sums`: digests of files that were hashed already; the others are hashed here. `check_held`
    raises if this process may no longer write in the run folder. Everything is on the disk before
    the rename, and the record before that: a crash leaves the checkpoint absent, or complete and
    vouched for. Raises OSError.
    """
    partial, step = partial_folder(final), _step_of(final)
    names = sorted(path.name for path in partial.iterdir() if path.name != MANIFEST)
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "sha256": {
            name: sums.get(name) or file_sha256(partial / name, flush=True) for name in names
        },
        "bytes": {name: (partial / name).stat().st_size for name in names},
    }
    text = json.dumps(manifest, indent=1)
    write_durably(partial / MANIFEST, text)
    flush_to_disk(partial)
    check_held()
    record = {"step": step, "manifest": hashlib.sha256(text.encode()).hexdigest()}
    record["time"] = round(time.time(), 3)
    with open(final.parent.parent / RECORD, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    flush_to_disk(final.parent.parent)
    aside = final.with_name(f".{final.name}.dropped")
    if final.exists():  # of a process that was cut off after this step, or damaged
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    flush_to_disk(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def drop_old(folder: Path, keep: int, verified: set[int]) -> None:
    """Remove the checkpoints older than the newest `keep` undamaged ones.

    Nothing is removed on the strength of a name: each of those `keep` has been read whole by this
    process (`verified`, which grows here) or is read now. Damaged ones take up no place. A
    checkpoint vanishes under its name at once, so that a crash leaves no half of it.
    """
    assert keep >= 1
    kept = 0
    for step in reversed(steps_in(folder)):
        path = step_folder(folder, step)
        if kept >= keep:
            aside = path.with_name(f".{path.name}.dropped")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            verified.discard(step)
        elif damage(path, contents=step not in verified) is None:
            verified.add(step)
            kept += 1


def sweep(folder: Path) -> None:
    """Remove what a process that was cut off left half written or half removed. The holder of the
    run folder calls it before it trains: a late writer then finds its partial folder gone."""
    if not _is_folder(folder):
        return
    with os.scandir(folder) as entries:
        left = [e.path for e in entries if LEFTOVER.fullmatch(e.name) and not e.is_symlink()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def hashed(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of these files of a folder, their content flushed to the disk."""
    return {name: file_sha256(folder / name, flush=True) for name in names}
