"""`convert merge`: values, memory, refused input, and a run that continues from the result.

Second truth: the mean in float64 of tensors read by torch's own loader; the weights of the branch
that starts from the merge. One rank writes. The format lets other layouts load the result; that is
not run here.
"""

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_train.cli.main import main
from nemotron_train.convert.checkpoint_tensors import CheckpointReader, CheckpointWriter
from nemotron_train.run_folder import integrity
from tests.conftest import checkpoint_texts

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]
Metrics = Callable[[Path], list[dict]]


@pytest.fixture(scope="module")
def parent(small_run: Small) -> Path:
    """Checkpoints at steps 2, 4 and 6 of a BF16 run: parameters and FP32 masters differ."""
    words = ["name=parent", "precision=bf16", "train.save_every_steps=2"]
    words += ["train.keep_checkpoints=9", "train.stop_after_steps=6"]
    assert main(["pretrain", *small_run[1], *words]) == 3
    return Path("runs/parent")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by pickle and torch.load instead of our reader."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    found = {}
    for index, place in metadata.storage_data.items():
        if index.offset is not None:
            content = (checkpoint / place.relative_path).read_bytes()
            part = content[place.offset : place.offset + place.length]
            found[index.fqn] = torch.load(io.BytesIO(part), weights_only=True)
    return found


def test_merge_is_the_weighted_mean_of_the_masters(parent: Path) -> None:
    words = [f"{parent}@{step}" for step in (6, 2, 4)]
    assert main(["convert", "merge", *words, "weights=linear", "output=runs/linear"]) == 0
    merged = Path("runs/linear/checkpoints/step_00000006")
    assert integrity.damage(merged) is None
    ours = tensors(merged)
    sources = [tensors(parent / "checkpoints" / f"step_{step:08d}") for step in (2, 4, 6)]
    names = {name for name in sources[0] if not name.startswith("optimizer.")}
    assert set(ours) == names
    for name in names:
        key = f"optimizer.state.param.{name}"
        parts = [source.get(key, source[name]).double() for source in sources]
        expected = (parts[0] + 2 * parts[1] + 3 * parts[2]) / 6
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-6, atol=1e-7)
    about = json.loads((merged / "about.json").read_text())
    assert about["optimizer"] is False and len(about["merged"]["of"]) == 3


def test_a_run_goes_on_from_a_merge(parent: Path, metrics: Metrics) -> None:
    """A merge of one checkpoint: the branch's first step starts from the same weights, so its loss
    equals the parent's. Its masters are the mean."""
    assert main(["convert", "merge", f"{parent}@4", "output=runs/alone"]) == 0
    words = ["name=from_alone", "train.stop_after_steps=1", "train.keep_checkpoints=9"]
    assert main(["pretrain", "branch=runs/alone@4", *words]) == 3
    row = [r for r in metrics(Path("runs/from_alone")) if r["step"] == 5][-1]
    parents = next(r for r in metrics(parent) if r["step"] == 5)
    assert row["loss"] == pytest.approx(parents["loss"], rel=1e-6)
    begun = tensors(Path("runs/from_alone/checkpoints/step_00000004"))
    merged = tensors(Path("runs/alone/checkpoints/step_00000004"))
    for name, tensor in merged.items():
        assert torch.equal(begun[name], tensor.to(begun[name].dtype)), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/parent@2"], "output is not set"),
        (["runs/parent@2", "output=runs/parent"], "is there already"),
        (["runs/parent@3", "output=runs/x"], "no checkpoint of step 3"),
        (["runs/parent@2", "runs/parent@2", "output=runs/x"], "token count"),
        (["runs/parent@2", "weights=wsd", "output=runs/x"], "two checkpoints"),
        (["runs/parent@2", "weights=best", "output=runs/x"], "weights"),
    ],
)
def test_refusals_leave_nothing(
    parent: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["convert", "merge", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/x").exists()


MEMORY = """
import resource, sys
from pathlib import Path
from nemotron_train.convert.merge import _mean
from nemotron_train.convert.checkpoint_tensors import CheckpointReader, CheckpointWriter

readers = [CheckpointReader(Path(path)) for path in sys.argv[2:]]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
writer = CheckpointWriter(Path(sys.argv[1]))
for name in readers[0].shapes:
    writer.write(name, _mean(readers, [1 / len(readers)] * len(readers), name))
writer.finish()
print(peak() - before)
"""


def test_memory_is_two_tensors(tmp_path: Path) -> None:
    """Five checkpoints of four 32 MB tensors: the peak is two tensors, for any number of
    checkpoints."""
    size = 32 * 2**20
    paths = []
    for step in range(1, 6):
        final = integrity.step_folder(tmp_path / str(step) / "checkpoints", step)
        partial = integrity.partial_folder(final)
        partial.mkdir(parents=True)
        _write_synthetic(partial, step, size // 4)
        integrity.commit(final, {}, lambda: None)
        paths.append(str(final))
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", MEMORY, str(out), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.5 * size, f"{int(done.stdout) / size:.2f} tensors"


def _write_synthetic(folder: Path, step: int, numbers: int) -> None:
    for name, text in checkpoint_texts(step).items():
        (folder / name).write_text(text)
    writer = CheckpointWriter(folder)
    for name in "abcd":
        writer.write(name, torch.full((numbers,), float(step)))
    writer.finish()


def test_chunks_of_a_sharded_tensor_are_put_together(tmp_path: Path) -> None:
    """Four ranks wrote one tensor in pieces, one file per rank."""
    whole = torch.arange(48.0).reshape(6, 8)
    final = integrity.step_folder(tmp_path / "checkpoints", 1)
    partial = integrity.partial_folder(final)
    partial.mkdir(parents=True)
    _write_chunks(partial, whole)
    for name, text in checkpoint_texts(1).items():
        (partial / name).write_text(text)
    integrity.commit(final, {}, lambda: None)
    assert torch.equal(CheckpointReader(final).read("w"), whole)


def _write_chunks(folder: Path, whole: torch.Tensor) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks: list[Any] = []
    places: dict[Any, Any] = {}
    for rank, (row, column) in enumerate([(0, 0), (0, 4), (3, 0), (3, 4)]):
        part, offsets = whole[row : row + 3, column : column + 4].clone(), torch.Size([row, column])
        path = folder / f"__{rank}_0.distcp"
        torch.save(part, path)
        chunks.append(ChunkStorageMetadata(offsets, part.shape))
        places[MetadataIndex("w", offsets)] = _StorageInfo(path.name, 0, path.stat().st_size)
    tensor = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": tensor}, storage_data=places)))
