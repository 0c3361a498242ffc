"""Damaged and forged Hugging Face folders: `convert from-hf` gives one line, exit code 2, and
leaves nothing behind.

The forgeries of config.json's fields are in test_config.py, those of names and shapes of tensors in
test_to_hf.py.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.cli.main import main

pytestmark = pytest.mark.usefixtures("in_small_run")

WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def theirs(small_run: tuple[Path, list[str]]) -> Path:
    """An exported folder with one file of weights."""
    assert main(["pretrain", *small_run[1], "name=for_theirs", "train.stop_after_steps=1"]) == 3
    assert main(["convert", "to-hf", "runs/for_theirs@1", "--out", "theirs"]) == 0
    return Path("theirs")


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """The header of the weights changed: `change` alters the object or returns the text."""

    def rewrite(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        text = change(header)
        data = (text if isinstance(text, str) else json.dumps(header)).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(data)) + data + content[8 + length :])

    return rewrite


def _first(**fields: Any) -> Callable[[Path], object]:
    return _header(lambda header: header["lm_head.weight"].update(fields) or None)


def _twice(header: dict[str, Any]) -> str:
    entry = json.dumps({"lm_head.weight": header["lm_head.weight"]})
    return json.dumps(header)[:-1] + "," + entry[1:]


def _overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name.endswith("mixer.D")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def _file(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(), make(folder / name))


CASES: dict[str, Callable[[Path], object]] = {
    "weights missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights empty": _file(WEIGHTS, b""),
    "weights of seven bytes": _file(WEIGHTS, b"1234567"),
    "weights garbage": _file(WEIGHTS, os.urandom(5000)),
    "weights cut": lambda folder: os.truncate(folder / WEIGHTS, 20_000),
    "weights a folder": _instead(WEIGHTS, Path.mkdir),
    "weights a loop": _instead(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "header empty": _header(lambda header: ""),
    "header a list": _header(lambda header: "[]"),
    "header null": _header(lambda header: "null"),
    "header deep": _header(lambda header: "[" * 100_000),
    "header of NaN": _header(lambda header: json.dumps(header).replace("64", "NaN", 1)),
    "header without tensors": _header(lambda header: "{}"),
    "header long": lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "dtype unknown": _first(dtype="X7"),
    "dtype a number": _first(dtype=3),
    "shape negative": _first(shape=[-512, 64]),
    "shape huge": _first(shape=[2**62, 2**62]),
    "shape text": _first(shape="512"),
    "offsets overlap": _header(_overlap),
    "offsets negative": _first(data_offsets=[-8, 0]),
    "offsets reversed": _first(data_offsets=[100, 0]),
    "offsets beyond": _first(data_offsets=[0, 2**40]),
    "offsets missing": _header(
        lambda header: header["lm_head.weight"].pop("data_offsets") and None
    ),
    "entry null": _header(lambda header: header.update({"lm_head.weight": None})),
    "index garbage": _file(INDEX, "{"),
    "index null": _file(INDEX, "null"),
    "index deep": _file(INDEX, '{"weight_map":' * 100_000),
    "index outside": _file(INDEX, '{"weight_map": {"lm_head.weight": "../../etc/passwd"}}'),
    "index with a list": _file(INDEX, '{"weight_map": {"lm_head.weight": []}}'),
    "index empty": _file(INDEX, '{"weight_map": {}}'),
    "tokenizer garbage": _file("tokenizer.json", "{"),
    "tokenizer empty": _file("tokenizer.json", ""),
    "tokenizer of another kind": _file("tokenizer.json", '{"model": {"type": "Nothing"}}'),
    "tokenizer settings deep": _file("tokenizer_config.json", '{"a":' * 100_000),
    "tokenizer settings a list": _file("tokenizer_config.json", "[]"),
    "generation garbage": _file("generation_config.json", "{"),
    "generation a list": _file("generation_config.json", "[]"),
    "generation deep": _file("generation_config.json", '{"a":' * 100_000),
    "generation a folder": _instead("generation_config.json", Path.mkdir),
    "config a folder": _instead("config.json", Path.mkdir),
    "config a loop": _instead("config.json", lambda path: path.symlink_to(path.name)),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left(
    theirs: Path, case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = shutil.copytree(theirs, tmp_path / "theirs"), tmp_path / "out"
    CASES[case](folder)
    capfd.readouterr()
    code, error = (
        main(["convert", "from-hf", str(folder), "--out", str(out)]),
        capfd.readouterr().err,
    )
    assert (code, error.count("\n")) == (2, 1), error
    assert str(folder) in error and len(error) < 1000, error
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_name_twice_is_read_once_or_refused(theirs: Path, tmp_path: Path) -> None:
    """JSON leaves open which of two equal names counts; here both say the same."""
    folder = shutil.copytree(theirs, tmp_path / "theirs")
    _header(_twice)(folder)
    assert main(["convert", "from-hf", str(folder), "--out", str(tmp_path / "out")]) in (0, 2)
