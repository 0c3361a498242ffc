"""Exports a run's tokenizer in the form that Hugging Face's `AutoTokenizer` reads.

Owns: tokenizer_config.json, the choice of the end-of-document token. Does not own: loading and
copying (`data.tokenize`).
"""

from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.chat.render import missing_tokens
from nemotron_train.data.chat.template import CHAT_TEMPLATE
from nemotron_train.data.manifest import FILE_NAME as DATA_MANIFEST
from nemotron_train.data.manifest import load_manifest
from nemotron_train.data.tokenize import (
    END_OF_DOCUMENT,
    FILE_NAME,
    GENERATION,
    LoadedTokenizer,
    end_token_ids,
    load_tokenizer,
    read_json_object,
    tokenizer_contents,
)
from nemotron_train.run_folder.folder import read_json

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


class TokenizerFiles:
    """The tokenizer in `folder`. Its tokenizer.json must have the digest `sha256` ("": any) and at
    most `vocab_size` tokens.

    Raises ConfigError if it is missing, does not match, or has no end-of-document token."""

    def __init__(self, folder: Path, sha256: str, vocab_size: int) -> None:
        if not (folder / FILE_NAME).is_file():
            raise ConfigError(
                f"{folder / FILE_NAME}: the run's tokenizer is not there; give --tokenizer FOLDER"
            )
        loaded = load_tokenizer(folder)
        if sha256 and loaded.sha256 != sha256:
            raise ConfigError(
                f"{folder / FILE_NAME} is not the tokenizer that the checkpoint was trained with "
                f"(SHA-256 {loaded.sha256[:16]}, not {sha256[:16]}); give --tokenizer FOLDER"
            )
        if loaded.vocab_size > vocab_size:
            raise ConfigError(
                f"{folder / FILE_NAME} has {loaded.vocab_size} tokens and model.vocab_size is "
                f"{vocab_size}; give --tokenizer FOLDER"
            )
        self._folder, self._loaded = folder, loaded
        self._settings = read_json(folder / SETTINGS)
        self.end_of_document_id = self._end_of_document(loaded)

    @property
    def generation(self) -> dict[str, Any]:
        """generation_config.json of an imported run: its token ids and settings; {} for ours."""
        return read_json_object(self._folder / GENERATION)

    def contents(self) -> dict[str, bytes]:
        """File name -> content of the tokenizer's files with the settings that `AutoTokenizer`
        needs, but without any code (`auto_map`); the chat template, if the tokenizer has the
        tokens for it and none of its own. Raises ConfigError if one cannot be read."""
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # decoding must return exactly the encoded text
            "eos_token": self._token,
            "pad_token": self._token,
        }
        settings |= {name: value for name, value in self._settings.items() if name != "auto_map"}
        contents = tokenizer_contents(self._folder)
        has_template = TEMPLATE in contents or "chat_template" in settings
        if not has_template and not missing_tokens(self._loaded):
            contents[TEMPLATE] = CHAT_TEMPLATE.encode()
        return contents | {SETTINGS: (json_text(settings, indent=2) + "\n").encode()}

    def _end_of_document(self, loaded: LoadedTokenizer) -> int:
        """Id of the end-of-document token: from the prepared data next to the tokenizer, from its
        own settings, or our default."""
        parent = self._folder.parent
        if (parent / DATA_MANIFEST).is_file() and not (parent / "config.yaml").is_file():
            entry = load_manifest(parent).tokenizer
            if entry.sha256 == loaded.sha256:
                self._token = loaded.tokenizer.id_to_token(entry.end_of_document_id)
                return entry.end_of_document_id
        setting = self._settings.get("eos_token")
        token = setting.get("content") if isinstance(setting, dict) else setting
        self._token = token if isinstance(token, str) else END_OF_DOCUMENT
        if (self._folder / GENERATION).is_file() and (ends := end_token_ids(loaded, self._folder)):
            self._token = loaded.tokenizer.id_to_token(ends[0])
            return ends[0]
        token_id = loaded.tokenizer.token_to_id(self._token)
        if token_id is None:
            raise ConfigError(
                f"{self._folder / SETTINGS}: eos_token={self._token!r} is not in {FILE_NAME}; name "
                "the token that ends a document there"
            )
        return token_id
