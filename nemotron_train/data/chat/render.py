"""Conversations as token ids, with a mask of the tokens that are trained.

The format has the special tokens of Nemotron 3 (`CHAT_TOKENS`):

    <|im_start|>system\\n…<|im_end|>\\n
    <|im_start|>user\\n…<|im_end|>\\n
    <|im_start|>assistant\\n<think>\\n…\\n</think>\\n…<tool_call>{…}</tool_call><|im_end|>\\n
    <|im_start|>user\\n<tool_response>…</tool_response><|im_end|>\\n

Without reasoning an answer begins with `<think></think>`. A prompt ends with `<think>`, or with
`<think></think>` for an answer without reasoning, so what is generated follows a special token.

Three properties follow from encoding only the text between two special tokens at once:

- Text never becomes a special token, whatever it says.
- The ids of a conversation begin with the ids of the same conversation without its last message.
  What a model generated after a prompt can be appended to it as it is.
- A trained token never shares a piece of text with one that is not.

Trained are the tokens that a model generates: from after `<think>` (or `<think></think>`) to
`<|im_end|>` of an assistant's message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.chat.messages import Message, call_text
from nemotron_train.data.tokenize import CHAT_TOKENS, LoadedTokenizer

START, END, THINK, THINK_END, CALL, CALL_END, RESPONSE, RESPONSE_END = CHAT_TOKENS
TOOLS_HEADER = "You may call these tools:"


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids: int64 [tokens], and whether each is trained: bool [tokens]."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """A special token, or a text between two of them."""

    text: str
    is_special: bool
    trained: bool
    limit: int = 0  # tokens that are kept of a text; 0: all


class ChatFormat:
    """Renders conversations with one tokenizer.

    Raises ConfigError, naming the tokens and the way to add them, if the tokenizer lacks special
    tokens, and if its ids for a text depend on the special token before it.
    """

    def __init__(self, tokenizer: LoadedTokenizer, name: str = "the tokenizer") -> None:
        self.tokenizer = tokenizer
        missing = missing_tokens(tokenizer)
        if missing:
            raise ConfigError(
                f"{name}: has no {' '.join(missing)}; `nemotron-train convert add-chat-tokens` "
                "makes a run whose tokenizer and model have them"
            )
        ids = {token: token_id for token_id, token in tokenizer.control_tokens.items()}
        self.special_ids = {token: ids[token] for token in CHAT_TOKENS}
        _check_context(tokenizer, name)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        thinking_limits: Sequence[int] = (),
    ) -> Rendered:
        """The whole conversation. tools: JSON descriptions of the tools that may be called.
        thinking_limits: for each message the tokens after which its reasoning is cut, as a budget
        does; 0: it is whole. Without them all are whole."""
        return self._encode(_pieces(messages, tools, thinking_limits))

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), thinking: bool = True
    ) -> list[int]:
        """The conversation so far, and the beginning of the assistant's next message."""
        pieces = [*_pieces(messages, tools), *_opening(thinking)]
        return self._encode(pieces).ids.tolist()

    def following(self, messages: Sequence[Message], thinking: bool = True) -> list[int]:
        """What follows after an assistant's message that ended with <|im_end|>: its line break, the
        next messages, and the beginning of the assistant's next message. With it a conversation
        goes on from the ids that a model generated, which are never encoded again."""
        pieces = [_text("\n"), *_pieces(messages, ()), *_opening(thinking)]
        return self._encode(pieces).ids.tolist()

    def thinking_tokens(self, message: Message) -> int:
        """The number of tokens of the message's reasoning, with the line breaks around it."""
        return self.tokenizer.encode(_thought(message)).size

    def _encode(self, pieces: Sequence[_Piece]) -> Rendered:
        ids: list[int] = []
        trained: list[bool] = []
        text, last = "", _text("")
        for piece in [*pieces, _special(END)]:  # the last one only ends the last text
            if not piece.is_special:
                text += piece.text
                last = piece
                continue
            if text:
                encoded = self.tokenizer.encode(text).tolist()
                encoded = encoded[: last.limit] if last.limit else encoded
                ids += encoded
                trained += [last.trained] * len(encoded)
            text = ""
            ids.append(self.special_ids[piece.text])
            trained.append(piece.trained)
        return Rendered(np.array(ids[:-1], dtype=np.int64), np.array(trained[:-1], dtype=bool))


def missing_tokens(tokenizer: LoadedTokenizer) -> list[str]:
    """The chat tokens that are no special tokens of this tokenizer."""
    control = set(tokenizer.control_tokens.values())
    return [token for token in CHAT_TOKENS if token not in control]


def _text(text: str, trained: bool = False) -> _Piece:
    return _Piece(text, False, trained)


def _special(token: str, trained: bool = False) -> _Piece:
    return _Piece(token, True, trained)


def _pieces(
    messages: Sequence[Message], tools: Sequence[Any], thinking_limits: Sequence[int] = ()
) -> list[_Piece]:
    pieces: list[_Piece] = []
    limits = list(thinking_limits) or [0] * len(messages)
    if tools:
        lines = "\n".join(json_text(tool, ensure_ascii=False) for tool in tools)
        has_system = bool(messages) and messages[0].role == "system"
        system = messages[0].content + "\n\n" if has_system else ""
        messages = [
            Message("system", f"{system}{TOOLS_HEADER}\n{lines}"),
            *messages[1 if has_system else 0 :],
        ]
        limits = limits if has_system else [0, *limits]
    for message, limit in zip(messages, limits, strict=True):
        if message.role == "assistant":
            pieces += _assistant(message, limit)
            continue
        role = "user" if message.role == "tool" else message.role
        pieces += [_special(START), _text(f"{role}\n")]
        if message.role == "tool":
            pieces += [_special(RESPONSE), _text(message.content), _special(RESPONSE_END)]
        else:
            pieces.append(_text(message.content))
        pieces += [_special(END), _text("\n")]
    return pieces


def _thought(message: Message) -> str:
    return f"\n{message.thinking}\n"


def _opening(thinking: bool) -> list[_Piece]:
    pieces = [_special(START), _text("assistant\n"), _special(THINK)]
    return pieces if thinking else [*pieces, _special(THINK_END)]


def _assistant(message: Message, limit: int) -> list[_Piece]:
    trained = message.trained
    pieces = _opening(bool(message.thinking))
    if message.thinking:
        pieces.append(_Piece(_thought(message), False, trained, limit))
        # A budget forces the end of the reasoning; the model did not choose it.
        pieces.append(_special(THINK_END, trained and not limit))
    if message.content:
        pieces.append(_text(f"\n{message.content}", trained))
    for call in message.tool_calls:
        pieces += [_special(CALL, trained), _text(call_text(call), trained)]
        pieces.append(_special(CALL_END, trained))
    return [*pieces, _special(END, trained), _text("\n")]


def _check_context(tokenizer: LoadedTokenizer, name: str) -> None:
    """Raises ConfigError if a text has other ids after a special token than alone. Tokenizers that
    put a space before the first word of a text only do that; other readers of the chat template
    would then give the model other ids than ours."""
    for text in ("user\nHello", '\n{"a": 1}', " b"):
        together = tokenizer.encode_with_special_tokens(START + text)
        apart = [tokenizer.tokenizer.token_to_id(START), *tokenizer.encode(text).tolist()]
        if together != apart:
            raise ConfigError(
                f"{name}: encodes {text!r} differently after {START} than alone, so a conversation "
                "would get other ids here than in transformers; use a byte-level tokenizer"
            )
