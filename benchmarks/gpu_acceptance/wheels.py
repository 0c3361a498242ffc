"""What a machine without our environment and without a network must be brought, in pieces.

    python -m benchmarks.gpu_acceptance.wheels collect --output dist/gpu_wheels [--also NAME ...]
    python -m benchmarks.gpu_acceptance.wheels unpack dist/gpu_wheels --target /tmp/site

`collect` builds or downloads a wheel of each package of CARRIED at the version of the constraints,
for this Python (3.12) and this kind of machine. It lays them into folders piece_1, piece_2, … of at
most 64 MiB with one SHA256SUMS; a larger wheel is cut into parts. `unpack` checks the sums, joins
the parts and installs without an index and without dependencies. Only Python's own library and pip
are needed, so that `unpack` runs before anything is there.

The target is expected to have EXPECTED, in versions of its own: torch 2.11 and Triton 3.6 are what
was tried (on a CPU). Not carried: Transformer Engine and causal_conv1d, whose compiled halves
belong to one torch and one GPU (docs/gpu.md).
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIECE_BYTES = 64 << 20
_PART = ".part"  # wheel.whl.part1, wheel.whl.part2, …
_SUMS = "SHA256SUMS"

CARRIED = ("megatron-core", "hydra-core", "omegaconf", "antlr4-python3-runtime")
# Of mamba_ssm only the Triton scan is used: nothing is compiled (launch/gpu_packages.sh).
BUILT_WITH_TORCH = {"mamba-ssm": {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}}
EXPECTED = (
    "torch",
    "triton",
    "numpy",
    "packaging",
    "psutil",
    "pyarrow",
    "pyyaml",
    "rich",
    "safetensors",
    "tokenizers",
    "matplotlib",
)


def collect(output: Path, also: Sequence[str]) -> None:
    """Fill `output`, which is emptied first. Raises RuntimeError if a wheel cannot be made; one of
    BUILT_WITH_TORCH is then left out with a line, because only its stage needs it."""
    versions = pins()
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        wheels = Path(made)
        _wheel(wheels, str(ROOT))
        for name in (*CARRIED, *also):
            _wheel(wheels, f"{name}=={versions[name]}" if name in versions else name)
        for name, variables in BUILT_WITH_TORCH.items():
            try:
                _wheel(wheels, f"{name}=={versions[name]}", "--no-build-isolation", **variables)
            except RuntimeError as error:
                print(f"gpu-wheels: left out: {error}", file=sys.stderr)
        pack(sorted(wheels.glob("*.whl")), output)


def pins() -> dict[str, str]:
    """Distribution -> version, from the constraints."""
    found = {}
    for name in ("constraints.txt", "constraints-gpu.txt"):
        for line in (ROOT / name).read_text("utf-8").splitlines():
            distribution, separator, version = line.partition("==")
            if separator and not line.startswith("#"):
                found[distribution] = version
    return found


def _wheel(folder: Path, what: str, *options: str, **variables: str) -> None:
    """Have pip make a wheel. Raises RuntimeError with the last line of what it said."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), *options, what]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise RuntimeError(f"{what}: {lines[-1].strip() if lines else 'pip ended with an error'}")
    print(f"gpu-wheels: {what if what != str(ROOT) else 'nemotron-train'}", flush=True)


def pack(wheels: Iterable[Path], output: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Lay the wheels, cut where necessary, into pieces, one after the other; returns the
    pieces. SHA256SUMS, in the first one, has the sum of every file and of every whole wheel."""
    pieces: list[Path] = []
    sums: dict[str, str] = {}
    room = 0
    for wheel in wheels:
        content = wheel.read_bytes()
        sums[wheel.name] = _sum(content)
        cuts = range(0, len(content), piece_bytes) if len(content) > piece_bytes else [0]
        for number, start in enumerate(cuts, start=1):
            part = content[start : start + piece_bytes]
            name = wheel.name if len(cuts) == 1 else f"{wheel.name}{_PART}{number}"
            if len(part) > room:
                pieces.append(output / f"piece_{len(pieces) + 1}")
                pieces[-1].mkdir(parents=True)
                room = piece_bytes
            (pieces[-1] / name).write_bytes(part)
            sums[name] = _sum(part)
            room -= len(part)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (pieces[0] / _SUMS).write_text(lines)
    return pieces


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def join(folder: Path, output: Path) -> list[Path]:
    """Check every file of the pieces below `folder` and write the whole wheels to `output`. Raises
    RuntimeError that names the first file that is missing or is not what was packed."""
    listed = next(iter(sorted(folder.rglob(_SUMS))), None)
    if listed is None:
        raise RuntimeError(f"{folder}: has no {_SUMS}; it is in piece_1")
    sums: dict[str, str] = {}
    for line in listed.read_text().splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    found = {path.name: path for path in folder.rglob("*") if path.name in sums}
    wheels = []
    for name, digest in sums.items():
        if not name.endswith(".whl"):
            continue
        parts = sorted(
            (part for part in sums if part.startswith(name + _PART)),
            key=lambda part: int(part.rpartition(_PART)[2]),
        )
        content = b""
        for part in parts or [name]:
            if part not in found:
                raise RuntimeError(f"{part}: is missing below {folder}")
            piece = found[part].read_bytes()
            if _sum(piece) != sums[part]:
                raise RuntimeError(f"{found[part]}: is not what {listed} says")
            content += piece
        if _sum(content) != digest:
            raise RuntimeError(f"{name}: its parts do not join to what {listed} says")
        (output / name).write_bytes(content)
        wheels.append(output / name)
    return wheels


def unpack(folder: Path, target: Path) -> None:
    """Install the wheels of the pieces below `folder` into `target`, without an index."""
    with tempfile.TemporaryDirectory() as made:
        wheels = join(folder, Path(made))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--upgrade", "--disable-pip-version-check"]
        command += ["--target", str(target), *map(str, wheels)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip ended with an error"])[-1]
        raise RuntimeError(f"{target}: {last}")


def main(words: list[str] | None = None) -> int:
    """The command line. 0, or 2 with one line that names the file or package."""
    parser = argparse.ArgumentParser(prog="gpu-wheels", description="Wheels for a GPU machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    collecting = verbs.add_parser("collect", help="build and download (needs an index)")
    collecting.add_argument("--output", type=Path, default=Path("dist/gpu_wheels"), metavar="DIR")
    collecting.add_argument(
        "--also", nargs="+", default=[], metavar="NAME", help=f"besides {', '.join(CARRIED)}"
    )
    unpacking = verbs.add_parser("unpack", help="check, join and install (needs no network)")
    unpacking.add_argument("folder", type=Path, metavar="DIR", help="with all pieces below it")
    unpacking.add_argument("--target", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(words)
    try:
        if arguments.verb == "collect":
            collect(arguments.output, arguments.also)
            for piece in sorted(arguments.output.glob("piece_*")):
                size = sum(path.stat().st_size for path in piece.iterdir())
                names = ", ".join(sorted(path.name for path in piece.glob("*.whl*")))
                print(f"{piece}: {size / 2**20:.1f} MiB: {names}")
        else:
            unpack(arguments.folder, arguments.target)
            print(f"export PYTHONPATH={arguments.target.resolve()}")
    except (OSError, RuntimeError) as error:
        print(f"gpu-wheels: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
