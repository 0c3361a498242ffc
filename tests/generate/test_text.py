"""Text that grows: whole characters, and an end before a stop string, however tokens split it.

Second truth: decoding everything at once and searching the whole text for the stop string that is
completed first. The decoders are those of byte-level, SentencePiece-like (spaces before words,
bytes as fallback), WordPiece and end-of-word tokenizers. Not covered: CTC decoders, which merge
tokens; prompts that end within a character, which no text gives.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from nemotron_train.data.tokenize import LoadedTokenizer, train_tokenizer
from nemotron_train.generate.text import GrowingText

TEXT = "Grüße, 世界! «naïve» façade 🙂🙃 — def main(): return 'été'\n\n" * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    """Byte-level: a character of several bytes is several tokens, unless they were merged."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([TEXT], 300, folder)


def test_half_a_character_is_not_shown(tokenizer: LoadedTokenizer) -> None:
    growing, shown = GrowingText(tokenizer), []
    for token in tokenizer.encode("a🙂世é!"):
        shown.append(growing.add(int(token)))
        assert "\ufffd" not in shown[-1]
    assert "".join(shown) + growing.finish() == "a🙂世é!"
    assert "" in shown, "a character of several tokens waits for its last one"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=200))
def test_any_tokens_give_their_text(tokenizer: LoadedTokenizer, ids: list[int]) -> None:
    """Includes bytes that are not valid text, and texts longer than the stretch that is decoded
    anew."""
    growing = GrowingText(tokenizer)
    shown = "".join(growing.add(token) for token in ids)
    assert shown + growing.finish() == tokenizer.decode(ids) == growing.text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab\n世", max_size=60),
    stop=st.lists(st.text(alphabet="ab\n世", min_size=1, max_size=4), max_size=3),
)
def test_ends_before_the_first_stop(tokenizer: LoadedTokenizer, text: str, stop: list[str]) -> None:
    growing, shown = GrowingText(tokenizer, stop), ""
    for token in tokenizer.encode(text):
        shown += growing.add(int(token))
        assert not any(s in shown for s in stop)
        if growing.is_stopped:
            break
    shown += growing.finish()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert growing.is_stopped == bool(ends)


def test_a_stop_string_across_tokens_is_never_half_shown(tokenizer: LoadedTokenizer) -> None:
    growing, shown = GrowingText(tokenizer, ["\n\n"]), []
    for token in tokenizer.encode("x\ny\n\nz"):
        shown.append(growing.add(int(token)))
        if growing.is_stopped:
            break
    assert "".join(shown) == "x\ny" and growing.is_stopped


WORDS = ["alpha", "beta", "gamma", "."]


def sentencepiece_like() -> Tokenizer:
    """Llama's way: "\u2581" for spaces, one before every text, byte fallback."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [piece for word in WORDS for piece in (word, "\u2581" + word)]
    scores = [(piece, -1.0 - index / 1000) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [*steps, decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteFallback(), decoders.Metaspace()]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def end_of_word() -> Tokenizer:
    pieces = [*WORDS, *(f"{word}</w>" for word in WORDS)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.BPEDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece_like, metaspace])
@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([*WORDS, " ", "  ", "\u00e9", "\u4e16", "\U0001f642"]), max_size=40
    ),
    cut=st.integers(0, 200),
)
def test_continues_the_prompt(make: Any, parts: list[str], cut: int) -> None:
    """The text after the prompt is what the whole text has more than the prompt's, wherever the
    tokens are cut between two characters and whatever run of bytes they are in."""
    loaded = LoadedTokenizer(make(), "", 300)
    ids = loaded.encode("".join(parts)).tolist()
    prompt = loaded.decode(ids[:cut])
    assume("\ufffd" not in prompt)
    growing = GrowingText(loaded, prompt=ids[:cut])
    shown = "".join(growing.add(token) for token in ids[cut:])
    assert "\ufffd" not in shown
    assert prompt + shown + growing.finish() == loaded.decode(ids)


@pytest.mark.parametrize("make", [word_piece, end_of_word])
@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 7), max_size=120), cut=st.integers(0, 120))
def test_continues_the_prompt_with_any_tokens(make: Any, ids: list[int], cut: int) -> None:
    loaded = LoadedTokenizer(make(), "", 8)
    growing = GrowingText(loaded, prompt=ids[:cut])
    shown = "".join(growing.add(token) for token in ids[cut:])
    assert loaded.decode(ids[:cut]) + shown + growing.finish() == loaded.decode(ids)


def test_a_stop_string_with_a_space_is_found_at_once() -> None:
    loaded = LoadedTokenizer(sentencepiece_like(), "", 300)
    growing = GrowingText(loaded, [" beta"], loaded.encode("alpha").tolist())
    (beta,) = loaded.encode("beta").tolist()
    assert growing.add(beta) == "" and growing.is_stopped and growing.finish() == ""
