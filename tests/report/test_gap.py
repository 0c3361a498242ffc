"""Loss gaps against arithmetic done by hand on made-up runs. Not covered: how the picture looks."""

import json
import math
from pathlib import Path

import pytest

from nemotron_train.cli import main
from nemotron_train.config.schema import ConfigError
from nemotron_train.report.gap import gaps, mean_and_error, plot_gaps, read_sweep

# group -> seed -> (validation loss, loss of every step)
LOSSES = {
    "four_bits": {1: (4.04, 5.05), 2: (4.12, 5.0), 3: (4.0, 5.0)},
    "full": {1: (4.0, 5.0), 2: (4.0, 5.0)},
}


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    cells = []
    for group, seeds in LOSSES.items():
        for seed, (validation, loss) in seeds.items():
            name = f"{group}-seed{seed}"
            cells.append({"name": name, "group": group, "seed": seed, "overrides": []})
            run = tmp_path / name
            run.mkdir()
            rows = [{"step": s, "tokens": 10 * s, "loss": loss} for s in range(1, 21)]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
            summary = {"finished": True, "validation_loss": validation}
            (run / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells, "baseline": "full"}))
    return tmp_path


def test_pairs_by_seed(sweep_folder: Path) -> None:
    """Seed 3 has no twin and does not count; 1 % and 3 % give 2 % with a standard error of 1 %."""
    found = gaps(*read_sweep(sweep_folder))
    assert [gap.group for gap in found] == ["full", "four_bits"], "the baseline leads"
    assert found[1].seeds == [1, 2]
    assert found[1].validation == pytest.approx([0.01, 0.03])
    assert found[1].training == pytest.approx([0.01, 0.0])
    assert mean_and_error(found[1].validation) == pytest.approx((0.02, 0.01))
    assert found[1].loss == pytest.approx(4.08)


def test_unfinished_runs_do_not_count(sweep_folder: Path) -> None:
    path = sweep_folder / "four_bits-seed2/summary.json"
    path.write_text(json.dumps({"finished": False, "validation_loss": 1.0}))
    found = gaps(*read_sweep(sweep_folder))
    assert found[1].seeds == [1]
    assert math.isnan(mean_and_error(found[1].validation)[1]), "one value has no standard error"


def test_draws_with_one_seed_and_several(sweep_folder: Path) -> None:
    picture = plot_gaps(sweep_folder, *read_sweep(sweep_folder))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(sweep_folder.glob(".gap*"))


def test_report_shows_a_sweep(sweep_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verb tells a sweep's folder from a run's, and takes both at once."""
    assert main(["report", str(sweep_folder), str(sweep_folder / "full-seed1")]) == 0
    shown = capsys.readouterr().out
    assert "+2.000 ± 1.000" in shown and "full-seed1" in shown
    assert (sweep_folder / "full-seed1/loss.png").exists()


def test_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.json"):
        read_sweep(tmp_path)
