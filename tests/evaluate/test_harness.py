"""`evaluate harness` offline, on tasks made here: results, windows, refusals.

Second truth: log-likelihoods assembled by hand from the engine's own scores of the same strings,
and the harness's accuracy recomputed from them; UTF-8 bytes counted here. Equality with lm-eval's
own model: test_harness_model.py. Not covered: the harness's own tasks, which need data from the
network.
"""

import functools
import json
import math
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from nemotron_train.cli.main import main
from nemotron_train.evaluate.harness import evaluate_harness
from nemotron_train.evaluate.knobs import HarnessConfig, LossConfig
from nemotron_train.generate.checkpoint import open_checkpoint, open_tokenizer
from nemotron_train.generate.engine import Engine

QUESTIONS = [
    {"question": "import ", "choices": ["json", "zzzz qqqq"], "answer": 0},
    {"question": "def __init__(", "choices": ["%%%%", "self"], "answer": 1},
    {"question": "for line in ", "choices": ["lines", "^^^^"], "answer": 0},
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
doc_to_text: "{{question}}"
"""


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the thousands of task files that come with the harness takes seconds."""
    fewer = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("nemotron_train.evaluate.harness.TaskManager", fewer)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    (tmp_path / "ours_choice.yaml").write_text(
        "task: ours_choice"
        + COMMON % questions
        + """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
    )
    (tmp_path / "ours_text.yaml").write_text(
        "task: ours_text"
        + COMMON % questions
        + """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
    )
    return tmp_path


def test_accuracy_is_that_of_the_scores(run: Path, tasks: Path) -> None:
    knobs = HarnessConfig(
        tasks=["ours_choice", "ours_text"],
        include_path=str(tasks),
        batch=3,
        output=str(tasks / "results.json"),
    )
    found = evaluate_harness(str(run), knobs)
    right = 0
    with open_checkpoint(str(run), LossConfig(), print) as model:
        tokenizer, end_tokens = open_tokenizer(model, LossConfig())
        engine = Engine(model.model, end_tokens)
        for entry in QUESTIONS:
            scores = []
            for choice in entry["choices"]:
                context = entry["question"].rstrip()
                whole = tokenizer.encode(entry["question"] + choice).tolist()
                values = engine.log_probabilities([whole])[0]
                scores.append(sum(values[len(tokenizer.encode(context)) - 1 :]))
            right += scores.index(max(scores)) == entry["answer"]
    assert found["ours_choice"]["acc,none"] == pytest.approx(right / 3)
    assert "exact_match,none" in found["ours_text"]
    written = json.loads((tasks / "results.json").read_text())
    assert written["results"]["ours_choice"]["acc,none"] == pytest.approx(right / 3)


@pytest.mark.usefixtures("own_tasks_alone")
def test_bits_per_byte_are_of_the_whole_text(run: Path, tmp_path: Path) -> None:
    """A text of 700 bytes and more tokens than every window: each byte is counted, and the
    log-likelihood is the sum over windows that overlap by one token."""
    page = "naïve 漢字 of json; " * 28
    (tmp_path / "page.jsonl").write_text(json.dumps({"page": page}) + "\n")
    (tmp_path / "page.yaml").write_text(
        "task: ours_page\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'page.jsonl'}}}}}\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    with open_checkpoint(str(run), LossConfig(), print) as model:
        tokenizer, end_tokens = open_tokenizer(model, LossConfig())
        engine = Engine(model.model, end_tokens)
        ids = [end_tokens[0], *tokenizer.encode(page).tolist()]
        for max_length in (0, 16):
            window = max_length or 64  # train.sequence_length
            assert len(ids) > 2 * window
            total, start = 0.0, 0
            while start < len(ids) - 1:
                end = min(start + window, len(ids) - 1)
                seen = ids[max(0, end - window) : end + 1]
                total += sum(engine.log_probabilities([seen])[0][-(end - start) :])
                start = end
            knobs = HarnessConfig(
                tasks=["ours_page"], include_path=str(tmp_path), max_length=max_length
            )
            found = evaluate_harness(str(run), knobs)["ours_page"]["bits_per_byte,none"]
            assert found == pytest.approx(-total / math.log(2) / len(page.encode()), rel=1e-5)


@pytest.mark.usefixtures("own_tasks_alone")
def test_patterns_of_names(run: Path, tasks: Path) -> None:
    knobs = HarnessConfig(tasks=["ours_*"], include_path=str(tasks), limit=1)
    assert evaluate_harness(str(run), knobs).keys() == {"ours_choice", "ours_text"}


@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks=[no_such_task]"], "tasks=no_such_task: the harness has no such task"),
        (["tasks=[]"], "tasks=: the harness has no such task"),
        (["tasks=[x]", "include_path=nowhere"], "include_path=nowhere: no such folder"),
        (["tasks=[x]", "limit=-1"], "limit=-1: give 0 (all) or more"),
        (["tasks=[x]", "batch=0"], "batch=0: give 1 or more"),
        (["tasks=[x]", "prefill_chunk=0"], "prefill_chunk=0: give 1 or more"),
        (["tasks=[x]", "num_fewshot=-2"], "num_fewshot=-2: give -1 (as the task sets it) or more"),
        (["tasks=[x]", "max_length=1"], "max_length=1: give 0 (the model's longest context), or 2"),
        (["tasks=[x]", "max_length=-4"], "max_length=-4"),
        (
            ["tasks=[ours_text]", "max_length=8"],
            "max_length=8: a task generates up to",
        ),
        (["tasks=[ours_choice]", "max_length=2"], "max_length=2: an answer of a task has"),
        (["tasks=[ours_choice]", "num_fewshot=4"], "num_fewshot=4: the task ours_choice has 3 "),
        (["tasks=[ours_lost]"], "tasks=ours_lost: cannot be loaded ("),
        (["tasks=[ours_odd]"], "generation_kwargs of a task: num_beams=4 is not supported"),
    ],
)
def test_bad_input(
    words: list[str], said: str, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit 2, before the model is loaded wherever the files alone tell."""
    lost = (tasks / "ours_choice.yaml").read_text().replace("questions.jsonl", "lost.jsonl")
    (tasks / "lost.yaml").write_text(lost.replace("task: ours_choice", "task: ours_lost"))
    odd = (
        (tasks / "ours_text.yaml").read_text().replace("max_gen_toks", "num_beams: 4, max_gen_toks")
    )
    (tasks / "odd.yaml").write_text(odd.replace("task: ours_text", "task: ours_odd"))
    given = ["evaluate", "harness", "runs/evaluated", f"include_path={tasks}", *words]
    if any(word.startswith("include_path") for word in words):
        given.remove(f"include_path={tasks}")
    assert main(given) == 2
    refused = [line for line in capsys.readouterr().err.splitlines() if "nemotron-train:" in line]
    assert len(refused) == 1 and said in refused[0], refused
