"""The page in a real browser: it draws, reports no error, makes no network request, and is quick.

Headless Chromium. Needs `chromium` (or google-chrome) on PATH. Debian's package is `chromium`; the
command is `make test-browser`. Not covered: other browsers; the look of the charts, which a person
has checked (docs/report.md).
"""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemotron_train.cli.main import main
from tests.report.html.chromium import CHROMIUM, browse
from tests.report.made_up_policy import make_policy_run, rollout, write_step

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH (Debian: apt install chromium)"),
]
MAX_DRAWING_SECONDS = 3.0  # for 20 runs, all charts; 0.3 s on an idle machine with two cores
NUM_RUNS, NUM_STEPS = 20, 20_000


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty runs, one with a hostile name, as `report` shows them."""
    folder = tmp_path_factory.mktemp("browser")
    generator = np.random.default_rng(0)
    for number in range(NUM_RUNS):
        name = "<img src=http://example.com/x onerror=alert(1)>" if number == 3 else f"run{number}"
        name = name.replace("/", "|")  # a folder name cannot contain a slash
        run = folder / "runs" / name
        run.mkdir(parents=True)
        losses = 3 + 5 / np.sqrt(1 + np.arange(NUM_STEPS) / 50)
        losses += 0.1 * generator.standard_normal(NUM_STEPS)
        norms = np.exp(generator.standard_normal(NUM_STEPS))
        with open(run / "metrics.jsonl", "w") as file:
            for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
                row = {"step": step, "tokens": 2048 * step, "loss": loss, "grad_norm": norm}
                row |= {"lr": 1e-3, "tokens_per_second": 1e5 + loss, "time": 1e9 + step}
                row |= {"max_vio": 1 + norm / 10, "max_vio/decoder.layers.1": 1 + norm / 10}
                row |= {"step_time/data": 0.01, "step_time/forward_backward": 0.5 + norm / 100}
                if step % 1000 == 0:
                    row["expert_load/decoder.layers.1"] = [1 / 16] * 16
                file.write(json.dumps(row) + "\n")
    assert main(["report", str(folder / "runs")]) == 0
    return folder / "runs" / "report.html"


def test_it_draws_asks_for_nothing_and_complains_of_nothing(page: Path, tmp_path: Path) -> None:
    document, console, asked = browse(page, tmp_path / "a", "--dump-dom")
    assert console == ""
    assert asked == []
    drawn = re.search(r'data-drawn="(\d+)"', document)
    charts = re.search(r'data-charts="(\d+)"', document)
    assert drawn and charts, "the script came to its end"
    assert int(charts[1]) == document.count("<figure") >= 9
    assert int(drawn[1]) < 1000 * MAX_DRAWING_SECONDS
    chips = re.findall(r'<button class="chip".*?</button>', document, re.S)
    assert len(chips) == NUM_RUNS
    assert any("onerror" in unescape(chip) for chip in chips)
    assert not re.search(r"<img", document), "a name became an element"


def test_what_a_page_does_would_be_seen(tmp_path: Path) -> None:
    """Control: the same check detects loads, errors and a missing policy on a page that has
    them."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x'><script>fetch('http://a.test/'); no()</script>")
    _, console, asked = browse(bad, tmp_path / "a", "--dump-dom")
    assert "no is not defined" in console
    assert {"http://127.0.0.1:9/x", "http://a.test/"} <= set(asked)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (1280, []),
        (1280, ["--blink-settings=preferredColorScheme=0"]),
        (400, []),
    ],
    ids=["light", "dark", "phone"],
)
def test_it_is_painted(page: Path, tmp_path: Path, width: int, options: list[str]) -> None:
    """The picture has the page's background and the curves' colours. Nothing overflows the right
    edge of a phone's screen."""
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "a", f"--screenshot={picture}", f"--window-size={width},1600", *options)
    with Image.open(picture) as image:
        # Chromium's minimum window width is 500.
        assert image.width >= width
        colours = {c for _, c in image.convert("RGB").getcolors(maxcolors=1 << 24) or []}
    if options:
        assert (0x12, 0x16, 0x1C) in colours and (0x56, 0xB4, 0xE9) in colours
    else:
        assert (0xFF, 0xFF, 0xFF) in colours and (0x00, 0x72, 0xB2) in colours


def test_a_page_of_policies_is_drawn(tmp_path: Path) -> None:
    """Charts over steps with several environments, and rollouts that try to become elements."""
    bad = "</script><img src=http://example.com/x onerror=alert(1)></pre>"
    run = make_policy_run(tmp_path / "a", names=(bad, "tools"))
    write_step(run, 1, [rollout(bad, True, bad), rollout("tools", False, f"{bad}\u202e")])
    assert main(["report", str(run)]) == 0
    document, console, asked = browse(run / "report.html", tmp_path / "b", "--dump-dom")
    assert (console, asked) == ("", [])
    charts = re.search(r'data-charts="(\d+)"', document)
    assert charts and int(charts[1]) == document.count("<figure") >= 12
    assert not re.search(r"<img", document) and document.count('class="card rollout') == 2
    keys = re.findall(r'<figure data-chart="pass/">.*?</figure>', document, re.S)
    assert "tools" in keys[0] and "onerror" in unescape(keys[0]), "the legend names both"
