"""Fixtures that tests of several folders share."""

import json
import textwrap
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with prepared data, short documents packed several to a row, and the overrides of a
    run there with every ingredient that takes seconds."""
    from nemotron_train.data.commands import run_prepare
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
