"""The page of runs, the run card, the timeline, two configurations side by side.

Second truth: Python's own HTML parser, and arithmetic by hand on made-up run folders.
test_browser.py covers the look of the page and whether it draws.
"""

import json
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron_train.cli.main import main
from nemotron_train.config.schema import Config
from nemotron_train.report.gap.pairs import config_of
from nemotron_train.report.plan.diff import flatten, rows
from nemotron_train.report.runs.card import CPU, EMULATED, GPU, UNVERIFIED, run_card
from nemotron_train.report.runs.read import read_run
from nemotron_train.report.runs.timeline import timeline
from nemotron_train.run_folder.metric_groups import GROUPS
from tests.report.made_up import HOSTILE, make_run


class Reader(HTMLParser):
    """The page as a browser's parser splits it: scripts, elements, text outside scripts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self._inside = ""
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            about, text = self.scripts.pop()
            self.scripts.append((about, text + data))
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(next(text for about, text in self.scripts if about.get("id") == "data"))


def test_a_page_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", "precision=nvfp4_all")
    assert main(["report", str(run)]) == 0
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    page = Reader(run / "report.html")
    charts = {chart["id"]: chart for chart in page.data["charts"]}
    assert {"loss", "validation_loss", "grad_norm", "step_time", "clock", "lr"} <= set(charts)
    assert charts["a_new_number"]["group"] == "other", "what nobody foresaw is drawn too"
    assert charts["grad_norm"]["log"] and charts["loss"]["lines"][0]["y"][9] == 3.5
    x = page.data["xs"][charts["loss"]["lines"][0]["x"]]
    assert x == [2048 * step for step in range(1, 31)]
    assert page.data["xs"][charts["clock"]["lines"][0]["x"]][-1] == 0.5, "hours since the start"
    heats = {heat["id"]: heat for heat in page.data["heats"]}
    assert heats["expert_load"]["options"][0]["cells"] == [[1.0] * 4], "over an even share"
    for name in ("Runs", "Starts", "Configuration", "Run cards", "going", "emulated"):
        assert name in page.text


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert main(["report", str(run)]) == 0
    page, text = Reader(run / "report.html"), (run / "report.html").read_text()
    loading = ("src", "href", "action", "data", "poster", "srcset", "background")
    assert {v for _, name, v in page.attributes if name in loading} == {"data:,"}
    assert "@import" not in text and "url(" not in text and "default-src 'none'" in text
    assert "fetch(" not in text and "XMLHttpRequest" not in text and "import(" not in text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """A name, a knob, a reason, a host and a metric name that try to become a script."""
    machine = {"device": "cpu", "device_name": HOSTILE, "ranks": 1, "block_formats": HOSTILE}
    start = {"time": "never", "from_step": 0, "ended": "failed", "reason": HOSTILE}
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    make_run(folder, starts=[start | {"machine": machine}])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["embedded_folder"] = config["precision"]["name"] = HOSTILE
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 31, "tokens": 9e4, HOSTILE: 1.0, "loss": 1.0}) + "\n")
    other = make_run(tmp_path / "b")
    page_path = tmp_path / "page.html"
    assert main(["report", str(folder), str(other), "--output", str(page_path)]) == 0
    page = Reader(page_path)
    assert len(page.scripts) == 2 and not any(tag == "img" for tag, _, _ in page.attributes)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert HOSTILE in page.text and "<img src=x onerror=alert(1)>" in page.text
    labels = [run["label"] for run in page.data["runs"]]
    assert labels == ["<img src=x onerror=alert(1)>", "b"]
    assert any(HOSTILE in mark["text"] for mark in page.data["runs"][0]["marks"])
    data_script = next(text for about, text in page.scripts if about.get("id") == "data")
    assert "<" not in data_script


def test_a_metrics_name_stays_a_text(tmp_path: Path) -> None:
    """A name of any group ends up in attributes and in the data, where quotes and tags matter."""
    names = [
        pattern.replace("*", hostile)
        for _, patterns in GROUPS.values()
        for pattern in patterns
        for hostile in ('" onmouseover="alert(1)', "'><script>alert(1)</script>", "__proto__")
    ]
    folder = make_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        for step in (31, 32):
            row = {name: 1.0 for name in names if "expert_load" not in name}
            file.write(json.dumps(row | {"step": step, "tokens": 9e4, "loss": 1.0}) + "\n")
    assert main(["report", str(folder)]) == 0
    page = Reader(folder / "report.html")
    assert len(page.scripts) == 2
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    figures = [v for tag, name, v in page.attributes if tag == "figure" and name == "data-chart"]
    assert 'mtp_loss_" onmouseover="alert(1)' in figures and "mtp_loss___proto__" in figures
    assert sorted(chart["id"] for chart in page.data["charts"]) == sorted(filter(None, figures))


def test_the_differences_of_two_runs_are_on_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "precision=bf16")
    make_run(tmp_path / "b", "precision=nvfp4_all", "train.seed=1234")
    assert main(["report", str(tmp_path)]) == 0, "a folder of runs stands for the runs in it"
    page = Reader(tmp_path / "report.html")
    assert "Differences of the configurations" in page.text
    assert "precision.default.format" in page.text and "train.seed" not in page.text
    assert {"gap-0", "bands-0"} <= {chart["id"] for chart in page.data["charts"]}
    assert "Loss gap to bf16" in page.text and "one pair" in page.text
    assert (tmp_path / "gap.png").exists() and (tmp_path / "losses.png").exists()


def test_long_runs_are_cut_and_keep_their_spikes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", num_steps=5000)
    text = (run / "metrics.jsonl").read_text()
    before = '"step": 2500, "tokens": 5120000, "loss": '
    spiked = text.replace(f"{before}3.002", f"{before}99.5")
    assert spiked != text
    (run / "metrics.jsonl").write_text(spiked)
    assert main(["report", str(run)]) == 0
    [line] = Reader(run / "report.html").data["charts"][0]["lines"]
    assert len(line["y"]) <= 1000 and max(line["hi"]) == 99.5 and min(line["lo"]) == 3.001


@pytest.mark.parametrize("content", ["", '{"step": 1, "lo', "[]\n"])
def test_a_run_without_a_step_is_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert "no step yet" in capsys.readouterr().err


def test_an_old_or_harmed_folder_is_shown_all_the_same(tmp_path: Path) -> None:
    """No environment file, no checkpoint record, no times, a partial summary, a config.yaml of
    another version."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 2.0}\n{"step": 2, "to')
    (folder / "summary.json").write_text('{"fini')
    (folder / "config.yaml").write_text("knob_of_another_version: 1\n")
    (folder / "environment.json").write_text('{"starts": [7, {"time": 3, "from_step": "x"}]}')
    assert main(["report", str(folder)]) == 0
    assert "this version cannot read their config.yaml: old" in Reader(folder / "report.html").text


