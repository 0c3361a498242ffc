"""Damaged and forged checkpoints against the verbs that read one: the same line from each, exit
code 2, no code run, nothing left behind.

`damaged`: the hashes tell. `forged`: whoever changed the file also wrote correct hashes, so only
the content tells. Not covered: values of tensors that are wrong but finite, files that change
between the check and their use.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemotron_train.cli.main import main

pytestmark = pytest.mark.usefixtures("in_small_run")

STEP = "checkpoints/step_00000002"
RUN = Path("runs/hurt")


@pytest.fixture(scope="module")
def whole(small_run: tuple[Path, list[str]]) -> Path:
    """A run folder with the checkpoint of step 2."""
    words = ["name=before_damage", "precision=bf16", "train.stop_after_steps=2"]
    assert main(["pretrain", *small_run[1], *words]) == 3
    return Path("runs/before_damage")


@pytest.fixture
def run(whole: Path) -> Path:
    """A copy of it, to be damaged. It is at the same path in every test."""
    shutil.rmtree(RUN, ignore_errors=True)
    return shutil.copytree(whole, RUN)


def forge(step: Path) -> None:
    """Corrects the manifest and the run's record of it for what lies in the folder now."""
    path = step / "manifest.json"
    manifest = json.loads(path.read_text())
    files = {file.name: file.read_bytes() for file in step.iterdir() if file != path}
    manifest["sha256"] = {n: hashlib.sha256(content).hexdigest() for n, content in files.items()}
    manifest["bytes"] = {name: len(content) for name, content in files.items()}
    path.write_text(json.dumps(manifest))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with open(step.parent.parent / "checkpoints.jsonl", "a") as record:
        record.write(json.dumps({"step": manifest["step"], "manifest": digest}) + "\n")


class _Runs:
    """Pickles as a call that makes the folder `code_ran`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code_ran",)


def _file(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda step: (step / name).write_bytes(data)


def _fields(name: str, **changes: Any) -> Callable[[Path], object]:
    """A JSON file with fields replaced; None leaves one out."""

    def change(step: Path) -> None:
        fields = json.loads((step / name).read_text()) | changes
        kept = {key: value for key, value in fields.items() if value is not None}
        (step / name).write_text(json.dumps(kept))

    return change


def _data_state(**changes: Any) -> Callable[[Path], object]:
    def change(step: Path) -> None:
        fields = json.loads((step / "progress.json").read_text())
        fields["data"] |= changes
        (step / "progress.json").write_text(json.dumps(fields))

    return change


def _flip(name: str) -> Callable[[Path], object]:
    def change(step: Path) -> None:
        content = bytearray((step / name).read_bytes())
        content[len(content) // 2] ^= 1
        (step / name).write_bytes(content)

    return change


def _in_its_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda step: ((step / name).unlink(), make(step / name))


SHARD = "__0_0.distcp"
DAMAGED: dict[str, Callable[[Path], object]] = {
    "shard missing": lambda step: (step / SHARD).unlink(),
    "shard empty": _file(SHARD, b""),
    "shard truncated": lambda step: os.truncate(step / SHARD, 1000),
    "shard garbage": lambda step: (step / SHARD).write_bytes(
        os.urandom((step / SHARD).stat().st_size)
    ),
    "shard one bit": _flip(SHARD),
    "shard a folder": _in_its_place(SHARD, Path.mkdir),
    "shard a loop": _in_its_place(SHARD, lambda path: path.symlink_to(path.name)),
    "shard a pipe": _in_its_place(SHARD, os.mkfifo),
    "index garbage": _file(".metadata", b"garbage"),
    "index missing": lambda step: (step / ".metadata").unlink(),
    "index one bit": _flip(".metadata"),
    "progress missing": lambda step: (step / "progress.json").unlink(),
    "progress torn": lambda step: os.truncate(step / "progress.json", 20),
    "progress a folder": _in_its_place("progress.json", Path.mkdir),
    "manifest missing": lambda step: (step / "manifest.json").unlink(),
    "manifest garbage": _file("manifest.json", "{"),
    "manifest deep": _file("manifest.json", "[" * 100_000),
    "manifest a loop": _in_its_place("manifest.json", lambda path: path.symlink_to(path.name)),
    "a file more": _file("common.pt", b""),
    "an odd name": _file("a\n\x1b[31m.distcp", b""),
    "step a loop": lambda step: (shutil.rmtree(step), step.symlink_to(step.name)),
    "steps a loop": lambda step: (
        shutil.rmtree(step.parent),
        step.parent.symlink_to(step.parent.name),
    ),
}
JSON_FILES = ("progress.json", "about.json", "metadata.json", "data.json", "precision.json")
GARBAGE = {
    "empty": "",
    "torn": '{"step": 2, "tok',
    "list": "[]",
    "null": "null",
    "deep": '{"a":' * 100_000,
    "bytes": b"\xff\xfe\x00",
}
FORGED: dict[str, Callable[[Path], object]] = {
    **{
        f"{name} {kind}": _file(name, content)
        for name in JSON_FILES
        for kind, content in GARBAGE.items()
        if name == "progress.json" or kind in ("torn", "list")
    },
    **{f"{name} missing": lambda step, n=name: (step / n).unlink() for name in JSON_FILES[:3]},
    "progress without tokens": _fields("progress.json", tokens=None),
    "progress without model": _fields("progress.json", model=None),
    "model a list": _fields("progress.json", model=[]),
    "model of other sizes": _fields("progress.json", model={"hidden_size": 1}),
    "step text": _fields("progress.json", step="2"),
    "step of another": _fields("progress.json", step=3),
    "tokens NaN": _fields("progress.json", tokens=float("nan")),
    "tokens negative": _fields("progress.json", tokens=-1),
    "tokens huge": _fields("progress.json", tokens=10**300),
    "tokens a fraction": _fields("progress.json", tokens=1.5),
    "tokens of 5000 digits": _file("progress.json", '{"step": 2, "tokens": ' + "9" * 5000 + "}"),
    "data state a list": _fields("progress.json", data=[]),
    "data state null": _fields("progress.json", data=None),
    "samples huge": _data_state(samples=2**70),
    "samples of nobody": _data_state(samples=1),
    "split unknown": _data_state(split="validation"),
    "optimizer text": _fields("about.json", optimizer="no"),
    "format zarr": _fields("metadata.json", sharded_backend="zarr"),
    "format of the future": _fields("metadata.json", sharded_backend_version=99),
    "tokenizer a number": _fields("data.json", tokenizer=1),
    "phases text": _fields("data.json", phases="x"),
    "digest null": _file("precision.json", '{"name": "bf16", "digest": null}'),
    "ranks beyond": _file("random.json", '{"states": [], "ranks": [0]}'),
    "shard garbage": lambda step: (step / SHARD).write_bytes(
        os.urandom((step / SHARD).stat().st_size)
    ),
    "shard empty": _file(SHARD, b""),
    "shard zeros": lambda step: (step / SHARD).write_bytes(bytes((step / SHARD).stat().st_size)),
    "shard missing": lambda step: (step / SHARD).unlink(),
    "index empty": _file(".metadata", b""),
    "index garbage": _file(".metadata", b"\x80\x04garbage"),
    "index another object": _file(".metadata", pickle.dumps(torch.Size([1]))),
    "index runs code": _file(".metadata", pickle.dumps(_Runs())),
    "index truncated": lambda step: os.truncate(step / ".metadata", 500),
    "shard runs code": _file(SHARD, pickle.dumps(_Runs())),
}


def _index(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def rewrite(step: Path) -> None:
        index = pickle.loads((step / ".metadata").read_bytes())
        change(index)
        (step / ".metadata").write_bytes(pickle.dumps(index))

    return rewrite


def _places(**changes: Any) -> Callable[[Path], object]:
    def change(index: Any) -> None:
        for key, place in index.storage_data.items():
            index.storage_data[key] = replace(place, **changes)

    return _index(change)


NORM = "decoder.final_norm.weight"


def _norm(change: Callable[[Any, Any], object]) -> Callable[[Path], object]:
    """A change of the index's entry of one tensor and its first chunk."""
    return _index(
        lambda index: change(
            index.state_dict_metadata[NORM], index.state_dict_metadata[NORM].chunks[0]
        )
    )


