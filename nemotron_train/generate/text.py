"""Text that grows token by token: whole characters only, and an end before a stop string.

Owns: what may be shown of a sequence so far. Does not own: the tokenizer, printing. No torch.
"""

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no character (yet)
_LONGEST_UNFINISHED = 3  # bytes of a UTF-8 character that lacks its last one
_CONTEXT, _LONGEST_TAIL = 8, 64  # tokens


class Decoder(Protocol):
    """Turns ids into text; `data.tokenize.LoadedTokenizer` is one."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class GrowingText:
    """The text of one sequence. `add` and `finish` return what became sure since the last call:
    whole characters that no stop string begins in."""

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = decoder, [text for text in stop if text]
        self._tail: list[int] = []  # the tokens from which the text is decoded anew
        self._decoded = 0  # characters of the tail's text that are in `_all`
        self._all, self._shown = "", 0
        self.is_stopped = False  # a stop string was met; the text ends before it

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return self._all[: self._shown]

    def add(self, token: int) -> str:
        """Take one more token."""
        assert not self.is_stopped
        self._tail.append(token)
        text = self._decoder.decode(self._tail)
        whole = len(text)
        while whole > max(0, len(text) - _LONGEST_UNFINISHED) and text[whole - 1] == _UNFINISHED:
            whole -= 1
        self._append(text[self._decoded : whole])
        self._decoded = max(self._decoded, whole)
        if len(self._tail) > _LONGEST_TAIL and whole == len(text):
            # Some decoders treat the first token of a text apart, so a few tokens stay.
            self._tail = self._tail[-_CONTEXT:]
            self._decoded = len(self._decoder.decode(self._tail))
        return self._show(self._held_back())

    def finish(self) -> str:
        """No more tokens: show what was held back, unfinished characters as decoded."""
        if not self.is_stopped:
            self._append(self._decoder.decode(self._tail)[self._decoded :])
        return self._show(0)

    def _append(self, more: str) -> None:
        before = len(self._all)
        self._all += more
        longest = max(map(len, self._stop), default=0)
        start = max(0, before - longest + 1)
        found = [(self._all.find(text, start), len(text)) for text in self._stop]
        # The one that is complete first, however tokens cut the text.
        ends = [(place + length, place) for place, length in found if place >= 0]
        if ends:
            self._all, self.is_stopped = self._all[: min(ends)[1]], True

    def _held_back(self) -> int:
        """Characters at the end in which a stop string may have begun."""
        if self.is_stopped:
            return 0
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._all)), longest, -1):
                if self._all.endswith(text[:length]):
                    longest = length
                    break
        return longest

    def _show(self, held_back: int) -> str:
        end = max(self._shown, len(self._all) - held_back)
        new, self._shown = self._all[self._shown : end], end
        return new
