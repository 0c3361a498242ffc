"""Incremental detokenization: emits complete characters only and ends before a stop string.

Owns: which part of a sequence's text is ready to print. Does not own: the tokenizer, printing. No
torch.
"""

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\ufffd"  # replacement character for bytes that are not a complete character
_LONGEST_UNFINISHED = 3  # bytes of a UTF-8 character without its last byte
_CONTEXT, _LONGEST_TAIL = 8, 64  # tokens


class Decoder(Protocol):
    """Converts ids to text; `data.tokenize.LoadedTokenizer` implements it."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class GrowingText:
    """The text of one sequence. `add` and `finish` return the newly final text: complete characters
    that cannot be the start of a stop string."""

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = decoder, [text for text in stop if text]
        self._tail: list[int] = []  # last tokens; each `add` decodes only these again
        self._decoded = 0  # characters of the tail's text that are in `_all`
        self._all, self._shown = "", 0
        self.is_stopped = False  # a stop string was met; the text ends before it

    @property
    def text(self) -> str:
        """All text returned so far."""
        return self._all[: self._shown]

    def add(self, token: int) -> str:
        """Append one token and return the newly final text. Not allowed after a stop string."""
        assert not self.is_stopped
        self._tail.append(token)
        text = self._decoder.decode(self._tail)
        complete = len(text)
        while (
            complete > max(0, len(text) - _LONGEST_UNFINISHED) and text[complete - 1] == _UNFINISHED
        ):
            complete -= 1
        self._append(text[self._decoded : complete])
        self._decoded = max(self._decoded, complete)
        if len(self._tail) > _LONGEST_TAIL and complete == len(text):
            # Some decoders treat the first token differently, so keep a few tokens as context.
            self._tail = self._tail[-_CONTEXT:]
            self._decoded = len(self._decoder.decode(self._tail))
        return self._show(self._num_withheld())

    def finish(self) -> str:
        """End the sequence and return the rest of the text, incomplete characters as decoded."""
        if not self.is_stopped:
            self._append(self._decoder.decode(self._tail)[self._decoded :])
        return self._show(0)

    def _append(self, new_text: str) -> None:
        old_length = len(self._all)
        self._all += new_text
        longest = max(map(len, self._stop), default=0)
        start = max(0, old_length - longest + 1)
        matches = [(self._all.find(text, start), len(text)) for text in self._stop]
        # Cut at the stop string that is complete first, independent of token boundaries.
        ends = [(position + length, position) for position, length in matches if position >= 0]
        if ends:
            self._all, self.is_stopped = self._all[: min(ends)[1]], True

    def _num_withheld(self) -> int:
        """Number of characters at the end that may be the start of a stop string."""
        if self.is_stopped:
            return 0
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._all)), longest, -1):
                if self._all.endswith(text[:length]):
                    longest = length
                    break
        return longest

    def _show(self, withheld: int) -> str:
        end = max(self._shown, len(self._all) - withheld)
        new, self._shown = self._all[self._shown : end], end
        return new