def _swap_two(index: Any) -> None:
    """Two tensors whose places are exchanged: every byte is there, under another name."""
    norm, other = (
        next(key for key in index.storage_data if key.fqn == name)
        for name in (NORM, "output_layer.weight")
    )
    places = index.storage_data
    places[norm], places[other] = places[other], places[norm]


FORGED |= {
    "place outside": _places(relative_path="../../../../etc/passwd"),
    "place absolute": _places(relative_path="/etc/passwd"),
    "place unlisted": _places(relative_path="__9_0.distcp"),
    "place long": _places(relative_path="x" * 100_000),
    "place not a number": _places(offset=float("nan")),
    "place negative": _places(offset=-1),
    "place huge": _places(length=2**60),
    "place short": _places(length=8),
    "place empty": _places(length=0),
    "place transformed": _places(transform_descriptors=("zstd",)),
    "places swapped": _index(_swap_two),
    "no places": _index(lambda index: index.storage_data.clear()),
    "no tensors": _index(lambda index: index.state_dict_metadata.clear()),
    "tensor gone": _index(lambda index: index.state_dict_metadata.pop(NORM)),
    "shape huge": _norm(lambda entry, chunk: setattr(entry, "size", torch.Size([2**62]))),
    "shape another": _norm(lambda entry, chunk: setattr(entry, "size", torch.Size([8, 8]))),
    "chunk elsewhere": _norm(lambda entry, chunk: setattr(chunk, "offsets", torch.Size([1]))),
    "chunk shorter": _norm(lambda entry, chunk: setattr(chunk, "sizes", torch.Size([63]))),
    "chunk twice": _norm(lambda entry, chunk: entry.chunks.append(chunk)),
    "no chunks": _norm(lambda entry, chunk: entry.chunks.clear()),
    "dtype another": _norm(lambda entry, chunk: setattr(entry.properties, "dtype", torch.int8)),
    "dtype text": _norm(lambda entry, chunk: setattr(entry.properties, "dtype", "float32")),
}


