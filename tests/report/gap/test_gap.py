"""Loss gaps against arithmetic done by hand on made-up runs; trend, interval and verdict against
other definitions and simulated noise. Not covered: the look of the picture, and whether a published
gap would be found.
"""

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.cli.main import main
from nemotron_train.config.errors import ConfigError
from nemotron_train.report.gap.gap import (
    Gap,
    Noise,
    Trend,
    curve,
    gaps,
    interval,
    mean_and_error,
    noise,
    theil_sen,
    trend_of,
)
from nemotron_train.report.gap.pairs import Comparison, find_pairs, read_sweep
from nemotron_train.report.gap.verdict import judge
from nemotron_train.report.plot.gap import plot_gaps
from nemotron_train.report.runs.read import Run, read_run

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


def the_one(folder: Path) -> Comparison:
    [comparison] = read_sweep(folder)
    return comparison


def test_pairs_by_seed(sweep_folder: Path) -> None:
    """Seed 3 has no counterpart and does not count. 1 % and 3 % give 2 % with a standard error of 1
    %."""
    found = gaps(the_one(sweep_folder))
    assert [gap.group for gap in found] == ["full", "four_bits"], "the baseline leads"
    assert found[1].seeds == [1, 2]
    assert found[1].validation == pytest.approx([0.01, 0.03])
    assert found[1].training == pytest.approx([0.01, 0.0])
    assert mean_and_error(found[1].validation) == pytest.approx((0.02, 0.01))
    assert found[1].loss == pytest.approx(4.08)


def test_unfinished_runs_do_not_count(sweep_folder: Path) -> None:
    path = sweep_folder / "four_bits-seed2/summary.json"
    path.write_text(json.dumps({"finished": False, "validation_loss": 1.0}))
    found = gaps(the_one(sweep_folder))
    assert found[1].validation == pytest.approx([0.01]), "no validation gap while a run is going"
    assert found[1].seeds == [1, 2], "its training loss can be compared all the same"
    assert math.isnan(mean_and_error(found[1].validation)[1]), "one value has no standard error"


def test_draws_with_one_seed_and_several(sweep_folder: Path) -> None:
    picture = plot_gaps(sweep_folder / "gap.png", read_sweep(sweep_folder))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(sweep_folder.glob(".gap*"))


def test_report_shows_a_sweep(sweep_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command tells a sweep's folder from a run's, and accepts both at once."""
    assert main(["report", str(sweep_folder), str(sweep_folder / "full-seed1")]) == 0
    shown = capsys.readouterr().out
    assert "+2.000 ± 1.000" in shown.replace("\n", "") and "full-seed1" in shown
    assert "not apart from full" in shown, "1 % and 3 % leave zero within Student's interval"
    assert (sweep_folder / "full-seed1/loss.png").exists()
    assert "+2.000 ± 1.000" in (sweep_folder / "gap.md").read_text()
    assert (sweep_folder / "report.html").exists()


def test_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.json"):
        read_sweep(tmp_path)


def test_a_sweep_of_no_baseline_yet_is_shown(
    sweep_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the first runs are going there is nothing to compare with. The page is still
    written."""
    for seed in (1, 2):
        (sweep_folder / f"full-seed{seed}/metrics.jsonl").unlink()
    assert main(["report", str(sweep_folder)]) == 0
    assert "no run of the baseline full to compare with yet" in capsys.readouterr().out
    assert (sweep_folder / "report.html").exists() and not (sweep_folder / "gap.md").exists()


def test_a_sweep_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    cells = [{"name": "../other", "group": "a", "seed": 1}]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells, "baseline": "a"}))
    with pytest.raises(ConfigError, match="no run in the folder"):
        read_sweep(tmp_path)


def test_each_group_has_a_baseline_of_its_own(tmp_path: Path) -> None:
    """Two sizes, each compared with its own baseline: -10 % and +25 % by hand."""
    losses = {"small-four": 3.6, "small-full": 4.0, "large-four": 2.5, "large-full": 2.0}
    cells = []
    for group, loss in losses.items():
        baseline = f"{group.partition('-')[0]}-full"
        cells.append({"name": group, "group": group, "seed": 1, "baseline": baseline})
        (tmp_path / group).mkdir()
        row = {"step": 1, "tokens": 10, "loss": loss}
        (tmp_path / group / "metrics.jsonl").write_text(json.dumps(row))
        summary = {"finished": True, "validation_loss": loss}
        (tmp_path / group / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells, "baseline": "full"}))
    small, large = (gaps(each) for each in read_sweep(tmp_path))
    assert [gap.group for gap in [*small, *large]] == [
        "small-full", "small-four", "large-full", "large-four",
    ]  # fmt: skip
    assert small[1].validation + large[1].validation == pytest.approx([-0.1, 0.25])


