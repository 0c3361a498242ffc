"""`evaluate loss`. Second truth: the validation loss that the training logged, computed by the
training's own forward over packed rows; and the pieces of a row by hand.

Not covered: emulated formats, where activations are scaled token by token (test_one_truth.py has
the bound), several ranks.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nemotron_train.cli import main
from nemotron_train.data.batches import Batch
from nemotron_train.evaluate.knobs import LossConfig
from nemotron_train.evaluate.loss import evaluate_loss, pieces_of


def test_equals_the_logged_validation_loss(run: Path) -> None:
    logged = json.loads((run / "summary.json").read_text())["validation_loss"]
    (found,) = evaluate_loss(str(run), LossConfig(max_tokens=512, output="loss.json"))
    assert found.loss == pytest.approx(logged, rel=1e-5)
    written = json.loads(Path("loss.json").read_text())["folders"][0]
    assert written["loss"] == found.loss and written["tokens"] == found.tokens
    assert found.bits_a_byte == pytest.approx(found.loss * found.tokens / found.bytes / math.log(2))
    assert 0 < found.standard_error < 1


def test_all_rows_of_another_length_and_split(run: Path) -> None:
    knobs = LossConfig(max_tokens=0, sequence_length=32, split="validation", prefill_chunk=7)
    (short,) = evaluate_loss(str(run), knobs)
    rows = 2715 // 32  # of the small corpus's 2,716 validation tokens
    assert 0.8 * rows * 32 < short.tokens <= rows * 32
    (train,) = evaluate_loss(str(run), LossConfig(split="train", max_tokens=640))
    assert train.loss != short.loss


def test_pieces_are_the_counted_targets() -> None:
    tokens = np.array([[10, 11, 12, 20, 21, 30, 40, 41]])
    labels = np.array([[11, 12, 20, 21, 30, 40, 41, 42]])
    mask = np.array([[1, 1, 0, 1, 0, 0, 1, 1]], dtype=np.float32)
    documents = np.array([[0, 0, 0, 1, 1, 2, 3, 3]])
    batch = Batch(tokens, labels, mask, documents, np.array([0]), np.zeros((1, 3)))
    pieces, rows = pieces_of(batch)
    assert pieces == [[10, 11, 12], [20, 21], [40, 41, 42]] and rows == [0, 0, 0]
    assert sum(len(piece) - 1 for piece in pieces) == int(mask.sum())


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
