"""Text to ids and back as lm-eval's own Hugging Face model does it.

Owns: special tokens in prompts, the token before a text. Does not own: the tokenizer and encoding
for training (`data.tokenize`), how a context and an answer are encoded together (lm-eval).

Training encodes a control token that is written in a text by its characters, and adds none. The
harness works the other way, because that is what published numbers are measured with: the control
token itself is used, and the tokenizer's post-processor may add a beginning-of-text token.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.tokenize import LoadedTokenizer, read_json_object

SETTINGS = "tokenizer_config.json"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTED = ("additional_special_tokens", "extra_special_tokens")


class HarnessTokens:
    """A run's tokenizer with the settings beside it in `folder`, as transformers' `AutoTokenizer`
    reads them after `convert to-hf`.

    end_token: the end-of-document id, used if the settings name no `eos_token`. prefix_id: what
    stands before a text without context, the `bos_token` or else the end. Raises ConfigError if
    there is neither an end nor a `bos_token`, or if the `bos_token` is not in the vocabulary.
    """

    def __init__(self, loaded: LoadedTokenizer, folder: Path, end_token: int | None) -> None:
        settings = _settings(folder)
        self._tokenizer = copy.deepcopy(loaded.tokenizer)  # that of training stays as it is
        known = [
            text for text in _special(settings) if loaded.tokenizer.token_to_id(text) is not None
        ]
        self._tokenizer.add_special_tokens(known)
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        self.begin_text = _content(settings.get("bos_token"))
        begin = loaded.tokenizer.token_to_id(self.begin_text) if self.begin_text else None
        if self.begin_text and begin is None:
            raise ConfigError(
                f"{folder / SETTINGS}: bos_token={self.begin_text!r} is not in tokenizer.json"
            )
        end = loaded.tokenizer.token_to_id(_content(settings.get("eos_token")))
        end = end_token if end is None else end
        if end is None:
            raise ConfigError(
                "evaluate harness: the tokenizer has no end-of-document token to begin a text with"
            )
        self.end_id: int = end
        self.prefix_id: int = end if begin is None else begin
        self.end_text = self.decode([self.end_id], skip_special_tokens=False)
        self._prefix_text = self.decode([self.prefix_id], skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text that is scored. None: add what the tokenizer adds, unless the text
        begins with the prefix token. Raises ConfigError for a text that is not Unicode."""
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(self._prefix_text)
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):  # half of a surrogate pair, from JSON's \ud83d
            raise ConfigError(
                f"evaluate harness: a task's text is not valid Unicode: {text[:60]!a}"
            ) from None

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that is continued; at least the prefix token."""
        begins = bool(self.begin_text) and text.startswith(self.begin_text)
        return self.encode(text, add_special_tokens=not begins) or [self.prefix_id]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json of older folders counts over it."""
    settings = read_json_object(folder / SETTINGS)
    if "added_tokens_decoder" not in settings:
        settings |= read_json_object(folder / "special_tokens_map.json")
    return settings


def _special(settings: dict[str, Any]) -> list[str]:
    """Every token that the settings make a special one."""
    named = [settings.get(f"{name}_token") for name in _NAMED]
    for name in _LISTED:
        listed = settings.get(name) or []
        named += listed.values() if isinstance(listed, dict) else listed
    added = settings.get("added_tokens_decoder") or {}
    named += [token for token in added.values() if token.get("special")]
    return list(dict.fromkeys(filter(None, map(_content, named))))


def _content(token: Any) -> str:
    """The text of a token that is written as a string or as an object; "" for none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