def write_run(folder: Path, tokens: np.ndarray, losses: np.ndarray) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "tokens": int(token), "loss": float(loss)}
        for step, (token, loss) in enumerate(zip(tokens, losses, strict=True), start=1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_branch_is_compared_where_it_has_steps(tmp_path: Path) -> None:
    """The trunk's loss falls by one per step. The branch, from step 30 on, is 1 below it at every
    step. The mean over the trunk's last tenth (steps 37 to 40) is 61.5, the branch's 60.5. The
    branch's own last tenth would be step 40 alone."""
    steps = np.arange(1.0, 41)
    write_run(tmp_path / "trunk", steps, 100 - steps)
    write_run(tmp_path / "branch", steps[30:], 99 - steps[30:])
    runs = {name: {1: read_run(tmp_path / name)} for name in ("trunk", "branch")}
    comparison = Comparison("a", "trunk", runs)
    [_, branch] = gaps(comparison)
    assert branch.training == pytest.approx([60.5 / 61.5 - 1])
    found = curve(comparison.pairs("branch"))
    assert found is not None and found.tokens.tolist() == list(range(31, 41))
    assert found.raw == pytest.approx(-100 / (100 - found.tokens))


def test_the_error_of_a_curve_is_the_standard_error_of_its_mean(tmp_path: Path) -> None:
    """Constant losses, so that smoothing changes nothing. Gaps of 1, 2, 3 and 6 percent have a mean
    of 3, a variance of 14 / 3 and, over four seeds, a standard error of sqrt(14 / 3 / 4)."""
    steps = np.arange(1.0, 41)
    groups: dict[str, dict[int, Run]] = {"full": {}, "four": {}}
    for seed, percent in enumerate((1.0, 2.0, 3.0, 6.0)):
        for group, loss in (("full", 4.0), ("four", 4.0 * (1 + percent / 100))):
            write_run(tmp_path / f"{group}{seed}", steps, np.full(40, loss))
            groups[group][seed] = read_run(tmp_path / f"{group}{seed}")
    found = curve(Comparison("a", "full", groups).pairs("four"))
    assert found is not None
    np.testing.assert_allclose(found.smooth, 3.0, rtol=1e-9)
    np.testing.assert_allclose(found.error, np.sqrt(14 / 3 / 4), rtol=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_theil_sen_is_the_median_slope(values: list[float]) -> None:
    """Second truth: the definition, pair by pair."""
    x = np.arange(float(len(values))) ** 2
    slopes = [
        (values[b] - values[a]) / (x[b] - x[a])
        for a, b in itertools.combinations(range(len(values)), 2)
    ]
    assert theil_sen(x, np.array(values)) == pytest.approx(statistics.median(slopes))


def test_the_trend_of_a_gap_that_grows_by_the_doubling(tmp_path: Path) -> None:
    """A gap of 0.5 % that grows by 0.2 points per doubling of the tokens, with a spike that must
    not count. Closed form: the slope is 0.2."""
    tokens = 2048 * np.arange(1.0, 2001)
    gap = 0.5 + 0.2 * np.log2(tokens / 2048)
    gap[1500:1510] += 50
    write_run(tmp_path / "ours", tokens, 3 * (1 + gap / 100))
    write_run(tmp_path / "twin", tokens, np.full(2000, 3.0))
    trend = trend_of([(read_run(tmp_path / "ours"), read_run(tmp_path / "twin"))])
    assert trend is not None and trend.slopes == pytest.approx([0.2], abs=0.01)
    assert trend.from_tokens == tokens[-1] / 2


def test_the_interval_of_three_numbers() -> None:
    """By hand: the mean of 1, 2, 3 is 2, its standard error 1/sqrt(3), Student's quantile 4.303."""
    assert interval([1, 2, 3]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert all(math.isnan(end) for end in interval([1]))


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 30])
def test_the_verdict_is_wrong_as_often_as_it_says(num_seeds: int) -> None:
    """If gaps are pure noise, one in twenty is reported as different from zero, whatever the number
    of seeds. With two seeds a normal quantile would report one in three."""
    generator, wrong = np.random.default_rng(num_seeds), 0
    for _ in range(4000):
        values = (generator.standard_normal(num_seeds) / 100).tolist()
        gap = Gap("a", list(range(num_seeds)), 4.0, values, values)
        wrong += judge(gap, Noise(), "b").level in ("worse", "better")
    assert wrong / 4000 == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("values", "spread", "level", "words"),
    [
        ([0.004, 0.0041, 0.0039], 0.06, "worse", "worse than bf16: +0.40 ± 0.01 %"),
        ([-0.004, -0.0041, -0.0039], 0.06, "better", "better than bf16"),
        ([0.004, 0.0041, 0.0039], 0.3, "same", "within twice the noise"),
        ([0.0058, 0.0007, 0.0004], 0.06, "same", "not apart from bf16: +0.23 ± 0.18 %"),
        ([0.004], 0.06, "unclear", "no error can be given"),
        ([], 0.06, "unclear", "no step yet"),
    ],
)
def test_verdicts(values: list[float], spread: float, level: str, words: str) -> None:
    gap = Gap("nvfp4", list(range(len(values))), 4.0, values, values, Trend([0.1, 0.2], 1.0))
    verdict = judge(gap, Noise("sums", spread, spread), "bf16")
    assert verdict.level == level and words in verdict.text
    if values:
        assert f"noise {spread:.2f} %" in verdict.text


