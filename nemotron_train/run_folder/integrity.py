"""Integrity of checkpoints: hashes, damage, the newest undamaged one, removal of old ones.

Owns: `manifest.json` of a checkpoint, `checkpoints.jsonl` of a run folder, names and removal of
checkpoint folders, and `damage`, the one check that every verb makes before it reads a checkpoint.
Does not own: what the files may contain (`checkpoint_json`, `checkpoint_index`), the tensors
(`train.checkpoint`), when a checkpoint is written. Imports torch only to read a `.metadata`.

    RUN/checkpoints.jsonl                 per checkpoint, a line: step, SHA-256 of manifest, time
    RUN/checkpoints/step_00000100/        complete or absent
        manifest.json                     SHA-256 and length of every other file; written last
        .metadata, metadata.json, __R_N.distcp   Megatron-Core's distributed format
        progress.json, precision.json …   ours
    RUN/checkpoints/.step_00000100.partial    being written, never read
    RUN/checkpoints/.step_00000100.dropped    being removed, never read

Chain of trust: checkpoints.jsonl holds the hash of the manifest, the manifest holds the hash of
every other file, and a file is parsed only after its hash was checked. Then its content is checked,
since whoever forges a file may also write the hashes. docs/decisions/0005 gives the reasons.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.platform.files import append_line, file_sha256, flush_to_disk, write_durably
from nemotron_train.run_folder import checkpoint_index, checkpoint_json
from nemotron_train.run_folder.checkpoint_index import METADATA, SHARD, first_line

STEP_FOLDER = re.compile(r"step_([0-9]{8})")
LEFTOVER = re.compile(r"\.step_[0-9]{8}\.(partial|dropped)")
MANIFEST, RECORD = "manifest.json", "checkpoints.jsonl"
# All files that a checkpoint may hold besides shards. Not common.pt, a pickle: Megatron would load
# it first.
OWN_FILES = {MANIFEST, METADATA, *checkpoint_json.REQUIRED, *checkpoint_json.OPTIONAL}
FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 64 * 2**20

# Reading ------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    """Steps of all checkpoints under `folder`, also damaged ones, ascending.

    Only real folders count; symbolic links do not.
    """
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
    """Path of the checkpoint of `step`: `folder`/step_00000100."""
    return folder / f"step_{step:08d}"


def latest(
    folder: Path, say: Callable[[str], None], verified: set[int] | None = None
) -> Path | None:
    """The newest undamaged checkpoint under `folder`; None if there is no checkpoint.

    Chosen by step number and content, not by a pointer file or a timestamp. Calls `say` for each
    damaged newer checkpoint. Adds the step of the checkpoint that was checked to `verified`. Raises
    ConfigError if all checkpoints are damaged: a silent start from step 0 would be wrong.
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
    """One line that describes the damage of the checkpoint in `folder`; None if undamaged.

    Without `contents`, the tensors are not read: checks the manifest and its record, names, types
    and lengths of all files, and the JSON files. Opens only regular files directly in the folder,
    and runs no code from them.
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
        digest = hashlib.sha256(content).hexdigest()
        recorded_digests = recorded.get(_step_of(folder), set())
        if digest not in recorded_digests:
            return f"{MANIFEST} is not the one that {RECORD} of the run folder records"
    try:
        sums, lengths = _parse_manifest(content, _step_of(folder))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({first_line(error)})"
    problem = _damaged_file(folder, sums, lengths) or _damaged_json(folder, sums)
    return problem or (_damaged_tensors(folder, sums, lengths) if contents else None)


def _step_of(folder: Path) -> int:
    """Step number in the name of a checkpoint folder, -1 for any other name."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _parse_manifest(content: bytes, step: int) -> tuple[dict[str, str], dict[str, int]]:
    """The manifest's maps from file name to SHA-256 and to length.

    Raises ValueError, KeyError or TypeError.
    """
    raw = json.loads(content)
    if raw["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version is {raw['format_version']!r}, not {FORMAT_VERSION}")
    if raw["step"] != step:
        raise ValueError(f"it belongs to step {raw['step']!r}")
    sums, lengths = raw["sha256"], raw["bytes"]
    if type(sums) is not dict or type(lengths) is not dict:
        raise TypeError("its lists are no objects")
    if set(sums) != set(lengths):
        raise ValueError("its two lists name other files")
    for name in sums:
        if not (name in OWN_FILES or SHARD.fullmatch(name)) or name == MANIFEST:
            raise ValueError(f"{name!r:.200} is no file of a checkpoint")
    for name in (*checkpoint_json.REQUIRED, METADATA):
        if name not in sums:
            raise ValueError(f"it does not list {name}")
    return sums, lengths


def _damaged_file(folder: Path, sums: Mapping[str, str], lengths: Mapping[str, int]) -> str | None:
    """`damage` after the manifest is parsed: compare names, types and lengths with it."""
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
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def _damaged_json(folder: Path, sums: Mapping[str, str]) -> str | None:
    """`damage` of the JSON files: their hashes, then their fields."""
    for name in sorted(sums):
        if name == METADATA or SHARD.fullmatch(name):
            continue
        try:
            content = _read_plain(folder / name, checkpoint_json.MAX_BYTES)
            if hashlib.sha256(content).hexdigest() != sums[name]:
                return f"{name} has changed since it was written"
            checkpoint_json.check_json(name, content, _step_of(folder))
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        except ValueError as error:
            return f"{name} is refused: {first_line(error)}"
    return None


