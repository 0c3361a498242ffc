"""The charts of policies and the section of sampled rollouts.

Second truth: Python's own HTML parser, and arithmetic by hand. test_browser.py draws such a page;
its look has been checked by a person, light and dark.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.cli.main import main
from nemotron_train.data.tokenize import load_tokenizer
from nemotron_train.report import write
from nemotron_train.report.html import rollouts as module
from nemotron_train.report.html.rollouts import rollout_section, shortened
from nemotron_train.report.runs.rollouts import SAMPLED, Piece, Rollout
from tests.report.html.test_page import Reader
from tests.report.made_up import HOSTILE, make_run
from tests.report.made_up_policy import byte_tokenizer, make_policy_run, rollout, write_step

IMAGE = "<img src=x onerror=alert(1)>"


def charts_of(page: Reader) -> dict[str, dict[str, Any]]:
    return {chart["id"]: chart for chart in page.data["charts"]}


def test_environments_share_a_chart(tmp_path: Path) -> None:
    """One curve each, named for the legend; a menu of the runs. Over steps, as the marks are."""
    for name in ("a", "b"):
        make_policy_run(tmp_path / name, num_steps=10)
    assert main(["report", str(tmp_path)]) == 0
    page = Reader(tmp_path / "report.html")
    charts = charts_of(page)
    for family, factor in (("pass/", 1), ("reward/", 2)):
        first, second = charts[family]["options"]
        assert (first["label"], second["label"]) == ("a", "b")
        assert [line["name"] for line in first["lines"]] == ["arithmetic", "tools"]
        assert first["lines"][0]["y"] == [factor * step / 10 for step in range(1, 11)]
        assert first["lines"][1]["y"][1] == pytest.approx(factor * 0.8)
        assert page.data["xs"][first["lines"][0]["x"]] == list(range(1, 11))
    assert {chart["x"] for chart in charts.values()} == {"steps", "hours"}
    groups = charts["groups"]["options"][0]["lines"]
    assert [line["name"] for line in groups] == ["all rewards 1", "mixed", "all rewards 0"]
    assert [sum(ys) for ys in zip(*(line["y"] for line in groups), strict=True)] == [1.0] * 10
    assert "loss" not in charts and charts["objective"]["lines"][0]["y"][0] == -0.5
    sections = [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")]
    assert sections.index("policy") < sections.index("loss")
    assert "validation" not in page.text.partition("Policy")[0]


def test_a_page_of_both_kinds_is_over_tokens(tmp_path: Path) -> None:
    make_policy_run(tmp_path / "a", num_steps=3)
    make_run(tmp_path / "b", num_steps=3)
    assert main(["report", str(tmp_path)]) == 0
    page = Reader(tmp_path / "report.html")
    charts = charts_of(page)
    assert page.data["xs"][charts["reward"]["lines"][0]["x"]] == [2048, 4096, 6144]
    assert len(charts["loss"]["lines"]) == 1, "the policy's objective is no loss"
    assert len(charts["grad_norm"]["lines"]) == 2


def test_rollouts_are_shown_by_who_wrote_them(tmp_path: Path) -> None:
    """Texts, verdict, reward, advantage; a class for each kind; both verdicts of both steps."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    encode = load_tokenizer(tokenizer).encode_with_special_tokens
    run = make_policy_run(tmp_path / "a", num_steps=2)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["tokenizer"] = str(tokenizer)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (1, 2, 3):  # 3: sampled, and not trained on yet
        values = []
        for passed in (True, False):
            text = f"step {step} {passed}</think>"
            ids = {"ids": encode(text), "prompt_ids": []}
            values.append(rollout("tools", passed, text) | ids)
            values[-1]["kinds"] = [["s", 3], ["f", len(ids["ids"]) - 3]]
        write_step(run, step, values)
    assert main(["report", str(run)]) == 0
    page = Reader(run / "report.html")
    for step in (1, 2):
        for passed in (True, False):
            assert page.text.count(f"step {step} {passed}</think>") == 1
    assert "step 3" not in page.text and "nobody can say" not in page.text
    for text, count in (
        ("reward 1, advantage 0.25; tokens: 3 sampled, 9 forced", 2),
        ("reward 0, advantage -0.75; tokens: 3 sampled, 10 forced", 2),
        ("(was wrong)", 2),
        ("user: a task of tools", 4),
    ):
        assert page.text.count(text) == count, text
    classes = [value for tag, name, value in page.attributes if (tag, name) == ("span", "class")]
    of_legend = 1
    assert classes.count("badge better") == classes.count("badge worse") == 2
    for name in ("sampled", "forced", "environment"):
        assert classes.count(name) == 4 + of_legend
    assert classes.count("forced special") == 4 and "unknown" not in classes


