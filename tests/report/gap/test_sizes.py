"""Gaps against size: the slope against NumPy's polynomial fit and simulated noise, the runs that
make up a size, the printed sentence. Not covered: the look of the picture.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nemotron_train.cli.main import main
from nemotron_train.report.gap.pairs import read_sweep
from nemotron_train.report.gap.sizes import Size, by_size, is_final, slope, slope_sentence
from tests.report.made_up import make_run

ACTIVE = (700_000, 1_700_000, 3_000_000)


def sizes_of(gaps: list[list[float]]) -> list[Size]:
    return [Size(a, g, [v + 1 for v in g]) for a, g in zip(ACTIVE, gaps, strict=True)]


def test_slope_is_that_of_least_squares() -> None:
    sizes = sizes_of([[0.3, 0.1], [0.4, 0.2, 0.25], [0.5]])
    found = slope(sizes, validation=True)
    assert found is not None
    x = [math.log2(size.active) for size in sizes for _ in size.validation]
    y = [value for size in sizes for value in size.validation]
    (value, _), covariance = np.polyfit(x, y, 1, cov=True)  # error scaled by n - 2, as in our code
    error = 2.776 * math.sqrt(covariance[0, 0])  # Student's t for 4 degrees of freedom
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx((value - error, value + error))
    training = slope(sizes, validation=False)
    assert training is not None and training.value == pytest.approx(value), "shifted by one"


def test_too_little_has_no_slope() -> None:
    two = sizes_of([[0.3, 0.1], [0.4, 0.2], [0.5]])[:2]
    assert slope(two, validation=True) is None and slope_sentence("plan", two) == ""
    assert slope(sizes_of([[], [0.1], [0.2]]), validation=True) is None


def test_the_interval_covers() -> None:
    """95 % intervals of a slope of 0.2, over 2,000 draws of noise. Two standard errors of the count
    are 1 %."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        gaps = [list(0.2 * math.log2(a) + 0.3 * draw.standard_normal(3)) for a in ACTIVE]
        found = slope(sizes_of(gaps), validation=True)
        assert found is not None
        covered += found.low <= 0.2 <= found.high
    assert 0.94 < covered / 2000 < 0.96


@pytest.mark.parametrize(
    "gaps, words",
    [
        ([[0.1, 0.11], [0.2, 0.21], [0.3, 0.31]], "grows with the model"),
        ([[0.3, 0.31], [0.2, 0.21], [0.1, 0.11]], "shrinks as the model grows"),
        ([[0.3, 0.0], [0.2, 0.1], [0.0, 0.4]], "cannot be said to grow or shrink"),
    ],
)
def test_sentence(gaps: list[list[float]], words: str) -> None:
    said = slope_sentence("nvfp4_all", sizes_of(gaps))
    assert words in said and "final validation loss" in said and "factor of 4.3" in said
    going = [Size(size.active, [], size.training) for size in sizes_of(gaps)]
    assert not is_final(going) and "so far" in slope_sentence("nvfp4_all", going)


def test_a_sweep_of_sizes_is_reported(tmp_path: Path) -> None:
    """Three widths with two seeds, each plan compared with the BF16 run of its own width."""
    cells = []
    for width, gap in ((64, 0.01), (128, 0.02), (192, 0.03)):
        for plan in ("bf16", "nvfp4_all"):
            for seed in (1, 2):
                name = f"w{width}-{plan}-seed{seed}"
                knobs = (f"model.hidden_size={width}", f"precision={plan}", f"train.seed={seed}")
                run = make_run(tmp_path / name, *knobs)
                loss = 4.0 + 0.1 * seed
                loss *= 1 + gap * (plan != "bf16") * (1 + 0.01 * seed)
                summary = {"finished": True, "validation_loss": loss}
                (run / "summary.json").write_text(json.dumps(summary))
                group, baseline = f"w{width}-{plan}", f"w{width}-bf16"
                cells.append({"name": name, "group": group, "seed": seed, "baseline": baseline})
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells}))
    found = by_size(read_sweep(tmp_path))
    assert list(found) == ["nvfp4_all"]
    active = [size.active for size in found["nvfp4_all"]]
    assert active == sorted(active) and len(active) == 3
    assert found["nvfp4_all"][0].validation == pytest.approx([1.01, 1.02])
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "gap_sizes.png").read_bytes().startswith(b"\x89PNG")
    said = "nvfp4_all: the gap of the final validation loss grows with the model"
    assert said in (tmp_path / "gap.md").read_text()
    assert said in (tmp_path / "report.html").read_text()
    assert f"{active[0]:,}" in (tmp_path / "report.html").read_text()


def test_other_models_against_one_baseline_are_no_sizes(tmp_path: Path) -> None:
    """Two expert widths compared with a third: the model differs, not its size."""
    cells = []
    for width in (64, 128, 192):
        run = make_run(tmp_path / f"e{width}", f"model.moe.expert_hidden_size={width}")
        cells.append({"name": run.name, "group": run.name, "seed": 1})
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells, "baseline": "e64"}))
    assert by_size(read_sweep(tmp_path)) == {}
