"""`evaluate loss`, of the main head and of every multi-token-prediction head.

Second truth: the validation losses that training logged. Not covered: several ranks, emulated
formats.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nemotron_train.cli.main import main
from nemotron_train.data.batches import Batch
from nemotron_train.data.tokenize import load_tokenizer
from nemotron_train.evaluate.knobs import LossConfig
from nemotron_train.evaluate.loss import evaluate_loss, target_bytes
from nemotron_train.evaluate.text_bytes import TokenBytes


def test_equals_the_logged_validation_loss(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (logged,) = (row for line in lines if "validation_loss" in (row := json.loads(line)))
    (found,) = evaluate_loss(str(run), LossConfig(max_tokens=512, output="loss.json"))
    assert found.loss == pytest.approx(logged["validation_loss"], rel=1e-6)
    assert found.depths == pytest.approx(
        [logged["validation_mtp_loss_1"], logged["validation_mtp_loss_2"]], rel=1e-6
    )
    written = json.loads(Path("loss.json").read_text())["folders"][0]
    assert written["loss"] == found.loss and written["tokens"] == found.tokens
    assert found.bits_a_byte == pytest.approx(found.loss * found.tokens / found.bytes / math.log(2))
    assert 0 < found.standard_error < 1


def test_all_rows_of_another_length_and_split(run: Path) -> None:
    knobs = LossConfig(max_tokens=0, sequence_length=32, split="validation")
    (short,) = evaluate_loss(str(run), knobs)
    rows = 2715 // 32  # the small corpus has 2,716 validation tokens
    assert 0.8 * rows * 32 < short.tokens <= rows * 32
    (train,) = evaluate_loss(str(run), LossConfig(split="train", max_tokens=640))
    assert train.loss != short.loss


def test_the_standard_error_is_the_bootstraps(run: Path) -> None:
    """Second truth: the spread of the loss when the passes of four rows are drawn again with
    replacement. Their sums are the differences of the losses of 1, 2, ... passes. Over n passes the
    bootstrap is a few percent off."""
    passes = [evaluate_loss(str(run), LossConfig(max_tokens=256 * n))[0] for n in range(1, 11)]
    sums = np.diff([0.0, *(found.loss * found.tokens for found in passes)])
    counts = np.diff([0, *(found.tokens for found in passes)])
    drawn = np.random.default_rng(0).integers(len(passes), size=(4000, len(passes)))
    losses = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert passes[-1].standard_error == pytest.approx(losses.std(), rel=0.1)


def test_bytes_are_those_of_the_targets() -> None:
    """Labels after the end of a document are not targets, and the end is not text. 漢 is cut at a
    row's end."""
    loaded = load_tokenizer(Path("data/tokenizer"))
    ids = loaded.encode("def f(x): 漢")
    end = loaded.tokenizer.token_to_id("<|endoftext|>")
    whole, cut = np.array([*ids, end, *ids]), np.array([end, *ids, *ids[:-1], end])
    labels = np.stack([whole, cut])
    mask = np.ones(labels.shape, dtype=np.float32)
    mask[0, len(ids) + 1 :] = 0
    batch = Batch(labels, labels, mask, np.zeros_like(labels), np.arange(2), np.zeros((2, 3)))
    assert len(ids) > 3 and len("漢".encode()) == 3
    assert target_bytes(batch, TokenBytes(loaded)) == 3 * len("def f(x): 漢".encode()) - 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/none"], "runs/none: no such run folder"),
        (["max_tokens=1"], "one run is needed"),
        (["runs/evaluated", "runs/other"], "one run is needed"),
        (["runs/evaluated", "split=test"], "split=test: prepared data has train and validation"),
        (["runs/evaluated", "max_tokens=-1"], "max_tokens=-1: give 0 or more"),
        (["runs/evaluated", "data=nowhere"], "nowhere"),
        (["runs/evaluated", "colour=red"], "colour"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "loss", *words]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1, shown
