"""Our model of the LM evaluation harness against lm-eval's own (`--model hf`), request by request.

Second truth: `HFLM` of the installed lm-eval with transformers' Nemotron-H on the folder that
`convert to-hf` writes; for the windows of a long text also its rolling windows of one single
token. The model has generic weights, and all layers are Mamba-2, attention or mixture of experts.
Two tokenizers: byte-level BPE without a beginning-of-text token, and one like SentencePiece, whose
post-processor adds one. Not covered: sampled text (each library draws its own random numbers),
texts generated after a stop string that is a control token (HFLM's then depend on its batch), BF16.
"""

import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

import transformers

from nemotron_train.cli.main import main
from nemotron_train.config.errors import ConfigError
from nemotron_train.evaluate.harness import window_of
from nemotron_train.evaluate.harness_model import HarnessModel, read_generation
from nemotron_train.evaluate.harness_tokens import HarnessTokens
from nemotron_train.evaluate.knobs import HarnessConfig
from nemotron_train.generate.checkpoint import open_checkpoint, open_tokenizer, resolve_checkpoint
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.sampling import distribution

CONTEXT = 64  # of the model, in tokens
# Logits of the two libraries differ by up to 1e-4 (tests/convert); a text here sums 200 of them.
TOLERANCE = 2e-3

TEXTS = [
    "",
    "x",
    "def f(x):\n\treturn x ** 2",
    "naïve 漢字 — 🙂🙃 <|endoftext|> </s> and <s> in a text",
    "  leading and trailing  ",
    "import json, re\nfor line in lines:\n    print(line)\n" * 5,
    "Ω漢字🙂" * 12,
]
PAIRS = [
    ("import ", "json"),
    ("import  ", " json"),
    ("def __init__(", "self, x):"),
    ("", "def f"),
    ("", "<s> begins"),
    ("<s> begins", " here"),
    ("naïve 漢", "字🙂 — Ω"),
    ("for line in lines:\n    print(line)\n" * 9, "return 漢字"),
    ("for line in lines:\n    print(line)\n" * 9, "return json"),
    ("a", "b" * 30),
]
PROMPTS = [
    "import",
    "def f(x):\n    ",
    "<s> naïve 漢字",
    "for line in lines:\n    print(line)\n" * 9,
]


class Request:
    """What the models read of lm-eval's Instance."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def sentence_piece_like(folder: Path) -> None:
    """BPE over pieces that begin with ▁, with bytes as fallback; adds <s> before a text."""
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)},
    }
    words = ["import", "json", "for", "line", "in", "print", "return", "begins", "here"]
    merges = []
    for letter in sorted(set("▁()_:,*=<>" + "abcdefghijklmnopqrstuvwxyz")):
        vocab.setdefault(letter, len(vocab))
    for word in words:
        piece = "▁"
        for letter in word:
            if (piece, letter) not in merges:
                merges.append((piece, letter))
            piece += letter
            vocab.setdefault(piece, len(vocab))
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(prepend)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    assert made.get_vocab_size() <= 512
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def hflm_class() -> Any:
    """lm-eval's own model class. Its module imports accelerate, which the class does not use for a
    model that is already loaded; an empty stand-in is enough where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("accelerate") is None:
            stand_in: Any = types.ModuleType("accelerate")
            for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
                setattr(stand_in, name, None)
            stand_in.get_max_memory = None
            patch.setitem(sys.modules, "accelerate", stand_in)
            patch.setitem(sys.modules, "accelerate.utils", stand_in)
        from lm_eval.models.huggingface import HFLM
    return HFLM


class Both:
    """Our model and lm-eval's of the same weights, made with the same window and batch."""

    def __init__(self, run: Path, folder: Path, engine: Engine, loaded: Any) -> None:
        self.run, self.folder, self.engine, self.loaded = run, folder, engine, loaded
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def ours(self, max_length: int, batch: int) -> Any:
        knobs = HarnessConfig(tasks=["x"], batch=batch, max_length=max_length, prefill_chunk=16)
        tokens = HarnessTokens(self.loaded, self.run / "tokenizer", self.engine.end_token)
        window = window_of(resolve_checkpoint(str(self.run), knobs), max_length)
        return HarnessModel(self.engine, tokens, knobs, window)

    def theirs(self, max_length: int, batch: int) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        given = max_length or None
        return hflm_class()(self.model, tokenizer=tokenizer, max_length=given, batch_size=batch)


