"""C files compiled where the run is, for its own processor, and kept for the next process.

Owns: compiling, the folder of compiled libraries, and what is said where that fails. Does not own:
the C files, nor what computes instead (the torch operators of the modules that call).

A library is named by a digest of its sources, the compiler's flags and all that the compiler
predefines for this processor, so that another machine with the same home never loads it. The folder
(`nemotron-train` in XDG_CACHE_HOME or ~/.cache) must belong to this user and be writable by no one
else; otherwise each process compiles for itself, into a folder that is gone once it is loaded.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

# The two steps, compiling and linking, leave OpenMP's functions open, to be found in the library
# that torch has loaded: one pool of threads, not two that fight over the cores.
_COMPILE = ["-march=native", "-std=c11", "-fPIC", "-fopenmp"]
_SECONDS = 120


@functools.cache
def library(sources: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of C files in one folder, with the headers beside them; None, with a warning
    that says why, where it cannot be built or loaded."""
    try:
        return _load(sources, flags, shutil.which("cc") or "cc")
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        reason = said.decode(errors="replace").strip().splitlines()[-1] if said else str(error)
        names = ", ".join(source.name for source in sources)
        warnings.warn(
            f"{names}: cannot be compiled here ({reason}); torch's operators compute instead, the "
            "same but slower: install a C compiler (gcc)",
            stacklevel=2,
        )
        return None


def _load(sources: Sequence[Path], flags: Sequence[str], compiler: str) -> ctypes.CDLL:
    """Raises OSError (no compiler, or its result cannot be loaded) or SubprocessError."""
    digest = _digest(sources, flags, compiler)
    with tempfile.TemporaryDirectory() as scratch:
        kept = _kept_folder()
        if kept is None:
            return ctypes.CDLL(str(_build(sources, flags, compiler, Path(scratch, "library.so"))))
        name = f"{sources[0].parent.name}-{digest}.so"
        if not (kept / name).exists():
            # Under another name first: processes that start together never load half a file.
            with tempfile.NamedTemporaryFile(dir=kept, suffix=".so", delete=False) as made:
                pass
            try:
                os.replace(_build(sources, flags, compiler, Path(made.name)), kept / name)
            finally:
                Path(made.name).unlink(missing_ok=True)
        return ctypes.CDLL(str(kept / name))


def _digest(sources: Sequence[Path], flags: Sequence[str], compiler: str) -> str:
    predefined = _run([compiler, *_COMPILE, *flags, "-dM", "-E", "-x", "c", os.devnull])
    digest = hashlib.sha256(repr((_COMPILE, list(flags))).encode() + predefined)
    for path in [*sources, *sorted(sources[0].parent.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _kept_folder() -> Path | None:
    """Where libraries are kept; None where there is no such place that only this user writes."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "nemotron-train")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    mine = status.st_uid == os.getuid() and not others_write and os.access(folder, os.W_OK)
    return folder if mine else None


def _build(sources: Sequence[Path], flags: Sequence[str], compiler: str, out: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{source.stem}.o")) for source in sources]
        for source, made in zip(sources, objects, strict=True):
            _run([compiler, *_COMPILE, *flags, "-c", str(source), "-o", made])
        _run([compiler, "-shared", *objects, "-o", str(out), "-lm"])
    return out


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS).stdout
