"""`evaluate nll-by-position`: bins and fit against closed forms; two openings of one checkpoint.

tests/generate/test_one_truth.py checks that scores equal training's forward pass. Not covered:
lengths at which memory matters (docs/long_context.md has runs), several ranks.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from nemotron_train.cli.data import run_prepare
from nemotron_train.cli.main import main
from nemotron_train.data.prepare import PrepareConfig
from nemotron_train.data.readers import TextDocuments
from nemotron_train.evaluate.knobs import PositionsConfig
from nemotron_train.evaluate.positions import evaluate_positions, fit_curve


def test_a_power_law_is_found_again() -> None:
    """Token NLLs whose cumulative mean is exactly 3 p^-0.1."""
    positions = np.arange(1, 5000)
    sums = 3 * positions**0.9
    nll_T = np.diff(sums, prepend=0)
    curve = fit_curve("x", 64, np.stack([nll_T, nll_T]), first_position=100)
    assert curve.slope == pytest.approx(-0.1, abs=1e-6)
    assert np.exp(curve.intercept) == pytest.approx(3, rel=1e-5)
    assert curve.r_squared == pytest.approx(1)
    assert curve.falls_to == curve.tokens - 1 == 4999
    first, last, mean, error = curve.octaves[5]
    assert (first, last, error) == (32, 63, 0)
    assert mean == pytest.approx(nll_T[31:63].mean())
    assert curve.cumulative[-1] == [4999, pytest.approx(3 * 4999**-0.1)]


def test_the_error_of_an_octave_is_that_of_its_mean_over_documents() -> None:
    """By hand: documents at 1, 2, 3 and 6 nats have a variance of 14 / 3, and the mean of four a
    standard error of sqrt(14 / 3 / 4)."""
    levels = np.array([1.0, 2.0, 3.0, 6.0])
    curve = fit_curve("x", 64, levels[:, None] * np.ones(100), first_position=1)
    for _, _, mean, error in curve.octaves:
        assert (mean, error) == pytest.approx((3, (14 / 3 / 4) ** 0.5))


def test_a_rise_is_told() -> None:
    nll_DT = np.array([[4.0] + [3.0] * 2 + [2.0] * 4 + [2.5] * 8 + [1.0] * 16])
    curve = fit_curve("x", 64, nll_DT, first_position=1)
    assert [octave[2] for octave in curve.octaves] == [4, 3, 2, 2.5, 1]
    assert curve.falls_to == 7


def test_documents_long_enough_are_read_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    for package, count in (("long", 8), ("longer", 9), ("short", 1)):
        for number in range(count):
            path = texts / package / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{package} {number} " * 60)
    run_prepare(
        PrepareConfig(
            input=str(texts),
            output=str(tmp_path / "data"),
            tokenizer="data/tokenizer",
            text_documents=TextDocuments.package,
            validation_fraction=0.0,
            workers=1,
        )
    )
    knobs = PositionsConfig(
        data=[str(tmp_path / "data")],
        split="train",
        documents=2,
        max_tokens=1500,
        first_position=16,
        prefill_chunk=100,
        output=str(tmp_path / "out/curves"),
    )
    first, second = evaluate_positions([str(run), f"{run}@10"], knobs)
    assert first.octaves == second.octaves and first.tokens == 1500 and first.documents == 2
    written = json.loads((tmp_path / "out/curves.json").read_text())
    assert written[0]["octaves"] == first.octaves
    assert (tmp_path / "out/curves.png").stat().st_size > 10_000
    words = ["evaluate", "nll-by-position", str(run), f"data={tmp_path / 'data'}", "split=train"]
    capsys.readouterr()
    assert main([*words, "max_tokens=1500", "documents=3"]) == 2
    assert "has 2 documents that long; the longest have" in capsys.readouterr().err
    assert main([*words, "max_tokens=16"]) == 2
    assert "max_tokens=16: give 256 or more" in capsys.readouterr().err