# Timeline and run card ----------------------------------------------------------------------


def test_the_timeline_joins_starts_checkpoints_and_events(tmp_path: Path) -> None:
    times = [datetime.fromtimestamp(t, UTC).isoformat() for t in (1000, 2400)]
    starts = [
        {"time": times[0], "from_step": 0, "ended": "failed", "reason": "lost a rank"},
        {"time": times[1], "from_step": 20},
        {"time": times[1], "from_step": 20, "ended": "refused"},
    ]
    run = read_run(make_run(tmp_path / "a", starts=starts))
    found = [(h.kind, h.step, h.tokens, h.time) for h in timeline(run)]
    assert found == [
        ("start", 0, 0, 1000),
        ("spike", 7, 7 * 2048, 1420),  # no own time: that of the line of step 7
        ("start", 20, 20 * 2048, 2400),
        ("checkpoint", 20, 20 * 2048, 2300),
    ]
    assert "lost a rank" in timeline(run)[0].text and "no end recorded" in timeline(run)[2].text


def card(folder: Path, *overrides: str, **about: Any) -> dict[str, tuple[str, ...]]:
    run = read_run(make_run(folder, *overrides, **about))
    config = config_of(run)
    assert isinstance(config, Config)
    return {entry.name: entry.marks for entry in run_card(run, config)}


def test_marks_follow_the_evidence(tmp_path: Path) -> None:
    emulated = card(tmp_path / "a", "precision=nvfp4_nemotron3")
    assert emulated["NVFP4 products"] == emulated["MXFP8 products"] == (EMULATED,)
    assert emulated["Mamba-2 layers"] == emulated["checkpoints"] == (CPU,)
    assert "resuming" not in emulated and "precision telemetry" not in emulated

    native = {"device": "cuda", "block_formats": "native", "ranks": 2, "mamba_kernels": True}
    overrides = ["precision=nvfp4_all", "parallel.pipeline=2", "precision.telemetry.every=10"]
    found = card(tmp_path / "b", *overrides, machine=native)
    assert found["NVFP4 products"] == found["pipeline parallelism over 2 ranks"] == (GPU,)
    assert found["precision telemetry"] == (UNVERIFIED,), "asked for, and no record there"

    # MXFP8 from 3/4 of 262,144 tokens on; the run has reached 61,440.
    phases = "precision.phases=[{from_fraction: 0.75, at_least: {format: mxfp8}}]"
    late = card(tmp_path / "c", "precision=nvfp4_all", phases)
    assert late["MXFP8 products"] == (UNVERIFIED,) and late["NVFP4 products"] == (EMULATED,)

    old = card(tmp_path / "d", "precision=nvfp4_all", machine={})
    assert set(old.values()) == {(UNVERIFIED,)}

    both = [{"from_step": 0, "machine": {"device": "cpu"}}, {"from_step": 20, "machine": native}]
    assert card(tmp_path / "e", starts=both)["resuming"] == (CPU, GPU)


# Two configurations -------------------------------------------------------------------------


def test_rows_of_a_difference() -> None:
    ours = flatten({"a": 1, "b": {"c": True, "d": [1, 2]}, "name": "x", "e": [{"f": 1}]})
    theirs = flatten({"a": 1, "b": {"c": 1, "d": [1, 3]}, "name": "y", "e": [{"f": 1}, {"f": 2}]})
    assert rows([ours, theirs]) == [
        ("b.c", ["true", "1"], True),
        ("b.d", ["[1, 2]", "[1, 3]"], True),
        ("e.1.f", ["(none)", "2"], True),
    ]
    assert len(rows([ours, theirs], show_all=True)) == 6


def test_report_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", "precision=bf16")
    b = make_run(tmp_path / "b", "precision=bf16", "optim.peak_learning_rate=1e-4")
    assert main(["report", "diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "optim.peak_learning_rate" in out and "0.0001" in out and "1 knob differ" in out
    assert "min_learning_rate" not in out
    assert main(["report", "diff", str(a), str(b), "--all"]) == 0
    assert "min_learning_rate" in capsys.readouterr().out
    assert main(["report", "diff", str(a), str(a)]) == 0
    assert "the same" in capsys.readouterr().out
    assert main(["report", "diff", str(a), str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main(["report", "diff", str(a)]) == 2