def test_noise_from_repeats_and_from_seeds(tmp_path: Path) -> None:
    """Repeats that differ by +1 % and -1 % have a root mean square of 1 %. Without repeats the
    baseline's seeds at 2.97 and 3.03 spread by 0.06/sqrt(2)/3."""
    tokens = np.arange(1.0, 101)
    runs: dict[str, dict[int, object]] = {"full": {}, "again": {}}
    for seed, (loss, other) in enumerate([(2.97, 2.97 * 1.01), (3.03, 3.03 * 0.99)]):
        write_run(tmp_path / f"full{seed}", tokens, np.full(100, loss))
        write_run(tmp_path / f"again{seed}", tokens, np.full(100, other))
        runs["full"][seed] = read_run(tmp_path / f"full{seed}")
        runs["again"][seed] = read_run(tmp_path / f"again{seed}")
    comparison = Comparison("a", "full", runs, ("again",))  # type: ignore[arg-type]
    found = noise(comparison)
    assert found.source == "sums" and found.training == pytest.approx(1)
    assert found.band == pytest.approx(np.ones(100))
    found = noise(Comparison("a", "full", runs))  # type: ignore[arg-type]
    expected = 100 * 0.06 / 2**0.5 / 3
    assert found.source == "seeds" and found.training == pytest.approx(expected)
    assert found.band == pytest.approx(np.full(100, expected))


def test_plain_folders_are_paired(tmp_path: Path) -> None:
    """Runs that differ only in plan, seed and order of sums are counterparts. Another width is
    not."""
    import yaml

    from nemotron_train.compose.compose import compose_config
    from nemotron_train.config.knobs import to_plain

    runs = []
    for name, *overrides in (
        ("b1", "precision=bf16"),
        ("b1_sums", "precision=bf16", "train.micro_batch_sequences=4"),
        ("n1", "precision=nvfp4_all", "train.log_every_steps=2"),
        ("n2", "precision=nvfp4_all", "train.seed=2"),
        ("wide", "precision=nvfp4_all", "model.hidden_size=384"),
        ("f1", "precision=fp32"),
    ):
        write_run(tmp_path / name, np.arange(1.0, 11), np.full(10, 3.0))
        config = compose_config([f"name={name}", *overrides])
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
        runs.append(read_run(tmp_path / name))
    write_run(tmp_path / "old", np.arange(1.0, 11), np.full(10, 3.0))  # without a config.yaml
    [found] = find_pairs([*runs, read_run(tmp_path / "old")])
    assert found.baseline == "bf16" and next(iter(found.groups)) == "bf16"
    names = {g: {s: run.name for s, run in runs.items()} for g, runs in found.groups.items()}
    assert names["bf16"] == {1234: "b1"} and names["nvfp4_all"] == {1234: "n1", 2: "n2"}
    assert names["fp32"] == {1234: "f1"} and len(found.repeats) == 1
    assert {run.name for run in found.groups[found.repeats[0]].values()} == {"b1_sums"}
    assert list(found.pairs("nvfp4_all")) == [1234]
    assert find_pairs(runs[:2]) == [], "the same plan twice is no comparison"
