"""Reading a run folder, its table and its picture. Not covered: the look of the picture."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from nemotron_train.cli.main import main
from nemotron_train.config.errors import ConfigError
from nemotron_train.report.plot.loss import format_tokens, plot_loss
from nemotron_train.report.runs.columns import parse_rows
from nemotron_train.report.runs.read import label_runs, read_run
from nemotron_train.report.runs.table import print_runs, run_tables, summarize
from nemotron_train.report.runs.thin import smoothed


def make_run(folder: Path, num_steps: int = 60, **summary: float) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, num_steps + 1):
        row = {"step": step, "tokens": 2048 * step, "loss": 3 + 5 / step, "lr": 1e-3}
        row |= {"tokens_per_second": 1000.0 + step}
        if step % 20 == 0:
            row["validation_loss"] = 3.1 + 5 / step
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_rows_survive_what_a_crash_leaves(tmp_path: Path) -> None:
    text = (
        '{"step": 2, "loss": 1.0}\n{"step": 1, "loss": 9.0}\n\nnot json\n[1]\n{"loss": 3}\n'
        '{"step": 2, "validation_loss": 4.0}\n{"step": 3, "loss": null}\n{"step": 4, "lo'
    )
    rows = parse_rows(text)
    assert rows == [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 1.0, "validation_loss": 4.0},
        {"step": 3, "loss": None},
    ]
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)
    (folder / "summary.json").write_text("{ torn")
    assert read_run(folder).summary == {}
    steps, losses = read_run(folder).series("loss", along="step")
    assert (steps.tolist(), losses.tolist()) == ([1, 2], [9.0, 1.0])


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no such run folder"):
        read_run(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no step yet"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "no step yet" in capsys.readouterr().err


values = st.lists(st.floats(-10, 10), min_size=1, max_size=40)


def test_a_run_that_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A branch that has just begun has no step; the runs beside it are shown all the same."""
    good = make_run(tmp_path / "runs" / "good")
    begun = tmp_path / "runs" / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text('{"kind": "branch", "step": 2, "tokens": 512}\n')
    assert main(["report", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert f"left out: {begun}" in printed and "122,880" in printed
    assert (good / "loss.png").exists()
    assert main(["report", str(begun)]) == 2


@given(values, st.integers(0, 10))
def test_smoothing_is_the_centred_mean(points: list[float], half_width: int) -> None:
    """Second truth: the definition, summed separately for each point."""
    for index, mean in enumerate(smoothed(points, half_width)):
        reach = min(half_width, index, len(points) - 1 - index)
        window = points[index - reach : index + reach + 1]
        assert mean == pytest.approx(sum(window) / len(window), abs=1e-9)


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 30), st.integers(0, 10))
def test_smoothing_does_not_lag(slope: float, start: float, count: int, half_width: int) -> None:
    """A straight line is unchanged, up to both ends."""
    line = [start + slope * index for index in range(count)]
    assert smoothed(line, half_width) == pytest.approx(line, abs=1e-9)


def test_table(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", unigram_entropy=6.25))
    loss = sum(3 + 5 / step for step in range(41, 61)) / 20
    assert summarize(run) == [
        "a", "60", "122,880", f"{loss:.4f}", f"{3.1 + 5 / 60:.4f}", "6.2500", "1,030", "-", "going",
    ]  # fmt: skip
    bare = read_run(make_run(tmp_path / "b", num_steps=3))
    assert summarize(bare)[4:6] == ["-", "-"]
    console = Console(width=110, record=True)
    runs = [read_run(tmp_path / "a"), read_run(tmp_path / "b")]
    print_runs(run_tables(label_runs(runs), runs, [False, False]), console)
    text = console.export_text()
    assert "unigram entropy" in text and "122,880" in text


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture exists, is large enough and has the curves' colours. No temporary file is
    left."""
    folder = make_run(tmp_path / "a", unigram_entropy=6.25)
    assert main(["report", str(folder)]) == 0
    assert str(folder / "loss.png") in capsys.readouterr().out
    with Image.open(folder / "loss.png") as image:
        assert image.size == (1200, 825)
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 20) or []}
    assert {(0x08, 0x51, 0x9C), (0xD9, 0x48, 0x01), (0x63, 0x63, 0x63)} <= colours
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.jsonl", "summary.json", "loss.png", "report.html"}


def test_picture_of_a_single_step(tmp_path: Path) -> None:
    assert plot_loss(make_run(tmp_path / "a", num_steps=1)).exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512_000, "512K"), (25e12, "25T"), (1_048_576, "1.05M"), (8.4e9, "8.4B")],
)
def test_format_tokens(value: float, text: str) -> None:
    assert format_tokens(value) == text
