"""A run to evaluate, trained once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_train.platform import device

device.prepare()


@pytest.fixture(scope="session")
def run(small_run: tuple[Path, list[str]]) -> Path:
    """A small run of ten steps, validated at its end. Tests work in the folder above it."""
    from nemotron_train.cli.main import main

    before = Path.cwd()
    os.chdir(small_run[0])
    assert main(["pretrain", *small_run[1], "name=evaluated"]) == 0
    os.chdir(before)
    return small_run[0] / "runs/evaluated"


@pytest.fixture(autouse=True)
def in_small_run(small_run: tuple[Path, list[str]], run: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(small_run[0])
    yield
    os.chdir(before)