@pytest.fixture(scope="module", params=["byte level", "sentence piece"])
def both(
    request: pytest.FixtureRequest,
    run: Path,
    small_run: tuple[Path, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Both]:
    """The small run, exported, made sharper and given the tokenizer, imported, exported again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_run[0])
        made = tmp_path_factory.mktemp("both")
        assert main(["convert", "to-hf", f"{run}@10", "--out", str(made / "first")]) == 0
        (shard,) = (made / "first").glob("*.safetensors")
        tensors = load_file(shard)
        draws = torch.Generator().manual_seed(7)
        for name in ("lm_head.weight", "backbone.embeddings.weight"):
            tensors[name] = torch.randn(tensors[name].shape, generator=draws)
        tensors["lm_head.weight"] *= 0.4  # some tokens are likely, none is certain
        save_file(tensors, shard, metadata={"format": "pt"})
        if request.param == "sentence piece":
            sentence_piece_like(made / "first")
            (made / "first" / "generation_config.json").write_text('{"eos_token_id": 2}')
        words = ["--out", str(made / "run"), f"train.sequence_length={CONTEXT}"]
        fields = json.loads((made / "first" / "config.json").read_text())
        fields["max_position_embeddings"] = CONTEXT
        (made / "first" / "config.json").write_text(json.dumps(fields))
        assert main(["convert", "from-hf", str(made / "first"), *words]) == 0
        assert main(["convert", "to-hf", f"{made / 'run'}@0", "--out", str(made / "folder")]) == 0
        shutil.rmtree(made / "first")
        knobs = HarnessConfig(tasks=["x"])
        with open_checkpoint(str(made / "run"), knobs, print) as model:
            loaded, end_tokens = open_tokenizer(model, knobs)
            engine = Engine(model.model, end_tokens)
            yield Both(made / "run", made / "folder", engine, loaded)


@pytest.mark.parametrize("max_length", [0, 2, 63])
def test_rolling_is_hflm(both: Both, max_length: int) -> None:
    """0 is the model's own context. Texts are shorter and longer than the window, in one batch."""
    requests = [Request(text) for text in TEXTS]
    ours = both.ours(max_length, 3).loglikelihood_rolling(requests)
    theirs = both.theirs(max_length, 3).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert max(ours[1:]) < -1


@pytest.mark.parametrize("max_length", [0, 33])
def test_answers_are_hflm(both: Both, max_length: int) -> None:
    """Also answers of one token that greedy decoding gives, so that the flag has both values."""
    ours, theirs = both.ours(max_length, 4), both.theirs(max_length, 4)
    contexts = [*PROMPTS, *TEXTS[1:], *(f"return {number}" for number in range(24))]
    asked = [Request(context, {"until": [], "max_gen_toks": 1}) for context in contexts]
    best = ours.generate_until(asked)
    requests = [Request(*pair) for pair in PAIRS]
    requests += [Request(*pair) for pair in zip(contexts, best, strict=True) if pair[1].strip()]
    found = ours.loglikelihood(requests, disable_tqdm=True)
    wanted = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], abs=TOLERANCE)
    assert [is_best for _, is_best in found] == [is_best for _, is_best in wanted]
    assert {is_best for _, is_best in wanted} == {True, False}


