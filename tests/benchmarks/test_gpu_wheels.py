"""What a GPU machine without a network is brought: pieces, their sums, and that nothing is missing.

Second truth for what is needed: what importing the verbs really loads. Not covered: building and
downloading the wheels (needs an index; done by hand, docs/gpu.md).
"""

import base64
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import setuptools

from benchmarks.gpu_acceptance import wheels

VENDORED = Path(setuptools.__file__).parent / "_vendor"  # torch imports setuptools
VERBS = (
    "nemotron_train.cli.main",
    "nemotron_train.compose.compose",
    "nemotron_train.convert.hugging_face.to_hf",
    "nemotron_train.generate.terminal",
    "nemotron_train.run",
    "nemotron_train.train.trainer",
)


def made_wheel(folder: Path, name: str, size: int = 0) -> Path:
    """A wheel with one module, which has `size` bytes besides."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    files = {
        f"{name}.py": f"VALUE = 7\n#{'x' * size}\n",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = ""
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{file},sha256={digest.decode()},{len(text)}\n"
    record += f"{name}-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{name}-1.0.dist-info/RECORD": record}).items():
            archive.writestr(file, text)
    return path


def packed(tmp_path: Path) -> Path:
    """Two small wheels and one that needs twelve pieces of a thousand bytes."""
    made = [made_wheel(tmp_path / "made", name, size) for name, size in PACKED.items()]
    pieces = wheels.pack(made, tmp_path / "pieces", 1000)
    assert all(sum(f.stat().st_size for f in p.glob("*.whl*")) <= 1000 for p in pieces)
    return tmp_path / "pieces"


PACKED = {"first_made": 0, "large_made": 11000, "last_made": 0}


def test_pieces_are_joined_and_installed(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    assert len(list(folder.rglob("large_made*.part*"))) >= 12, "parts beyond nine are in order"
    assert wheels.main(["unpack", str(folder), "--target", str(tmp_path / "site")]) == 0
    for name in PACKED:
        assert (tmp_path / "site" / f"{name}.py").read_text().startswith("VALUE = 7")


def test_a_missing_or_changed_piece_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed(tmp_path)
    part = next(folder.rglob("large_made*.part3"))
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    words = ["unpack", str(folder), "--target", str(tmp_path / "site")]
    assert wheels.main(words) == 2 and part.name in capsys.readouterr().err
    part.unlink()
    assert wheels.main(words) == 2 and f"{part.name}: is missing" in capsys.readouterr().err
    assert wheels.main(["unpack", str(tmp_path / "made"), "--target", "x"]) == 2
    assert "SHA256SUMS" in capsys.readouterr().err
    assert not (tmp_path / "site").exists(), "nothing is installed of an incomplete set"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needs_of(names: set[str]) -> set[str]:
    """The distributions and all that they require without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in required:
            if "extra ==" not in line:
                waiting.append(normal(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]))
    return found


def owners_of_modules() -> dict[str, set[str]]:
    """Top-level module -> the distributions that have files in it."""
    owners: dict[str, set[str]] = {}
    folders = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    for distribution in importlib.metadata.distributions(path=list(folders)):
        name = normal(distribution.name)  # parses the whole metadata
        for line in (distribution.read_text("RECORD") or "").splitlines():
            first = line.partition(",")[0].partition("/")[0]
            if first.isidentifier() or first.endswith((".py", ".so")):
                module = first.partition(".")[0]
                owners.setdefault(module, set()).add(name)
    return owners


def test_the_verbs_load_with_what_is_there_and_carried() -> None:
    """Every other package is made absent. Megatron-Core tries to import some of them."""
    there = needs_of({normal(name) for name in wheels.EXPECTED})
    assert set(wheels.CARRIED) & there == set(), "nothing is carried that is there"
    allowed = there | set(wheels.CARRIED) | {"nemotron-train"}
    owners = owners_of_modules()
    carried_inside = {path.stem for path in VENDORED.iterdir()}
    absent = {m for m, names in owners.items() if not allowed & names} - carried_inside
    assert {"wandb", "datasets"} <= absent
    command = [sys.executable, "-c", LOAD, " ".join(absent), " ".join(VERBS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(VERBS)
    without_hydra = [*command[:3], "hydra", ""]
    assert "no hydra there" in subprocess.run(without_hydra, capture_output=True, text=True).stderr


# sys.argv: the modules that are made absent; the modules that are loaded, each of which is printed.
LOAD = """
import importlib, sys
class Absent:
    names = frozenset(sys.argv[1].split())
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"no {name} there")
sys.meta_path.insert(0, Absent())
from nemotron_train.compose.compose import compose_config
compose_config([])
from nemotron_train.platform import device
device.prepare(1)
for name in sys.argv[2].split():
    importlib.import_module(name)
    print(name)
"""