def test_a_rollout_stays_a_text(tmp_path: Path) -> None:
    """Whatever a model or an environment wrote: no element, no script, nothing that hides or
    reverses a part, and no page that cannot be written."""
    bad = f"{HOSTILE}{IMAGE}</pre></section>\u202egnp.exe\x00\x1b[2J\ud800\r end"
    value = rollout(f"{IMAGE}{HOSTILE}", False, bad, id=bad)
    value["score"] |= {"verdict": f"'\"{IMAGE}", "message": bad}
    value["episode"]["prompt"] = [{"role": IMAGE, "content": bad}]
    run = make_policy_run(tmp_path / "a", num_steps=1, names=(IMAGE, HOSTILE))
    write_step(run, 1, [value])
    assert main(["report", str(run)]) == 0
    page, text = Reader(run / "report.html"), (run / "report.html").read_text(encoding="utf-8")
    assert len(page.scripts) == 2 and not any(tag == "img" for tag, _, _ in page.attributes)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    shown = f"{HOSTILE}{IMAGE}</pre></section>\\u202egnp.exe\\x00\\x1b[2J\\ud800\\x0d end"
    assert page.text.count(shown) == 4, "text, prompt, id, message"
    assert not set(text) & {"\u202e", "\x00", "\x1b", "\r"}
    names = [line["name"] for line in charts_of(page)["pass/"]["options"][0]["lines"]]
    assert sorted(names) == sorted([IMAGE, HOSTILE])
    data_script = next(text for about, text in page.scripts if about.get("id") == "data")
    assert "<" not in data_script


def big(step: int, name: str) -> Rollout:
    text = (Piece("a" * 10_000, SAMPLED),)
    return Rollout(step, name, name, 0, "passed", 1.0, 0.5, "", {SAMPLED: 9}, text, text)


def test_the_section_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and steps share the bytes evenly, and what is left out is counted."""
    rollouts = [big(step, f"e{n}") for step in (1, 2) for n in range(30)]
    html = rollout_section([("a", rollouts), ("b", rollouts), ("none", [])])
    assert 120_000 < len(html.encode()) < module.MAX_BYTES + 5000
    cards = html.count('class="card rollout')
    assert cards % 4 == 0 and html.count(f"{30 - cards // 4} more do not fit") == 4
    assert html.count("characters left out") == 2 * cards
    assert "&none" not in html and rollout_section([("a", [])]) == ""
    monkeypatch.setattr(module, "MAX_BYTES", 10**7)
    assert rollout_section([("a", rollouts)]).count('class="card rollout') == 60


@given(st.lists(st.text("abc", max_size=9)), st.integers(0, 30))
def test_a_shortened_text_keeps_both_ends(texts: list[str], most: int) -> None:
    pieces = [Piece(text, f"{number}") for number, text in enumerate(texts)]
    whole, found = "".join(texts), shortened(pieces, most)
    if len(whole) <= most:
        assert found == pieces
        return
    [middle] = [place for place, piece in enumerate(found) if "left out" in piece.text]
    head = "".join(piece.text for piece in found[:middle])
    tail = "".join(piece.text for piece in found[middle + 1 :])
    assert len(head) == most // 2 and len(head) + len(tail) == most
    assert whole.startswith(head) and whole.endswith(tail)
    assert f"{len(whole) - most:,} characters" in found[middle].text
    assert {piece.kind for piece in found} <= {"unknown", *(piece.kind for piece in pieces)}


def test_the_rollouts_of_many_runs_are_not_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first runs alone; one without rollouts takes no place."""
    monkeypatch.setattr(write, "MAX_SAMPLED", 1)
    for number in range(3):
        run = make_policy_run(tmp_path / f"r{number}", num_steps=1)
        if number:
            write_step(run, 1, [rollout("tools", True, f"said by {number}.")])
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "said by 1." in text and "said by 2." not in text and "nobody can say" in text
