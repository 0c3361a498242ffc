"""Incremental detokenization: emits complete characters only and ends before a stop string.

Owns: which part of a sequence's text is ready to print. Does not own: the tokenizer, printing. No
torch.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

_UNFINISHED = "\ufffd"  # replacement character for bytes that are not a complete character
_LONGEST_UNFINISHED = 3  # bytes of a UTF-8 character without its last byte, thus tokens at most
_MOST_PENDING, _CONTEXT = 8, 8  # tokens


class Decoder(Protocol):
    """Converts ids to text; `data.tokenize.LoadedTokenizer` implements it."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class GrowingText:
    """The text of one sequence. `add` and `finish` return the newly final text: complete characters
    that cannot be the start of a stop string.

    prompt: the ids before the first added one, those of a whole text. Many decoders write a token
    differently at the start of a text (SentencePiece-like ones drop its space), and those with byte
    fallback write a whole run of bytes as replacement characters while the last character is
    incomplete. So tokens are decoded after a context of tokens whose text is final, and a text that
    ends in a replacement character waits for more tokens.
    """

    def __init__(
        self, decoder: Decoder, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._decoder, self._stop = decoder, [text for text in stop if text]
        self._context = self._end_of(prompt)  # tokens whose text is final
        self._pending: list[int] = []  # tokens after them
        self._all, self._shown = "", 0
        self.is_stopped = False  # a stop string was met; the text ends before it

    @property
    def text(self) -> str:
        """All text returned so far."""
        return self._all[: self._shown]

    def add(self, token: int) -> str:
        """Append one token and return the newly final text. Not allowed after a stop string."""
        assert not self.is_stopped
        self._pending.append(token)
        if not self._decoder.decode(self._context + self._pending).endswith(_UNFINISHED):
            self._settle(len(self._pending))
        elif len(self._pending) > _MOST_PENDING:
            # Only the last tokens can still become a character; the bytes before them are invalid.
            self._settle(len(self._pending) - _LONGEST_UNFINISHED)
        return self._show(self._num_withheld())

    def finish(self) -> str:
        """End the sequence and return the rest of the text, incomplete characters as decoded."""
        if not self.is_stopped:
            self._settle(len(self._pending))
        return self._show(0)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, beginning at a complete character."""
        count = _CONTEXT
        while count < len(prompt):
            end = list(prompt[-count:])
            if not self._decoder.decode(end).startswith(_UNFINISHED):
                return end
            count *= 2
        return list(prompt)

    def _settle(self, count: int) -> None:
        """Append the text of the first `count` pending tokens, which become the context."""
        if not count:
            return
        settled = self._pending[:count]
        before = self._decoder.decode(self._context)
        text = self._decoder.decode(self._context + settled)
        # Equal to `before`, unless the new tokens complete or break its last character.
        pairs = zip(before, text, strict=False)
        unchanged = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._append(text[unchanged:])
        self._context, self._pending = settled, self._pending[count:]

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
