"""Our engine under the LM evaluation harness, offline, on a task made here.

Second truth: log-likelihoods assembled by hand from the engine's own scores of the same strings,
and the harness's accuracy recomputed from them. Not covered: the harness's own tasks, which need
data from the network.
"""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from nemotron_train.cli.main import main
from nemotron_train.evaluate.harness import HarnessModel, evaluate_harness
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


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_each_kind_of_request(run: Path) -> None:
    with open_checkpoint(str(run), LossConfig(), print) as model:
        tokenizer, end_tokens = open_tokenizer(model, LossConfig())
        assert end_tokens
        engine = Engine(model.model, end_tokens)
        asked: Any = HarnessModel(engine, tokenizer, HarnessConfig(tasks=["x"], batch=2))
        text = "def decode(self):\n    return None"
        (rolling,) = asked.loglikelihood_rolling([Request(text)])
        ids = [end_tokens[0], *tokenizer.encode(text).tolist()]
        assert rolling == pytest.approx(sum(engine.log_probabilities([ids])[0]), abs=1e-4)
        (alone,) = asked.loglikelihood([Request("", text)], disable_tqdm=True)
        assert alone[0] == pytest.approx(rolling, abs=1e-4)
        (one,) = asked.generate_until([Request("import", {"until": [], "max_gen_toks": 4})])
        prompt = tokenizer.encode("import").tolist()
        ids = list(prompt)
        for _ in range(4):  # greedy decoding, by scoring every token
            scores = engine.scores([[*ids, token] for token in range(512)])
            ids.append([row[-1][1] for row in scores].index(True))
        assert one == tokenizer.decode(ids[len(prompt) :]).split("<|endoftext|>")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks=[no_such_task]"], "tasks=no_such_task: the harness has no such task"),
        (["tasks=[ours]", "include_path=nowhere"], "include_path=nowhere: no such folder"),
        (["tasks=[ours]", "limit=-1"], "limit=-1"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "harness", "runs/evaluated", *words]) == 2
    assert said in capsys.readouterr().err