@pytest.mark.parametrize(
    ("max_length", "batch", "options"),
    [
        (0, 4, {"until": ["e", "\n\n", "漢字"], "max_gen_toks": 24}),
        (0, 1, {"until": "x", "max_new_tokens": 31, "do_sample": False, "temperature": 0.7}),
        (20, 4, {"until": [], "max_gen_toks": 19}),
        (20, 3, {"max_gen_toks": 12, "num_beams": 1}),
    ],
)
def test_generated_texts_are_hflm(
    both: Both, max_length: int, batch: int, options: dict[str, Any]
) -> None:
    """Prompts are shorter and longer than what the window leaves them."""
    requests = [Request(prompt, dict(options)) for prompt in PROMPTS]
    ours = both.ours(max_length, batch).generate_until(requests)
    theirs = both.theirs(max_length, batch).generate_until(requests, disable_tqdm=True)
    assert ours == theirs
    assert len(set(ours)) > 1 and max(map(len, ours)) > 1


def test_every_stop_string_ends_a_text(both: Both) -> None:
    """Each part of a generated text in turn is the stop string, also one that a token spans only in
    part."""
    free = {"until": [], "max_gen_toks": 24}
    (text,) = both.ours(0, 1).generate_until([Request("import", free)])
    stops = [text[i : i + length] for length in (1, 2, 5) for i in range(1, len(text) - length, 6)]
    stops = [stop for stop in stops if "\ufffd" not in stop]  # it may stand for half a character
    assert len(stops) > 3
    requests = [Request("import", {"until": [stop], "max_gen_toks": 24}) for stop in stops]
    ours = both.ours(0, 4).generate_until(requests)
    assert ours == both.theirs(0, 1).generate_until(requests, disable_tqdm=True)
    assert ours == [text.split(stop)[0] for stop in stops]


def test_pairs_are_encoded_as_by_hflm(both: Both) -> None:
    ours, theirs = both.ours(0, 1), both.theirs(0, 1)
    assert (ours.prefix_token_id, ours.eot_token_id) == (
        theirs.prefix_token_id,
        theirs.eot_token_id,
    )
    for context, answer in PAIRS:
        assert ours.tok_encode(context + answer) == theirs.tok_encode(context + answer)
        if context:
            assert ours._encode_pair(context, answer) == theirs._encode_pair(context, answer)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("a", "b" * 60), "max_length=12: an answer of a task has"),
        (("a", ""), "nothing to score"),
        (("", ""), "nothing to score"),
        (("a", "\ud83d"), "not valid Unicode"),
    ],
)
def test_what_hflm_asserts_is_one_line(both: Both, pair: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        both.ours(12, 1).loglikelihood([Request(*pair)], disable_tqdm=True)


def test_sampled_texts_differ_and_come_back(both: Both) -> None:
    """Repeats of one request are drawn independently, and the same ones again the next time."""
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = [Request("import", options)] * 6
    texts = both.ours(0, 4).generate_until(requests)
    assert len(set(texts)) > 1
    assert both.ours(0, 4).generate_until(requests) == texts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_gen_toks": 16}, "max_length=16: a task generates up to max_gen_toks=16"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"max_gen_toks": "many"}, "many"),
        ({"max_gen_toks": 4, "num_beams": 4}, "num_beams=4 is not supported"),
        ({"max_gen_toks": 4, "repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_gen_toks": 4, "do_sample": True}, "temperature above 0"),
        ({"max_gen_toks": 4, "do_sample": True, "temperature": -1}, "temperature=-1"),
        ({"max_gen_toks": 4, "until": [7]}, "must be texts"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_generation(options, 16, 16)


def test_a_sampling_task_keeps_the_tokens_that_transformers_keeps() -> None:
    """Temperature, top-k (50 unless the task says) and top-p, against transformers' own filters."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(3)) * 3
    for options in ({"temperature": 0.7}, {"temperature": 1.3, "top_k": 9, "top_p": 0.8}):
        wanted = read_generation({"do_sample": True, "max_gen_toks": 4} | options, 16, 16)
        filters = transformers.LogitsProcessorList()
        filters.append(transformers.TemperatureLogitsWarper(options["temperature"]))
        filters.append(transformers.TopKLogitsWarper(int(options.get("top_k", 50))))
        filters.append(transformers.TopPLogitsWarper(options.get("top_p", 1.0)))
        theirs = torch.softmax(filters(None, logits), -1)
        assert torch.allclose(distribution(logits, wanted.sampling).float(), theirs, atol=1e-6)
