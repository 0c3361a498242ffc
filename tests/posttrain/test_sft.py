"""Supervised fine-tuning on conversations.

Second truths: the log-probabilities that the decoding engine gives each conversation by itself, one
after the other; the uninterrupted run, bit for bit. Not covered: whether a useful model comes out,
and layouts beyond two data-parallel ranks.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.data.open import open_data
from nemotron_train.data.tokenize import CHAT_TOKENS, load_tokenizer
from tests import warm_process

pytestmark = pytest.mark.usefixtures("in_small_run")

Small = tuple[Path, list[str]]
Metrics = Callable[[Path], list[dict]]
Weights = Callable[[Path, int], dict[str, object]]
FROM, ROWS = "branch=runs/sft_base@10", "rows=sft_rows.jsonl"
SFT = ["posttrain", "sft", FROM, ROWS, "train.sequence_length=64"]


@pytest.fixture(scope="module")
def rows(small_run: Small) -> Path:
    """A pretrained run `base` and 90 conversations, most with reasoning."""
    path = small_run[0] / "sft_rows.jsonl"
    with open(path, "w") as file:
        for number in range(90):
            row = {"prompt": f"{number} + 1?", "answer": f"{number + 1}"}
            if number % 4:
                row["thinking"] = f"one more than {number}"
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def base(small_run: Small, rows: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_run[0])
        assert main(["pretrain", *small_run[1], "name=sft_base"]) == 0
        yield


@pytest.fixture(scope="module")
def tuned(base: None) -> Path:
    assert main([*SFT, "name=sft", "epochs=4", "optim.peak_learning_rate=3e-3"]) == 0
    return Path("runs/sft")


@pytest.fixture(scope="module")
def whole(base: None) -> Path:
    assert main([*SFT, "name=sft_whole"]) == 0
    return Path("runs/sft_whole")


def test_the_loss_is_that_of_the_answers_alone(tuned: Path, metrics: Metrics) -> None:
    """The first step's loss, of packed rows, against every conversation scored by itself."""
    from nemotron_train.generate.checkpoint import open_checkpoint
    from nemotron_train.generate.engine import Engine
    from nemotron_train.generate.knobs import ModelKnobs

    config = compose_config(["resume=runs/sft"])
    train, _ = open_data(config, print)
    batch, _ = train.take(
        train.state_at_start(), config.train.global_batch_tokens // config.train.sequence_length
    )
    conversations: list[tuple[list[int], np.ndarray]] = []
    for ids, labels, mask, documents in zip(
        batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.document_ids_BS, strict=True
    ):
        for number in range(documents.max() + 1):
            places = np.flatnonzero(documents == number)
            counted = mask[places].astype(bool)
            conversations.append(([*ids[places].tolist(), int(labels[places[-1]])], counted))
    with open_checkpoint("runs/sft_base@10", ModelKnobs(), print) as opened:
        scored = Engine(opened.model).log_probabilities([ids for ids, _ in conversations])
    wanted = [
        -value
        for values, (_, counted) in zip(scored, conversations, strict=True)
        for value in np.array(values)[counted]
    ]
    steps = [row for row in metrics(Path("runs/sft")) if "loss" in row]
    assert steps[0]["step"] == 1
    assert steps[0]["loss"] == pytest.approx(np.mean(wanted), abs=2e-5)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[-1]["validation_loss"] < 0.5 * steps[0]["loss"]
    assert {"mtp_loss_1", "mtp_loss_2"} <= steps[0].keys()


def test_interrupted_and_resumed_is_the_same(
    whole: Path, metrics: Metrics, weights: Weights
) -> None:
    assert main([*SFT, "name=sft_cut", "train.stop_after_steps=3"]) == 3
    command = [sys.executable, "-m", "nemotron_train", "posttrain", "sft", "resume=runs/sft_cut"]
    done = warm_process.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = metrics(whole)
    assert metrics(Path("runs/sft_cut")) == steps
    last = max(row["step"] for row in steps)
    assert weights(Path("runs/sft_cut"), last) == weights(whole, last)


