"""Compiles C files on the machine that runs them, for its processor, and caches the library.

Owns: compiling, the cache folder, and the warning if compilation fails. Does not own: the C files,
the torch operators that compute instead (in the modules that call the kernels).

The name of a library contains a digest of its sources, the compiler's flags and all macros that the
compiler predefines for this processor. Another machine with the same home directory therefore never
loads it. The folder (`nemotron-train` in XDG_CACHE_HOME or ~/.cache) must belong to this user and
be writable by no one else. Otherwise each process compiles its own copy into a temporary folder
that is deleted after loading.
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

# -fopenmp is passed to the compiler but not to the linker. OpenMP's functions then resolve to the
# library that torch has loaded: one thread pool, instead of two that compete for the cores.
_COMPILE = ["-march=native", "-std=c11", "-fPIC", "-fopenmp"]
_SECONDS = 120  # timeout of one compiler call


@functools.cache
def library(sources: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The compiled library of C files in one folder, which also holds their headers. None, with a
    warning that gives the reason, if it cannot be built or loaded."""
    try:
        return _load(sources, flags, shutil.which("cc") or "cc")
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None)
        reason = stderr.decode(errors="replace").strip().splitlines()[-1] if stderr else str(error)
        names = ", ".join(source.name for source in sources)
        warnings.warn(
            f"{names}: cannot be compiled here ({reason}); torch's operators compute instead, the "
            "same but slower: install a C compiler (gcc)",
            stacklevel=2,
        )
        return None


def _load(sources: Sequence[Path], flags: Sequence[str], compiler: str) -> ctypes.CDLL:
    """Load from the cache, or build first. Raises OSError (no compiler, or the result cannot be
    loaded) or SubprocessError (the compiler failed or timed out)."""
    digest = _digest(sources, flags, compiler)
    with tempfile.TemporaryDirectory() as scratch:
        cache = _cache_folder()
        if cache is None:
            return ctypes.CDLL(str(_build(sources, flags, compiler, Path(scratch, "library.so"))))
        name = f"{sources[0].parent.name}-{digest}.so"
        if not (cache / name).exists():
            # Build under a temporary name, then rename: processes that start at the same time never
            # load an incomplete file.
            with tempfile.NamedTemporaryFile(dir=cache, suffix=".so", delete=False) as temporary:
                pass
            try:
                os.replace(_build(sources, flags, compiler, Path(temporary.name)), cache / name)
            finally:
                Path(temporary.name).unlink(missing_ok=True)
        return ctypes.CDLL(str(cache / name))


def _digest(sources: Sequence[Path], flags: Sequence[str], compiler: str) -> str:
    """Digest of flags, predefined macros (`cc -dM -E`: compiler version, processor), sources and
    headers."""
    predefined = _run([compiler, *_COMPILE, *flags, "-dM", "-E", "-x", "c", os.devnull])
    digest = hashlib.sha256(repr((_COMPILE, list(flags))).encode() + predefined)
    for path in [*sources, *sorted(sources[0].parent.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path | None:
    """The cache folder, created if needed; None if another user could write to it or it cannot be
    created."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "nemotron-train")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_private = status.st_uid == os.getuid() and not others_write and os.access(folder, os.W_OK)
    return folder if is_private else None


def _build(sources: Sequence[Path], flags: Sequence[str], compiler: str, out: Path) -> Path:
    """Compile each source and link them into `out`."""
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{source.stem}.o")) for source in sources]
        for source, object_file in zip(sources, objects, strict=True):
            _run([compiler, *_COMPILE, *flags, "-c", str(source), "-o", object_file])
        _run([compiler, "-shared", *objects, "-o", str(out), "-lm"])
    return out


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS).stdout
