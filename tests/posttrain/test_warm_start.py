"""Worked solutions as conversations.

Second truth: the environments' own judges, on the turns as they are read back from token ids. Not
covered: `python_code`'s judge, which needs the sandbox (tests/posttrain/environments).
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.data.chat.parse import parse_turn
from nemotron_train.data.chat.render import ChatFormat
from nemotron_train.data.chat.rows import read_rows
from nemotron_train.data.tokenize import load_tokenizer, train_tokenizer
from nemotron_train.posttrain.environments.families import FAMILY_NAMES, build_family
from nemotron_train.posttrain.environments.protocol import Episode, Message, judge
from nemotron_train.posttrain.tasks import Split, rows
from nemotron_train.posttrain.warm_start import RowsConfig, write_rows

TEXT = Path(json.__file__).read_text()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], 400, folder)
    return ChatFormat(load_tokenizer(folder))


def test_every_family_is_there_and_mixed(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert main(["posttrain", "rows", f"output={output}", "count=12"]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    names = [row["environment"] for row in written]
    assert Counter(names) == dict.fromkeys(FAMILY_NAMES, 12)
    assert len(set(names[:12])) > 3
    levels = Counter(row["id"].split("/")[2] for row in written)
    assert levels == {"1": 24, "2": 24, "3": 24}
    assert len(list(read_rows(output))) == 72
    again = tmp_path / "again.jsonl"
    assert main(["posttrain", "rows", f"output={again}", "count=12"]) == 0
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name != "python_code"])
def test_the_judge_is_content_with_what_is_trained(
    name: str, chat: ChatFormat, tmp_path: Path
) -> None:
    """The ids of every assistant's turn are read back and judged with the task's own row."""
    config = RowsConfig(output=str(tmp_path / "rows.jsonl"), environment=name, count=30, level=2)
    write_rows(config, print)
    tasks = {row.id: row for row in rows(name, Split.warm_start, config.seed, 30, 2)}
    family = build_family(name)
    lines = [json.loads(line) for line in Path(config.output).read_text().splitlines()]
    for line, entry in zip(lines, read_rows(Path(config.output)), strict=True):
        task = tasks[line["id"]]
        turns: list[Message] = []
        for place, message in enumerate(entry.messages):
            if message.role == "tool":
                turns.append(message)
            if message.role != "assistant":
                continue
            prompt = chat.prompt(entry.messages[:place], entry.tools)
            whole = chat.render(entry.messages[: place + 1], entry.tools).ids.tolist()
            turn = parse_turn(chat, whole[len(prompt) : -1], text_calls=True)
            assert turn.is_well_formed and turn.thinking
            turns.append(turn.message)
        episode = Episode(task, tuple(family.start(task)), tuple(turns))
        assert judge(family, episode).reward == 1.0


def test_low_effort_rows_think_half(tmp_path: Path, chat: ChatFormat) -> None:
    """A share of the rows, the same ones each time; their prompt is that of the task with the same
    effort, and the answers are those of full effort."""
    words = ["posttrain", "rows", "environment=arithmetic,tools", "count=60"]
    outputs = [tmp_path / "full.jsonl", tmp_path / "low.jsonl"]
    for output, share in zip(outputs, ("0", "0.3"), strict=True):
        assert main([*words, f"output={output}", f"low_effort_share={share}"]) == 0
    full, low = ([json.loads(line) for line in path.read_text().splitlines()] for path in outputs)
    chosen = [place for place, row in enumerate(low) if "effort" in row]
    assert 20 < len(chosen) < 52
    entries = list(read_rows(outputs[1]))
    for place, (before, after) in enumerate(zip(full, low, strict=True)):
        if place not in chosen:
            assert after == before
            continue
        assert after["effort"] == "low" and before["id"] == after["id"]
        for one, other in zip(before["messages"], after["messages"], strict=True):
            whole, cut = one.pop("reasoning_content", ""), other.pop("reasoning_content", "")
            assert one == other and whole.startswith(cut) and bool(whole) == bool(cut)
            assert len(cut.split()) == -(-len(whole.split()) // 2)
        user = entries[place].messages[0]
        assert user.content == after["messages"][0]["content"] + "\n\n{reasoning effort: low}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["count=0"], "count=0"),
        (["low_effort_share=2"], "low_effort_share=2.0"),
        (["level=4"], "level=4"),
        (["environment=arithmetic,sums"], "'sums' makes no tasks"),
        (["environment=mathematics"], "'mathematics' makes no tasks"),
        (["output=none/rows.jsonl"], "output"),
        (["rows=1"], "rows"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [f"output={tmp_path}/rows.jsonl", *words]
    assert main(["posttrain", "rows", *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