def test_the_schedule_begins_anew(whole: Path, metrics: Metrics) -> None:
    """Two epochs, the learning rate from 0.2 of the parent's peak down to 0; with the user's own
    values where there are some."""
    config = compose_config(["resume=runs/sft_whole"])
    parent = compose_config(["resume=runs/sft_base"])
    train, _ = open_data(config, print)
    tokens = 2 * train.num_samples * config.train.sequence_length
    batch = config.train.global_batch_tokens
    assert config.train.total_tokens == -(-tokens // batch) * batch
    assert config.optim.peak_learning_rate == 0.2 * parent.optim.peak_learning_rate
    steps = [row for row in metrics(whole) if "loss" in row]
    assert steps[0]["tokens"] == batch and steps[-1]["lr"] == 0.0
    words = ["name=sft_mine", "train.total_tokens=512", "optim.peak_learning_rate=1e-5"]
    assert main([*SFT, *words]) == 0
    mine = compose_config(["resume=runs/sft_mine"])
    assert (mine.train.total_tokens, mine.optim.peak_learning_rate) == (512, 1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([ROWS, "name=a"], "branch is not set"),
        ([FROM, "name=a"], "rows is not set"),
        ([FROM, ROWS], "name is not set"),
        ([FROM, ROWS, "name=a", "epochs=0"], "epochs=0"),
        ([FROM, "rows=none.jsonl", "name=a"], "rows=none.jsonl"),
        ([FROM, "rows=sft_bad.jsonl", "name=a"], "sft_bad.jsonl:1: answer is missing"),
        ([FROM, ROWS, "name=a", "rwos=1"], "rwos"),
        ([FROM, ROWS, "name=a", "too_long=cut"], "too_long"),
        (["branch=runs/sft_base@7", ROWS, "name=a"], "branch=runs/sft_base@7"),
        (["resume=runs/sft_base", ROWS], "keeps its conversations"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sft_bad.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["posttrain", "sft", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not Path("runs/a").exists()


def test_a_tokenizer_without_chat_tokens_gets_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`posttrain sft` refuses and names the step; after it the model gives the same probabilities
    to what it knew, up to the share of the new tokens."""
    from nemotron_train.generate.checkpoint import open_checkpoint
    from nemotron_train.generate.engine import Engine
    from nemotron_train.generate.knobs import ModelKnobs

    content: dict[str, Any] = json.loads(Path("data/tokenizer/tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:1]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {k: v for k, v in vocabulary.items() if k not in CHAT_TOKENS}
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_text(json.dumps(content))
    text = "\n".join(json.dumps({"text": f"line {n} of some text"}) for n in range(400))
    (tmp_path / "text.jsonl").write_text(text)
    prepared = tmp_path / "prepared"
    words = [f"input={tmp_path}/text.jsonl", f"output={prepared}", f"tokenizer={plain}"]
    assert main(["data", "prepare", *words, "validation_fraction=0.2", "workers=1"]) == 0
    old = compose_config(["resume=runs/sft_base"])
    assert load_tokenizer(plain).vocab_size == old.model.vocab_size  # no row is free
    data = [f"data.tokenizer={prepared}/tokenizer"]
    blend = f"[{{path: {prepared}, weight: 1.0}}]"
    data += [f"data.phases=[{{from_tokens: 0, blend: {blend}}}]", f"data.validation={blend}"]
    words = ["branch=runs/sft_base@10", "weights_only=true", "name=sft_plain", *data]
    words += ["train.total_tokens=256", "optim.warmup_tokens=0", "optim.decay_tokens=0"]
    assert main(["pretrain", *words]) == 0
    capsys.readouterr()
    sft = ["posttrain", "sft", "rows=sft_rows.jsonl", "train.sequence_length=64", "epochs=1"]
    assert main([*sft, "branch=runs/sft_plain@1", "name=sft_refused"]) == 2
    error = capsys.readouterr().err
    assert "<|im_start|>" in error and "convert add-chat-tokens" in error
    assert (
        main(["convert", "add-chat-tokens", "runs/sft_plain@1", "--out", "runs/sft_plain_chat"])
        == 0
    )
    assert (
        main(["convert", "add-chat-tokens", "runs/sft_plain@1", "--out", "runs/sft_plain_chat"])
        == 0
    )
    assert "is there already, complete" in capsys.readouterr().out
    new = compose_config(["resume=runs/sft_plain_chat"])
    assert new.model.vocab_size == old.model.vocab_size + 64
    ids = load_tokenizer(plain).encode("line 3 of some text").tolist()
    results = []
    for run in ("runs/sft_plain@1", "runs/sft_plain_chat@0"):
        with open_checkpoint(run, ModelKnobs(), print) as opened:
            results.append(np.array(Engine(opened.model).log_probabilities([ids])[0]))
    fell = results[0] - results[1]  # what the 64 new rows take
    assert (fell > 0).all() and np.exp(fell).max() < 1 + 2 * 64 / old.model.vocab_size
    assert main([*sft, "branch=runs/sft_plain_chat@0", "name=sft_tuned"]) == 0
    assert main(["convert", "add-chat-tokens", "runs/sft_base@10", "--out", "runs/sft_twice"]) == 2
    assert "has all tokens of the chat format already" in capsys.readouterr().err


def test_a_tuned_model_answers_here_and_in_transformers(tuned: Path, tmp_path: Path) -> None:
    """`chat=true` continues the prompt of the format and stops at <|im_end|>; the exported folder
    has a template that gives the same prompt, and the ids that end an answer."""
    from transformers import AutoTokenizer, GenerationConfig

    step = max(int(path.name[5:]) for path in (tuned / "checkpoints").glob("step_*"))
    assert main(["convert", "to-hf", f"runs/sft@{step}", "--out", str(tmp_path / "hf")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    settings = GenerationConfig.from_pretrained(tmp_path / "hf")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert settings.eos_token_id == [0, end]
    for thinking in (True, False):
        words = ["prompt=4 + 1?", "chat=true", f"thinking={thinking}".lower(), "temperature=0"]
        output = tmp_path / f"out{thinking}.jsonl"
        assert main(["generate", "runs/sft", *words, "max_new_tokens=40", f"output={output}"]) == 0
        (line,) = [json.loads(text) for text in output.read_text().splitlines()]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "4 + 1?"}],
            add_generation_prompt=True,
            enable_thinking=thinking,
            return_dict=False,
        )
        assert line["prompt_tokens"] == prompt
        assert line["ended_by"] == "end" and line["tokens"][-1] == end
