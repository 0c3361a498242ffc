"""How many UTF-8 bytes of text each token stands for.

Owns: the count by id, which does not depend on where rows cut a text. Does not own: the tokenizer.
"""

import json
import re
from collections.abc import Iterable

from nemotron_train.data.tokenize import LoadedTokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenBytes:
    """Counts the UTF-8 bytes of tokens' text within a text, so with the space before a word.

    Control tokens such as the end of a document are no text: 0 bytes. The bytes of a character that
    several tokens share are counted with the token that holds them.
    """

    def __init__(self, loaded: LoadedTokenizer) -> None:
        self._loaded = loaded
        self._counts: dict[int, int] = {}
        steps = _decoder_types(json.loads(loaded.tokenizer.to_str())["decoder"])
        self._is_byte_level = "ByteLevel" in steps
        self._has_byte_pieces = "ByteFallback" in steps
        self._added = loaded.tokenizer.get_added_tokens_decoder()

    def of(self, ids: Iterable[int]) -> int:
        """Bytes of these tokens' text."""
        total = 0
        for token_id in ids:
            if token_id not in self._counts:
                self._counts[token_id] = self._count(token_id)
            total += self._counts[token_id]
        return total

    def _count(self, token_id: int) -> int:
        if token_id in self._loaded.control_tokens:
            return 0
        piece = self._loaded.tokenizer.id_to_token(token_id) or ""
        if token_id in self._added:
            return len(piece.encode())
        if self._is_byte_level:
            return len(piece)  # each character of a piece stands for one byte
        if self._has_byte_pieces and _BYTE_PIECE.fullmatch(piece):
            return 1
        # Decoders treat the first token of a text differently, so count the second of two.
        once, twice = (self._loaded.decode([token_id] * number) for number in (1, 2))
        return len(twice.encode()) - len(once.encode())


def _decoder_types(decoder: dict | None) -> set[str]:
    """Types of a decoder of tokenizer.json and of its steps."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_types, decoder.get("decoders", [])))
