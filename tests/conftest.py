"""Fixtures shared by tests of several folders."""

import io
import json
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemotron_train.platform import device
from nemotron_train.run_folder.metric_groups import is_timing

device.prepare()  # before a test module imports Megatron-Core

SMALL_RUN = [
    "model.hidden_size=64",
    "model.vocab_size=512",
    "model.attention.heads=4",
    "model.attention.head_dim=16",
    "model.mamba.heads=4",
    "model.mamba.head_dim=16",
    "model.mamba.state_size=16",
    "model.mamba.chunk_size=16",
    "model.moe.experts=8",
    "model.moe.expert_hidden_size=32",
    "model.moe.shared_expert_hidden_size=64",
    "model.moe.latent_size=32",
    "train.total_tokens=2560",
    "train.sequence_length=64",
    "train.global_batch_tokens=256",
    "train.micro_batch_sequences=4",
    "train.validation_tokens=512",
    "train.validate_every_steps=0",
    "optim.warmup_tokens=512",
    "optim.decay_tokens=1024",
    "data=prepared",
    "data.tokenizer=data/tokenizer",
    "data.phases=[{from_tokens: 0, blend: [{path: data, weight: 1.0}]}]",
    "data.validation=[{path: data, weight: 1.0}]",
]


def checkpoint_texts(step: int, model: dict | None = None) -> dict[str, str]:
    """File name -> text of the JSON files that every checkpoint has, as a converter writes them."""
    data = {"split": "train", "sequence_length": 1, "seed": 1, "fingerprint": "", "samples": 0}
    data |= {"phase": 0, "phase_drawn": {}, "drawn": {}}
    progress = {"step": step, "tokens": step, "data": data, "model": model or {}}
    tensors = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    contents = {"progress.json": progress, "about.json": {}, "metadata.json": tensors}
    return {name: json.dumps(content) for name, content in contents.items()}


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with prepared data (short documents packed several to a row), and the overrides of a
    run there that uses every feature and takes seconds."""
    from nemotron_train.cli.data import run_prepare
    from nemotron_train.data.prepare import PrepareConfig

    folder = tmp_path_factory.mktemp("small_run")
    lines = [line for line in Path(json.__file__).read_text().splitlines() if line.strip()]
    lines += [line for line in Path(textwrap.__file__).read_text().splitlines() if line.strip()]
    with open(folder / "text.jsonl", "w") as file:
        for start in range(0, len(lines) - 3, 2):
            file.write(json.dumps({"text": "\n".join(lines[start : start + 3])}) + "\n")
    run_prepare(
        PrepareConfig(
            input=str(folder / "text.jsonl"),
            output=str(folder / "data"),
            train_tokenizer_vocab_size=512,
            validation_fraction=0.1,
            workers=1,
        )
    )
    return folder, SMALL_RUN


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict]]:
    """Reads the lines of a run folder's metrics.jsonl, without the timings."""
    return _metrics


@pytest.fixture(scope="session")
def weights() -> Callable[[Path, int], dict[str, object]]:
    """Reads the contents of a run folder's checkpoint of a step."""
    return _weights


def _metrics(folder: Path) -> list[dict]:
    """All lines, without the timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in rows]


def _weights(folder: Path, step: int) -> dict[str, object]:
    """Every saved tensor (its bytes), every other saved value, and the data cursor.

    Values are compared, not their pickles. A pickle also records which equal strings were one
    object, and in that a loaded state differs from one that was never saved."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    saved: dict[str, object] = {"progress": (checkpoint / "progress.json").read_text()}
    for index, place in FileSystemReader(checkpoint).read_metadata().storage_data.items():
        with open(checkpoint / place.relative_path, "rb") as file:
            file.seek(place.offset)
            content: object = file.read(place.length)
        if index.offset is None:
            content = torch.load(io.BytesIO(content), weights_only=True)
        saved[f"{index.fqn} {index.offset}"] = content
    return saved


@pytest.fixture(scope="module")
def groups() -> Iterator[object]:
    """Megatron's process groups over this one process. New in each module, since a run in this
    process ends them."""
    from nemotron_train.platform import device

    platform = device.prepare()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_train.config.schema import ParallelConfig
    from nemotron_train.platform import groups as process_groups

    started = process_groups.start(ParallelConfig(), platform.backend)
    model_parallel_cuda_manual_seed(1234)
    yield started
    process_groups.stop()


@pytest.fixture(scope="module")
def in_small_run(small_run: tuple[Path, list[str]]) -> Iterator[None]:
    """Changes to the small run's folder; at the end restores the signal handlers that runs in this
    process replace."""
    from nemotron_train.train.stop import SIGNALS

    before, handlers = Path.cwd(), [(number, signal.getsignal(number)) for number in SIGNALS]
    os.chdir(small_run[0])
    yield
    os.chdir(before)
    for number, handler in handlers:
        signal.signal(number, handler)
