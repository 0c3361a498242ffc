"""`evaluate environments` and `rollouts show` on an untrained model of seconds.

Second truths: the written rollouts, counted by hand; the same checkpoint twice, whose difference is
none. Not covered: a model that solves anything; the picture's look; several ranks
(tests/distributed/test_rollouts.py).
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemotron_train.cli.main import main
from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.evaluation_parts import measure
from nemotron_train.posttrain.rollout import read_rollouts, write_rollouts
from nemotron_train.posttrain.show import Only, ShowConfig, show_rollouts
from tests.posttrain.rollouts import rollout

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]
RUN = "runs/evaluated"
QUICK = ["prompts=2", "samples=3", "max_new_tokens=6", "scoring_workers=1", "threads=1"]


@pytest.fixture(scope="module", autouse=True)
def trained(small_run: Small, in_small_run: None) -> None:
    """A checkpoint of step 1."""
    words = ["name=evaluated", "train.stop_after_steps=1", "train.threads=1"]
    assert main(["pretrain", *small_run[1], *words]) == 3


def evaluate(*words: str) -> int:
    return main(["evaluate", "environments", *words])


def test_files_table_and_a_difference_of_none(capsys: pytest.CaptureFixture[str]) -> None:
    """The same checkpoint twice: equal rollouts, and a paired difference of exactly 0."""
    asked = ["environment=strings,tools", *QUICK, "output=measured/of_two"]
    assert evaluate(RUN, f"{RUN}@1", *asked) == 0
    printed = capsys.readouterr().out
    files = {path.name for path in Path("measured").iterdir()}
    assert files == {f"of_two.{end}" for end in ("json", "png", "0.jsonl.gz", "1.jsonl.gz")}
    assert Path("measured/of_two.png").read_bytes().startswith(b"\x89PNG")
    one, two = (Path(f"measured/of_two.{number}.jsonl.gz") for number in (0, 1))
    assert one.read_bytes() == two.read_bytes()
    assert printed.count("+0.0 % (") == 2 * 3, "pass@1 and pass@k of two environments and of all"
    content = json.loads(Path("measured/of_two.json").read_text())
    rollouts = list(read_rollouts(one))
    assert [r.sequence for r in rollouts] == list(range(12))
    for result in content["runs"]:
        assert [entry["environment"] for entry in result["environments"]] == ["strings", "tools"]
        for entry in (*result["environments"], result["together"]):
            name = entry["environment"]
            some = [r for r in rollouts if name in ("all", r.row.environment)]
            assert (entry["prompts"], entry["samples"], entry["k"]) == (len(some) // 3, 3, 3)
            assert entry["pass_1"]["value"] == pytest.approx(
                sum(r.passed for r in some) / len(some)
            )
            assert entry["verdicts"] == Counter(str(r.score.verdict) for r in some)
            assert entry["cut"] == pytest.approx(sum(r.cut for r in some) / len(some))
            tokens = sum(r.kinds.count("s") for r in some) / len(some)
            assert entry["tokens"] == pytest.approx(tokens)
    for one_rollout in rollouts:
        assert 1 <= len(one_rollout.ids) <= 6 and max(one_rollout.ids) < 512
        assert all(math.isfinite(v) and v < 0 for v in one_rollout.log_probabilities)


def test_your_own_environment_over_two_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """With drafts and without, the same rollouts; every episode is scored once."""
    folder = Path("own")
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("asks_twice.py"), folder / "asks_twice.py")
    name = "own/asks_twice.py:AsksTwice"
    row = {"environment": name, "prompt": "say", "answer": "x", "thinking": False}
    rows = "".join(json.dumps({**row, "id": f"r{number}"}) + "\n" for number in range(3))
    Path("own/rows.jsonl").write_text(rows)
    found = []
    for drafts in ("false", "true"):
        words = ["rows=own/rows.jsonl", f"speculative={drafts}", "coupled=true", "temperature=2"]
        words += ["samples=6", "prompts=9", "max_new_tokens=120", "scoring_workers=2", "threads=1"]
        assert evaluate(RUN, *words, f"output=own/{drafts}") == 0
        found.append(list(read_rollouts(Path(f"own/{drafts}.0.jsonl.gz"))))
        calls = Counter((folder / "calls").read_text().split())
        assert calls["start"] == 3 and calls["score"] == sum(
            not r.cut and not r.episode.last.fault for r in found[-1]
        )
        (folder / "calls").unlink()
    plain, drafted = found
    assert any("e" in one.kinds for one in plain)
    for ours, theirs in zip(drafted, plain, strict=True):
        assert (ours.ids, ours.kinds, ours.score) == (theirs.ids, theirs.kinds, theirs.score)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["environment=strings,jokes"], "'jokes' makes no tasks"),
        (["samples=0"], "samples=0: give 1 or more"),
        (["prompts=0"], "prompts=0: give 1 or more"),
        (["temperature=0"], "greedy answers are all the same"),
        (["split=holdout"], "split=holdout: there are"),
        (["level=4"], "level=4: the split evaluation has 1, 2, 3"),
        (["scoring_workers=0"], "scoring_workers=0"),
        (["rows=none.jsonl"], "none.jsonl"),
        (["rows=no_answer.jsonl"], "environment strings: row r1: answer"),
        (["rows=raises.jsonl"], "environment raises.py:judge: its import raised ValueError: no"),
        (["output=text.jsonl/out"], "output"),
        (["max_new_tokens=-1"], "max_new_tokens=-1"),
        (["nonsense=1"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "r1", "environment": "strings", "prompt": "reverse cat"}
    Path("no_answer.jsonl").write_text(json.dumps(row) + "\n")
    raises = {**row, "environment": "raises.py:judge", "answer": "x"}
    Path("raises.jsonl").write_text(json.dumps(raises) + "\n")
    Path("raises.py").write_text("raise ValueError('no')\n")
    Path("text.jsonl").touch()
    assert evaluate(RUN, *QUICK, "environment=strings", "output=never_written", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(Path().glob("never_written*"))


def test_a_tokenizer_without_the_chat_tokens(
    small_run: Small, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemotron_train.data.chat import render

    monkeypatch.setattr(render, "missing_tokens", lambda tokenizer: ["<think>"])
    assert evaluate(RUN, *QUICK, "environment=strings", "output=") == 2
    error = capsys.readouterr().err
    assert "has no <think>" in error and "convert add-chat-tokens" in error
    assert error.count("\n") == 1


def test_pass_rates_by_hand() -> None:
    """Two prompts with three samples: 1 and 3 passes."""
    passes = [True, False, False, True, True, True]
    made = [rollout([1], [2, 3], passed=passed, cut=number == 1)
            for number, passed in enumerate(passes)]  # fmt: skip
    found = measure("strings", made, 3)
    assert found.rates == pytest.approx([1 / 3, 1]) and found.rates_k == [1, 1]
    assert found.pass_1.value == pytest.approx(2 / 3) and found.pass_k.value == 1
    assert found.cut == pytest.approx(1 / 6) and found.tokens == 2
    assert found.verdicts == {"passed": 4, "failed": 2}


# rollouts show ---------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path: Path) -> Any:
    """Prints a file of six rollouts with some knobs; the ids of those that are shown."""
    kinds = [{"passed": True}, {}, {"cut": True}, {"environment": "tools"}]
    kinds += [{"text": "\x1b[31mred\x1b[0m [bold]x[/bold]"}, {"passed": True}]
    made = [rollout([1], [2, 3], row=f"row{n}", sample=n, **kind) for n, kind in enumerate(kinds)]
    write_rollouts(tmp_path / "x.jsonl.gz", made)

    def show(**knobs: Any) -> str:
        import io

        console = Console(file=io.StringIO(), width=200)
        show_rollouts(tmp_path / "x.jsonl.gz", ShowConfig(**knobs), console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    return show


def heads(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("── ")]


def test_what_is_shown(shown: Any) -> None:
    everything = [f"row{number}" for number in range(6)]
    assert heads(shown(count=0)) == everything and heads(shown()) == everything[:5]
    assert heads(shown(only=Only.passed)) == ["row0", "row5"]
    assert heads(shown(only=Only.failed)) == ["row1", "row2", "row3", "row4"]
    assert heads(shown(only=Only.cut)) == ["row2"]
    assert heads(shown(environment="tools")) == ["row3"] and heads(shown(row="row4")) == ["row4"]
    text = shown(row="row1")
    assert "failed  reward 0, 2 tokens sampled" in text and "user: 2 + 2?" in text
    assert "four<|im_end|>" in text and "(answer: 4)" in text
    assert "(answer: 4)" not in shown(row="row0")
    odd = shown(row="row4")
    assert "\x1b" not in odd and "[bold]x[/bold]" in odd, "nothing in a text is obeyed"


def test_nothing_to_show_is_one_line(shown: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for knobs in ({"only": Only.malformed}, {"environment": "code"}, {"row": "no"}, {"count": -1}):
        with pytest.raises(ConfigError):
            shown(**knobs)
    Path("text.jsonl.gz").write_text("text")
    for words in (["text.jsonl.gz"], ["none.jsonl.gz"], ["text.jsonl.gz", "only=good"]):
        assert main(["rollouts", "show", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
