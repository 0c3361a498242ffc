"""Tokenizers: load one from a folder, train a byte-level BPE, encode without added tokens.

Only the `tokenizers` library is used, and only in this file. Any tokenizer with a `tokenizer.json`
works, including those of Hugging Face.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.platform.files import file_sha256

END_OF_DOCUMENT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
GENERATION = "generation_config.json"
# Files beside tokenizer.json that Hugging Face reads too.
_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION,
)
# Reserved for post-training in every tokenizer that is trained here: the names of Nemotron 3's chat
# format. No text is ever encoded as one of them.
CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
_SMALLEST_VOCABULARY = 256 + 1 + len(CHAT_TOKENS)  # bytes, end of document, chat


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, the SHA-256 of its file, and `vocab_size`: its largest id plus one."""

    tokenizer: Tokenizer
    sha256: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int64 [tokens]. No special tokens are added, and none comes out of the
        text: where one is written in it, its characters are encoded."""
        ids = self._encode(text)
        if not self.control_tokens.keys().isdisjoint(ids):
            ids = self._encode_apart(text)
        return np.array(ids, dtype=np.int64)

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The ids of a text in which the special tokens written in it are read as such. Never for
        a text that somebody else wrote."""
        self.tokenizer.encode_special_tokens = False
        try:
            return self._encode(text)
        finally:
            self.tokenizer.encode_special_tokens = True

    @cached_property
    def control_tokens(self) -> Mapping[int, str]:
        """Special tokens by id, but for the one that stands for unknown text."""
        model = json.loads(self.tokenizer.to_str())["model"]
        unknown = model.get("unk_token")
        if unknown is None and model.get("unk_id") is not None:  # Unigram names it by its number
            unknown = model["vocab"][model["unk_id"]][0]
        return {
            token_id: added.content
            for token_id, added in self.tokenizer.get_added_tokens_decoder().items()
            if added.special and added.content != unknown
        }

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """Every id that stands for a token; ids in between may stand for none."""
        return frozenset(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_apart(self, text: str) -> list[int]:
        """`_encode` of the parts between cuts through every control token written in the text.

        Byte-level BPE never needs this. Unigram and WordLevel models hold control tokens among
        their own pieces, so the characters of the token would match them.
        """
        contents = sorted(self.control_tokens.values(), key=len, reverse=True)
        written = re.compile("|".join(map(re.escape, contents)))
        ids: list[int] = []
        start = 0
        for match in written.finditer(text):
            cut = match.start() + max(1, len(match[0]) // 2)
            ids += self._encode(text[start:cut])
            start = cut
        ids += self._encode(text[start:])
        for token_id in self.control_tokens.keys() & set(ids):
            raise ConfigError(
                f"a text holds {self.control_tokens[token_id]!r}, which this tokenizer can only "
                "encode as its control token; remove it from the text or train another tokenizer"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, including special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Read `folder/tokenizer.json`. Raises ConfigError, naming the file, if it is missing or
    invalid."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: missing; a tokenizer is a folder that holds {FILE_NAME}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{path}: not a tokenizer ({error})") from None
    # The text '<|endoftext|>' within a document must not become the end-of-document token.
    tokenizer.encode_special_tokens = True
    # The file may enable either; both would change documents silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return LoadedTokenizer(tokenizer, file_sha256(path), vocab_size)


def end_of_document_id(loaded: LoadedTokenizer, token: str, folder: Path) -> int:
    """The id of the end-of-document token. Raises ConfigError, which lists the tokenizer's special
    tokens, if there is none."""
    token_id = loaded.tokenizer.token_to_id(token)
    if token_id is None:
        special = sorted(
            added.content
            for added in loaded.tokenizer.get_added_tokens_decoder().values()
            if added.special
        )
        raise ConfigError(
            f"end_of_document_token={token!r}: not in {folder / FILE_NAME}; its special tokens: "
            f"{', '.join(special[:20]) or 'none'}"
        )
    return token_id


def end_token_ids(loaded: LoadedTokenizer, folder: Path) -> tuple[int, ...]:
    """The ids that end a text, the end-of-document token first: those that generation_config.json
    lists, else the eos_token of tokenizer_config.json, else our own default; () if there is none.

    Raises ConfigError, naming the file, for an id or a token that the tokenizer does not have.
    """
    listed = read_json_object(folder / GENERATION).get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    for token_id in ids:
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not (is_id and 0 <= token_id < loaded.vocab_size):
            raise ConfigError(
                f"{folder / GENERATION}: eos_token_id={token_id!r} is no id of {FILE_NAME}"
            )
    if ids:
        return tuple(dict.fromkeys(ids))
    token = read_json_object(folder / "tokenizer_config.json").get("eos_token", END_OF_DOCUMENT)
    token = token.get("content") if isinstance(token, dict) else token
    token_id = loaded.tokenizer.token_to_id(token) if isinstance(token, str) else None
    return () if token_id is None else (token_id,)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a side file; {} if there is no file. Raises ConfigError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is no JSON object")
    return content


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> LoadedTokenizer:
    """Train a byte-level BPE on `texts` and write `folder/tokenizer.json`. Deterministic.

    Id 0 ends a document; CHAT_TOKENS follow. The vocabulary is smaller than `vocab_size` if the
    texts have too few pairs. Raises ConfigError if `vocab_size` is below 265.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocabulary of {vocab_size}: a byte-level BPE needs at least {_SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT, *CHAT_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer.save(str(folder / FILE_NAME))
    except Exception as error:  # the library raises plain Exception
        raise OSError(0, str(error), str(folder / FILE_NAME)) from None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT}
    (folder / "tokenizer_config.json").write_text(json_text(config, indent=2) + "\n")
    return load_tokenizer(folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer from `source` into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_contents(source).items():
        (target / name).write_bytes(content)


def tokenizer_contents(folder: Path) -> dict[str, bytes]:
    """File name -> content of tokenizer.json and of the files beside it that Hugging Face reads.
    Raises ConfigError if one cannot be read."""
    contents = {}
    for name in (FILE_NAME, *_SIDE_FILES):
        try:
            contents[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder / name}: cannot be read ({error.strerror})") from None
    return contents
