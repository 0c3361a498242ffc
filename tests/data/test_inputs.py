"""What `data prepare` finds under its input: each file is read, or named with the reason.

Not covered: files that another program moves during the search, and permissions (root reads all).
"""

import gzip
import json
import os
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.config.errors import ConfigError
from nemotron_train.data import inputs
from nemotron_train.data.inputs import InputFormat, find_inputs

DOCUMENT = b'{"text": "a b c"}\n'


def found(where: Path | str) -> tuple[list[str], dict[str, str]]:
    files, left_out = find_inputs(str(where), InputFormat.by_name)
    return [file.path.name for file in files], {path.name: why for path, why in left_out}


def make(folder: Path) -> Path:
    """A folder with something of each kind."""
    (folder / "sub" / ".cache").mkdir(parents=True)
    (folder / "elsewhere").mkdir()
    for name in ("a.jsonl", "b.JSONL", "notes.unknown", "sub/c.txt", "a.tar.notes", ".hidden"):
        (folder / name).write_bytes(DOCUMENT)
    (folder / "d.jsonl.GZ").write_bytes(gzip.compress(DOCUMENT))
    for name in ("x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.7z", "x.rar", "x.TAR.ZST"):
        (folder / name).write_bytes(b"PK")
    for name in ("y.jsonl.xz", "y.bz2", "y.lz4", "y.Z", "y.parquet.snappy"):
        (folder / name).write_bytes(b"xx")
    (folder / "elsewhere.txt").symlink_to("sub/c.txt")
    (folder / "outside.jsonl").symlink_to("/dev/null")
    (folder / "nothing.jsonl").symlink_to("no/such/file")
    (folder / "itself.jsonl").symlink_to("itself.jsonl")
    (folder / "sub" / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.jsonl")
    return folder


def test_each_is_read_or_named(tmp_path: Path) -> None:
    """The two lists together are everything there, by Python's own walk."""
    folder = make(tmp_path / "in")
    read, left_out = found(folder)
    assert read == ["a.jsonl", "a.tar.notes", "b.JSONL", "d.jsonl.GZ", "notes.unknown", "c.txt"]
    for name, why in {
        ".hidden": "hidden",
        ".cache": "hidden",
        "x.zip": "an archive (.zip); unpack it",
        "x.tar.gz": "an archive (.tar); unpack it",
        "x.TAR.ZST": "an archive (.tar)",
        "y.jsonl.xz": "compression .xz is not read",
        "y.Z": "compression .z is not read",
        "elsewhere.txt": f"a link to {folder}/sub/c.txt, which is read",
        "outside.jsonl": "no plain file",
        "nothing.jsonl": "a link to no/such/file: cannot be read (No such file or directory)",
        "itself.jsonl": "a link to itself.jsonl: cannot be read (Too many levels",
        "up": "a link to a folder",
        "pipe.jsonl": "no plain file",
    }.items():
        assert left_out[name].startswith(why), (name, left_out[name])
    everything = {name for _, folders, files in os.walk(folder) for name in files + folders}
    assert set(read) | set(left_out) == everything - {"sub", "elsewhere"}
    assert not set(read) & set(left_out)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch) -> None:
    folder = make(tmp_path / "in")
    scandir = os.scandir

    def refused(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(inputs.os, "scandir", refused)
    read, left_out = found(folder)
    assert left_out["sub"] == "a folder that cannot be listed (Permission denied)"
    assert "c.txt" not in read and "a.jsonl" in read


@pytest.mark.parametrize(
    ("pattern", "read", "named"),
    [
        ("*.jsonl", ["a.jsonl"], {"nothing.jsonl", "itself.jsonl", "outside.jsonl", "pipe.jsonl"}),
        ("*/*", ["c.txt"], {"up"}),
        ("sub*", None, {"sub"}),
        ("**/*.txt", ["c.txt"], {"elsewhere.txt", "c.txt"}),  # c.txt again, through `up`
        ("x.*", None, {"x.7z"}),
        ("none*", None, set()),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, read: list[str] | None, named: set[str]) -> None:
    folder = make(tmp_path / "in")
    if read is None:
        with pytest.raises(ConfigError, match=r"input=.*" + "|".join(named)) as refusal:
            found(folder / pattern)
        assert "\n" not in str(refusal.value)
        return
    files, left_out = found(folder / pattern)
    assert files == read and set(left_out) == named


@pytest.mark.parametrize(
    "name", ["x.zip", "y.jsonl.xz", "nothing.jsonl", "itself.jsonl", "pipe.jsonl", ""]
)
def test_a_file_that_is_named_and_not_read_is_refused(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "in")
    with pytest.raises(
        ConfigError, match=r"input=.*: (an archive|compression|a link|no plain|emp)"
    ):
        found(folder / name if name else "")


def test_too_long_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"input=.*: cannot be read \(File name too long\)"):
        found("x" * 300)


def test_the_summary_names_what_was_not_read(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also files that were read and held no document: empty ones, empty archives, bad records."""
    folder = make(tmp_path / "in")
    (folder / "0.jsonl").write_bytes(b"")
    (folder / "m.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "n.jsonl").write_bytes(b"\n\nno JSON\n")
    (folder / "z.txt").write_bytes(b"")
    words = ["data", "prepare", f"input={folder}", f"tokenizer={tokenizer_folder}", "workers=1"]
    words += [f"output={tmp_path / 'out'}", "on_bad=skip", "validation_fraction=0"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    lines = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    for name in ("0.jsonl", "m.jsonl.gz", "n.jsonl", "z.txt"):
        assert f"{folder / name}: holds no document" in lines
    assert f"{folder}/x.zip: an archive (.zip); unpack it" in lines
    assert len(lines) == len(found(folder)[1]) + 4
    assert f"files and folders not read or without a document: {len(lines)}" in shown
    assert lines[0] in shown and str(tmp_path / "out" / "left_out.txt") in shown
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["documents"] == 6
    assert main(words) == 0  # the files are named again
    assert lines[0] in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\n \n", b"no JSON\n"])
def test_an_input_without_any_document_is_refused(
    tmp_path: Path, tokenizer_folder: Path, capsys, content: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    words = ["data", "prepare", f"input={tmp_path}/a.jsonl", f"tokenizer={tokenizer_folder}"]
    assert main([*words, f"output={tmp_path}/out", "workers=1", "on_bad=skip"]) == 2
    assert "holds no document with text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
