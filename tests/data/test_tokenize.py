"""Text never becomes a control token, whatever the type of the tokenizer.

Second truth: the ids of the same text with the control token's characters taken apart by hand.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.tokenize import (
    FILE_NAME,
    LoadedTokenizer,
    copy_tokenizer,
    end_token_ids,
    load_tokenizer,
)

TEXTS = ["alpha beta gamma delta of the " * 5] * 20


def saved(tokenizer: Tokenizer, folder: Path) -> LoadedTokenizer:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / FILE_NAME))
    return load_tokenizer(folder)


def unigram(folder: Path) -> LoadedTokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return saved(tokenizer, folder)


def word_level(folder: Path) -> LoadedTokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return saved(tokenizer, folder)


def byte_level(folder: Path) -> LoadedTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return saved(tokenizer, folder)


@pytest.mark.parametrize("make", [unigram, word_level, byte_level])
@pytest.mark.parametrize(
    "text", ["alpha </s> beta", "</s>", "</s></s>", "alpha</s>beta", "< /s>", "</s", "alpha beta"]
)
def test_no_text_becomes_a_control_token(make, text: str, tmp_path: Path) -> None:
    loaded = make(tmp_path)
    control = loaded.tokenizer.token_to_id("</s>")
    ids = loaded.encode(text)
    assert control not in ids and len(ids)
    if "</s>" not in text:
        assert ids.tolist() == loaded.tokenizer.encode(text, add_special_tokens=False).ids


def test_the_unknown_token_is_no_control_token(tmp_path: Path) -> None:
    """A word that the tokenizer does not know becomes <unk>, as in training."""
    loaded = word_level(tmp_path)
    unknown = loaded.tokenizer.token_to_id("<unk>")
    assert loaded.encode("alpha zebra").tolist()[1] == unknown
    assert unknown not in loaded.control_tokens


def test_byte_level_text_comes_back(tmp_path: Path) -> None:
    loaded = byte_level(tmp_path)
    text = "alpha </s> beta"
    assert loaded.decode(loaded.encode(text)) == text


def test_a_control_token_of_one_character_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "§"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    loaded = saved(tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="'§'"):
        loaded.encode("alpha § beta")


@pytest.mark.parametrize(
    ("generation", "settings", "tokens"),
    [
        ({"eos_token_id": [1, 0]}, {"eos_token": "</s>"}, ["</s>", "<unk>"]),
        ({"eos_token_id": 1}, {}, ["</s>"]),
        ({}, {"eos_token": {"content": "</s>"}}, ["</s>"]),
        (None, {"eos_token": "</s>"}, ["</s>"]),
        (None, {"eos_token": None}, []),
        (None, None, []),
    ],
)
def test_end_tokens_of_what_lies_beside_the_tokenizer(
    generation: object, settings: object, tokens: list[str], tmp_path: Path
) -> None:
    """Hugging Face's order: generation_config.json, then the tokenizer's own eos_token. A copy of
    the tokenizer takes the files along."""
    loaded = word_level(tmp_path / "a")
    files = {"generation_config.json": generation, "tokenizer_config.json": settings}
    for name, content in files.items():
        if content is not None:
            (tmp_path / "a" / name).write_text(json.dumps(content))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    expected = tuple(loaded.tokenizer.token_to_id(token) for token in tokens)
    assert (
        end_token_ids(loaded, tmp_path / "a") == end_token_ids(loaded, tmp_path / "b") == expected
    )
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("eos", [99, "x", [1, True], -1])
def test_an_end_token_that_is_no_id_is_named(eos: object, tmp_path: Path) -> None:
    loaded = word_level(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        end_token_ids(loaded, tmp_path)
