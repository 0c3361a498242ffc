"""Text that grows: whole characters, and an end before a stop string, however tokens split it.

Second truth: decoding everything at once and searching the whole text for the stop string that is
completed first.
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
