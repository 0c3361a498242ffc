"""Every bad input of a run gives exit code 2 and one line that names the knob or the file.

The parts have their own tests. Here the command runs as a user types it, in this process. Nothing
may be left where the run folder would be. Not covered: errors on one rank of several.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.data.batches import BatchSource

Small = tuple[Path, list[str]]


def refuse(
    overrides: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """`pretrain` with `overrides` must exit with 2 and print `words` in a single line."""
    assert main(["pretrain", *overrides]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1, message
    assert "Traceback" not in message
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=64", ("model.hiden_size", "hidden_size")),
        ("model.pattern=MEX*E", ("model.pattern", "X")),
        ("model.mamba.groups=3", ("model.mamba.groups", "3")),
        ("model.attention.key_value_heads=3", ("key_value_heads", "3")),
        ("parallel.tensor=8", ("parallel.tensor",)),
        ("train.global_batch_tokens=1000", ("train.global_batch_tokens", "1000")),
        ("train.sequence_length=-64", ("train.sequence_length",)),
        ("train.total_tokens=many", ("train.total_tokens", "many")),
        ("optim.decay_style=square", ("optim.decay_style", "square")),
        ("model.moe.experts_per_token=99", ("experts_per_token", "99")),
        ("name=../x", ("name",)),
        ("data.phases=[]", ("data.phases",)),
        ("data.tokenizer=nowhere", ("nowhere",)),
        ("precision=fp2", ("precision", "fp2")),
        ("parallel.distributed_optimizer=false precision=bf16", ("distributed_optimizer", "bf")),
    ],
)
def test_configuration(
    override: str,
    words: tuple[str, ...],
    small_run: Small,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, overrides = small_run
    monkeypatch.chdir(folder)
    refuse([*overrides, "name=refused", *override.split()], words, capsys)
    assert not Path("runs/refused").exists()


def test_resume_folder_missing(capsys: pytest.CaptureFixture[str]) -> None:
    refuse(["resume=runs/nowhere"], ("runs/nowhere",), capsys)


def copy_of_data(small_run: Small, tmp_path: Path) -> Path:
    shutil.copytree(small_run[0] / "data", tmp_path / "data")
    return tmp_path / "data"


def test_missing_shard(
    small_run: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    shard = next(copy_of_data(small_run, tmp_path).glob("train*.bin"))
    shard.unlink()
    monkeypatch.chdir(tmp_path)
    refuse(small_run[1], (shard.name,), capsys)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_shard(
    suffix: str, small_run: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    shard = next(copy_of_data(small_run, tmp_path).glob(f"train*{suffix}"))
    os.truncate(shard, shard.stat().st_size - 2)
    monkeypatch.chdir(tmp_path)
    refuse(small_run[1], (shard.stem,), capsys)


def zeros(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("change", "split"), [(zeros, "train"), (half, "train"), (Path.unlink, "validation")]
)
def test_shard_that_changes_under_the_run(
    change, split: str, small_run: Small, tmp_path: Path, capsys, monkeypatch
) -> None:
    """After three steps of six. The checkpoint of step 2 stays, the resume is refused as well, and
    with the shard put back the run ends as if nothing had been."""
    shard = copy_of_data(small_run, tmp_path) / f"{split}_00000.bin"
    before = shard.read_bytes()
    monkeypatch.chdir(tmp_path)
    words = [*small_run[1], "train.total_tokens=1536", "train.save_every_steps=2", "name=x"]
    take, steps = BatchSource.take, []

    def counted(source: BatchSource, *place):
        taken = take(source, *place)
        steps.append(source._split)
        if steps.count("train") == 3 and len(steps) == 3:
            change(shard)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(BatchSource, "take", counted)
        refuse(words, (str(shard.relative_to(tmp_path)),), capsys)
    saved = sorted(path.name for path in Path("runs/x/checkpoints").iterdir())
    assert saved == [f"step_{step:08d}" for step in ((2,) if split == "train" else (2, 4))]
    refuse(words, (shard.name,), capsys)
    shard.write_bytes(before)
    assert main(["pretrain", *words]) == 0
    written = [path for path in Path("runs/x").rglob("*.json*") if path.is_file()]
    assert len(written) > 9
    for path in written:  # strict: the model's own configuration has an infinity
        for text in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.loads(text, parse_constant=pytest.fail)


def test_tokenizer_larger_than_the_model(
    small_run: Small, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(small_run[0])
    refuse([*small_run[1], "model.vocab_size=256"], ("512", "256"), capsys)