def _config(**changes: Any) -> Callable[[Path], object]:
    def change(step: Path) -> None:
        path = step.parent.parent / "config.yaml"
        config = yaml.safe_load(path.read_text())
        for knob, value in changes.items():
            *above, name = knob.split("__")
            table = config
            for part in above:
                table = table[part]
            table[name] = value
        path.write_text(yaml.safe_dump(config))

    return change


def _both(model: str, value: Any) -> Callable[[Path], object]:
    """The same impossible number in config.yaml and in progress.json."""

    def change(step: Path) -> None:
        _config(**{f"model__{model}": value})(step)
        fields = json.loads((step / "progress.json").read_text())
        fields["model"][model] = value
        (step / "progress.json").write_text(json.dumps(fields))
        forge(step)

    return change


RUN_FILES: dict[str, Callable[[Path], object]] = {
    "config missing": lambda step: (step.parent.parent / "config.yaml").unlink(),
    "config empty": lambda step: (step.parent.parent / "config.yaml").write_text(""),
    "config garbage": lambda step: (step.parent.parent / "config.yaml").write_text("{: ["),
    "config a list": lambda step: (step.parent.parent / "config.yaml").write_text("- 1"),
    "config bytes": lambda step: (step.parent.parent / "config.yaml").write_bytes(b"\xff\x00"),
    "config deep": lambda step: (step.parent.parent / "config.yaml").write_text("[" * 5000),
    "config a folder": lambda step: (
        (step.parent.parent / "config.yaml").unlink(),
        (step.parent.parent / "config.yaml").mkdir(),
    ),
    "config of another model": _config(model__hidden_size=128),
    "config with a wrong type": _config(model__hidden_size="wide"),
    "config with no model": _config(model=None),
    "hidden size negative": _both("hidden_size", -64),
    "hidden size zero": _both("hidden_size", 0),
    "hidden size huge": _both("hidden_size", 2**62),
    "another hidden size": _both("hidden_size", 128),
    "another vocabulary": _both("vocab_size", 1024),
    "no layers": _both("pattern", ""),
    "unknown layers": _both("pattern", "MXM"),
    "fewer layers": _both("pattern", "M"),
    "lineage garbage": lambda step: (step.parent.parent / "lineage.json").write_text("{"),
    "lineage a list": lambda step: (step.parent.parent / "lineage.json").write_text("[1]"),
    "lineage deep": lambda step: (step.parent.parent / "lineage.json").write_text("[" * 100_000),
    "import a number": lambda step: (step.parent.parent / "lineage.json").write_text(
        '{"imported_from": 1}'
    ),
    "record garbage": lambda step: (step.parent.parent / "checkpoints.jsonl").write_bytes(b"\xff"),
    "record a folder": lambda step: (
        (step.parent.parent / "checkpoints.jsonl").unlink(),
        (step.parent.parent / "checkpoints.jsonl").mkdir(),
    ),
}

CASES = {
    **{f"damaged: {name}": harm for name, harm in DAMAGED.items()},
    **{
        f"forged: {name}": lambda step, harm=harm: (harm(step), forge(step))
        for name, harm in FORGED.items()
    },
    **RUN_FILES,
}
VERBS = {
    "to-hf": ["convert", "to-hf", f"{RUN}@2", "--out", "made/out"],
    "merge": ["convert", "merge", f"{RUN}@2", "output=made/out"],
    "generate": ["generate", f"{RUN}@2", "prompt=x", "max_new_tokens=1"],
    "branch": ["pretrain", f"branch={RUN}@2", "name=from_hurt", "folder=made"],
}


def everything() -> set[str]:
    """Every path in the folders where the verbs could leave something."""
    return {str(p) for folder in (".", "runs") for p in Path(folder).iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_every_verb_gives_the_same_line(
    run: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    CASES[case](run / STEP)
    before, lines = everything(), {}
    for verb, words in VERBS.items():
        if verb == "branch" and list(CASES).index(case) % 6:
            continue  # it composes a configuration first, which takes four times as long
        capfd.readouterr()
        code, error = main(words), capfd.readouterr().err
        assert (code, error.count("\n")) == (2, 1), f"{verb}: {error}"
        assert error.startswith("nemotron-train: ") and len(error) < 1000, f"{verb}: {error}"
        assert everything() == before, verb
        lines[verb] = error.removeprefix("nemotron-train: ")
    assert lines["to-hf"] == lines["merge"] == lines["generate"]
    if "branch" in lines and case not in RUN_FILES:
        assert lines["branch"] == f"branch={RUN}@2: {lines['merge']}"


def test_the_undamaged_run_is_taken_by_every_verb(run: Path) -> None:
    """So that the refusals above are not vacuous."""
    for words in VERBS.values():
        stop = ["train.stop_after_steps=1"] if words[0] == "pretrain" else []
        assert main([*words, *stop]) == (3 if stop else 0), words
        shutil.rmtree("made", ignore_errors=True)
