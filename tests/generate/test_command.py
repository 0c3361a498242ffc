"""`nemotron-train generate` and `evaluate acceptance` on a run trained for a few steps.

Second truths: the engine called from Python; the run's own validation data. Not covered: colours,
interrupted streaming.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron_train.cli.main import main
from nemotron_train.config.errors import ConfigError
from nemotron_train.data.tokenize import load_tokenizer
from nemotron_train.generate.knobs import GenerateConfig
from nemotron_train.generate.terminal import check_and_read

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]


@pytest.fixture(scope="module")
def run(small_run: Small) -> str:
    """Trained under NVFP4 for four steps, with checkpoints at steps 2 and 4."""
    words = ["name=text", "precision=nvfp4_nemotron3", "train.save_every_steps=2"]
    words += ["train.stop_after_steps=4"]
    assert main(["pretrain", *small_run[1], *words]) == 3
    return "runs/text"


def generate(*words: str) -> list[dict[str, Any]]:
    assert main(["generate", *words, "output=out.jsonl", "threads=1"]) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text().strip().split("\n")]


def test_streams_one_and_tells_what_it_cost(run: str, capsys: pytest.CaptureFixture) -> None:
    prompt = "def f(x, *, y='a b'): # [1]"
    words = [f"prompt={prompt}", "max_new_tokens=9", "temperature=0", "end_of_document=false"]
    (record,) = generate(run, *words)
    out, said = capsys.readouterr()
    assert out == prompt + record["text"] + "\n"
    assert len(record["tokens"]) == len(record["log_probabilities"]) == 9
    tokenizer = load_tokenizer(Path("data/tokenizer"))
    assert record["prompt_tokens"] == tokenizer.encode(prompt).tolist()
    assert tokenizer.decode(record["tokens"]) == record["text"]
    # One attention layer, two key/value heads of 16, BF16.
    assert f"{2 * 2 * 16 * 2} bytes a token of context" in said and "step_00000004" in said


def test_checkpoints_by_step_prompts_by_file_samples_by_seed(run: str) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "import "}\n{"prompt": "return"}\n')
    words = ["prompts=prompts.jsonl", "samples=2", "max_new_tokens=6", "seed=3"]
    first = generate(run, *words)
    assert [r["prompt"] for r in first] == ["import ", "import ", "return", "return"]
    assert first[0]["tokens"] != first[1]["tokens"]
    assert generate(run, *words, "batch=1") == first or all(
        a["tokens"] == b["tokens"] for a, b in zip(generate(run, *words), first, strict=True)
    )
    assert [r["tokens"] for r in generate(f"{run}@2", *words)] != [r["tokens"] for r in first]


def test_stop_text_ends_before_it(run: str) -> None:
    words = ["prompt=import json", "max_new_tokens=20", "seed=5", "end_of_document=false"]
    (whole,) = generate(run, *words)
    stop = whole["text"][3:5]
    (ended,) = generate(run, *words, f"stop={stop}")
    assert ended["text"] == whole["text"][: whole["text"].index(stop)]
    assert ended["ended_by"] == "stop" and len(ended["tokens"]) < 20


def test_speculative_says_how_much_was_accepted(run: str, capsys: pytest.CaptureFixture) -> None:
    words = ["prompt=import json", "max_new_tokens=12", "temperature=0", "end_of_document=false"]
    (plain,) = generate(run, *words)
    (speculative,) = generate(run, *words, "speculative=true")
    assert speculative["tokens"] == plain["tokens"]
    said = capsys.readouterr().err
    assert "at depth 1" in said and "tokens a round" in said


def test_evaluate_acceptance(run: str, capsys: pytest.CaptureFixture) -> None:
    words = ["num_prompts=3", "prompt_tokens=8", "max_new_tokens=8", "threads=1"]
    assert main(["evaluate", "acceptance", run, "data=data", *words]) == 0
    said = capsys.readouterr().out
    assert "depth 2 accepted" in said and "3.45" in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["prompt=x"], "one run is needed"),
        (["runs/text", "runs/other", "prompt=x"], "2 are given"),
        (["runs/nowhere", "prompt=x"], "no such run folder"),
        (["runs/text@3", "prompt=x"], "it has "),
        (["runs/text"], "give prompt=TEXT or prompts=FILE"),
        (["runs/text", "prompt="], "an empty prompt"),
        (["runs/text", "prompt=x", "temperature=-1"], "temperature=-1.0"),
        (["runs/text", "prompt=x", "top_p=0"], "top_p=0.0"),
        (["runs/text", "prompt=x", "top_p=nan"], "top_p=nan"),
        (["runs/text", "prompt=x", "max_new_tokens=0"], "max_new_tokens=0"),
        (["runs/text", "prompt=x", "stop="], "stop="),
        (["runs/text", "prompt=x", "draft_tokens=2"], "needs speculative=true"),
        (["runs/text", "prompt=x", "samples=2", "temperature=0"], "all the same"),
        (["runs/text", "prompts=nowhere.txt"], "cannot be read"),
        (["runs/text", "prompt=x", "tempreature=1"], "did you mean temperature"),
        (["runs/text", "prompt=x", "tensor=2"], "must divide the 1 ranks"),
        (["runs/text", "prompt=x", "tokenizer=runs"], "tokenizer.json"),
    ],
)
def test_mistakes_are_one_line(
    run: str, words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    assert main(["generate", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert len(lines) == 1 and lines[0].startswith("nemotron-train: ")


def test_a_result_that_cannot_be_written_is_known_before_the_work(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (tmp_path / "no" / "such" / "o.jsonl", tmp_path):
        assert main(["generate", run, "prompt=a", f"output={output}", "threads=1"]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
        assert f"output={output}" in printed.err


def test_a_budget_closes_the_reasoning(run: str, capsys: pytest.CaptureFixture) -> None:
    """The close is in ids and text and is named as forced; with drafts all is the same. Budget 0 is
    reasoning off, and a budget that is not reached changes nothing."""
    words = ["prompt=a", "chat=true", "max_new_tokens=12", "coupled=true", "seed=3", "samples=3"]
    close, ends = 4, {0, 2}
    found = generate(run, *words, "budget=3", "budget_grace=0")
    assert "reasoning closed by the budget: 3 of 3 sequences" in capsys.readouterr().err
    for one in found:
        assert one["forced"] == [3] and one["tokens"][3] == close
        assert not ends & set(one["tokens"][:3]), "another seed"
        assert one["log_probabilities"][3] is None and one["text"].count("</think>") == 1
        assert load_tokenizer(Path("data/tokenizer")).decode(one["tokens"][:4]) in one["text"]
    drafted = generate(run, *words, "budget=3", "budget_grace=0", "speculative=true")
    assert [one["tokens"] for one in drafted] == [one["tokens"] for one in found]
    assert [one["forced"] for one in drafted] == [one["forced"] for one in found]
    free = generate(run, *words)
    assert [one["tokens"][:3] for one in free] == [one["tokens"][:3] for one in found]
    for far in ("budget=12", "budget=-1"):
        same = generate(run, *words, far)
        assert [one["tokens"] for one in same] == [one["tokens"] for one in free]
        assert all(one["forced"] == [] for one in same)
    (none, *_), (off, *_) = (
        generate(run, *words, "budget=0"),
        generate(run, *words, "thinking=false"),
    )
    assert none == off and none["prompt_tokens"][-2:] == [close - 1, close]
    (stopped, *_) = generate(run, *words, "budget=3", "budget_grace=0", "stop=</think>")
    assert stopped["ended_by"] == "stop" and stopped["tokens"] == found[0]["tokens"][:3]
    (full, *_) = generate(run, *words, "budget=3", "budget_grace=0", "max_new_tokens=3")
    assert full["forced"] == [] and full["ended_by"] == "length"
    assert full["text"] == load_tokenizer(Path("data/tokenizer")).decode(full["tokens"])


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (GenerateConfig(budget=5), "budget=5: needs chat=true"),
        (GenerateConfig(budget=5, chat=True, thinking=False), "budget=5: needs thinking=true"),
        (GenerateConfig(budget=-2, chat=True), "budget=-2: give"),
        (GenerateConfig(budget=5, budget_grace=-2, chat=True), "budget_grace=-2: give"),
    ],
)
def test_a_budget_needs_reasoning_to_limit(knobs: GenerateConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_and_read(knobs)


def test_only_line_feeds_end_a_prompt(run: str, tmp_path: Path) -> None:
    """Line separators, next line and form feed are text, as JSON and most editors take
    them; a byte order mark belongs to the file."""
    text = "a\u2028b\x0cc\x85d"
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_bytes(f"\ufeff{text}\r\nsecond\n".encode())
    lines.write_text("\ufeff" + json.dumps({"prompt": text}, ensure_ascii=False), "utf-8")
    words = ["max_new_tokens=1", "temperature=0"]
    assert [r["prompt"] for r in generate(run, f"prompts={plain}", *words)] == [text, "second"]
    assert [r["prompt"] for r in generate(run, f"prompts={lines}", *words)] == [text]


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "not a JSON object"), ("{}", "prompt is missing"), ('{"prompt": 3}', "prompt is 3")],
)
def test_a_bad_line_of_prompts_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(ConfigError, match=f"prompts.jsonl:3: {said}"):
        check_and_read(GenerateConfig(prompts=str(path)))


def test_weights_that_are_not_finite_are_named(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Even where the text would not meet them: the weights of one expert."""
    from nemotron_train.train.checkpoint import checkpoints

    load = checkpoints.load_weights
    names = []

    def load_damaged(path: Path, cores: Any, *arguments: Any) -> None:
        load(path, cores, *arguments)
        name, weight = next(
            (name, weight) for name, weight in cores[0].named_parameters() if ".experts." in name
        )
        names.append(name)
        weight.data.view(-1)[-1] = float("nan")

    monkeypatch.setattr(checkpoints, "load_weights", load_damaged)
    assert main(["generate", run, "prompt=a", "max_new_tokens=1", "threads=1"]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert f"{names[0]} is not finite" in line and "step_00000004" in line


def test_the_largest_numbers_are_finite(tmp_path: Path) -> None:
    """Their difference is not."""
    import torch

    from nemotron_train.generate.checkpoint import _check_finite

    largest = torch.finfo(torch.float32).max
    weights = torch.nn.ParameterList([torch.tensor([largest, -largest]), torch.empty(0)])
    _check_finite(weights, tmp_path)