def _damaged_tensors(
    folder: Path, sums: Mapping[str, str], lengths: Mapping[str, int]
) -> str | None:
    """`damage` of the index and the shards: their hashes, then what they contain."""
    try:
        for name in sorted(sums):
            if name != METADATA and not SHARD.fullmatch(name):
                continue
            if file_sha256(folder / name, follow_links=False) != sums[name]:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    try:
        index = checkpoint_index.read_index(folder)
        checkpoint_index.check_index(index, lengths)
    except Exception as error:
        return f"{METADATA} is refused: {first_line(error)}"
    try:
        checkpoint_index.check_archives(folder, index)
    except ValueError as error:
        return first_line(error)
    return None


def recorded_manifests(folder: Path) -> dict[int, set[str]] | None:
    """Step -> digests of the manifests that the run wrote for it, from checkpoints.jsonl.

    folder: the folder of checkpoints. None if there is no checkpoints.jsonl (a checkpoint that was
    copied out of its run). Lines that cannot be parsed are ignored.
    """
    path = folder.parent / RECORD
    try:
        lines = _read_plain(path, MAX_MANIFEST_BYTES).splitlines()
    except FileNotFoundError:
        return None
    except OSError:
        return {}
    digests: dict[int, set[str]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            digests.setdefault(entry["step"], set()).add(entry["manifest"])
        except (ValueError, KeyError, TypeError):
            continue
    return digests


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder and not a symbolic link."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _read_plain(path: Path, limit: int) -> bytes:
    """Content of a regular file, without following symbolic links.

    Raises OSError, also if the file is longer than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        if status.st_size > limit:
            raise OSError(f"it has {status.st_size} bytes")
        return file.read()


# Writing ------------------------------------------------------------------------------------


def partial_folder(final: Path) -> Path:
    """Folder in which the checkpoint `final` is written until it is complete."""
    return final.with_name(f".{final.name}.partial")


def commit(final: Path, sums: Mapping[str, str], check_held: Callable[[], None]) -> None:
    """Write the manifest of the checkpoint in `partial_folder(final)` and rename it to `final`.

    sums: digests of files that are already hashed; the other files are hashed here. check_held:
    raises if this process may no longer write to the run folder.

    All files, then the line in checkpoints.jsonl, are on disk before the rename. After a crash, the
    checkpoint is absent, or complete and recorded. Raises OSError.
    """
    partial, step = partial_folder(final), _step_of(final)
    names = sorted(path.name for path in partial.iterdir() if path.name != MANIFEST)
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "sha256": {
            name: sums.get(name) or file_sha256(partial / name, flush=True, follow_links=False)
            for name in names
        },
        "bytes": {name: (partial / name).stat().st_size for name in names},
    }
    text = json_text(manifest, indent=1)
    write_durably(partial / MANIFEST, text)
    flush_to_disk(partial)
    check_held()
    record = {"step": step, "manifest": hashlib.sha256(text.encode()).hexdigest()}
    record["time"] = round(time.time(), 3)
    append_line(final.parent.parent / RECORD, json_text(record))
    flush_to_disk(final.parent.parent)
    dropped = final.with_name(f".{final.name}.dropped")
    if final.exists():  # damaged, or left by a process that was killed after this step
        shutil.rmtree(dropped, ignore_errors=True)
        final.rename(dropped)
    partial.rename(final)
    flush_to_disk(final.parent)
    shutil.rmtree(dropped, ignore_errors=True)


def drop_old(folder: Path, keep: int, verified: set[int]) -> None:
    """Remove the checkpoints older than the newest `keep` undamaged ones.

    The `keep` checkpoints are verified by content before any other is removed. `verified`: steps
    that this process has already verified; steps verified here are added. Damaged checkpoints do
    not count towards `keep`. A checkpoint is renamed before its files are removed, so a crash
    leaves no incomplete checkpoint under its name.
    """
    assert keep >= 1
    num_undamaged = 0
    for step in reversed(steps_in(folder)):
        path = step_folder(folder, step)
        if num_undamaged >= keep:
            dropped = path.with_name(f".{path.name}.dropped")
            shutil.rmtree(dropped, ignore_errors=True)
            path.rename(dropped)
            shutil.rmtree(dropped, ignore_errors=True)
            verified.discard(step)
        elif damage(path, contents=step not in verified) is None:
            verified.add(step)
            num_undamaged += 1


def sweep(folder: Path) -> None:
    """Remove the folders that a killed process left partly written or partly removed.

    The holder of the run folder calls it before it trains. An earlier process that still writes
    then fails, because its partial folder is gone.
    """
    if not _is_folder(folder):
        return
    with os.scandir(folder) as entries:
        leftovers = [e.path for e in entries if LEFTOVER.fullmatch(e.name) and not e.is_symlink()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def hashed(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> SHA-256 of files in a folder. Their content is on disk on return."""
    return {name: file_sha256(folder / name, flush=True, follow_links=False) for name in names}
