"""The knobs of `data prepare`, their checks, and what the output depends on."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.inputs import InputFile, InputFormat
from nemotron_train.data.readers import TextDocuments
from nemotron_train.data.tokenize import END_OF_DOCUMENT, load_tokenizer


class OnBad(StrEnum):
    """What to do at a bad record."""

    stop = "stop"
    skip = "skip"


@dataclass
class PrepareConfig:
    """The knobs of `data prepare`. Exactly one of `tokenizer` and `train_tokenizer_vocab_size` must
    be given."""

    input: str = MISSING  # file, folder, glob pattern, or with format=dataset a name or folder
    output: str = MISSING  # folder to create
    format: InputFormat = InputFormat.by_name
    text_field: str = "text"  # JSONL field, or Parquet or data set column
    text_documents: TextDocuments = TextDocuments.file  # what one document is, in text files
    dataset_config: str = ""
    dataset_split: str = "train"
    tokenizer: str = ""  # folder that holds tokenizer.json
    train_tokenizer_vocab_size: int = 0  # 0: use `tokenizer`
    train_tokenizer_bytes: int = 256 * 1024 * 1024  # bytes of training text, from the input's start
    end_of_document_token: str = END_OF_DOCUMENT
    validation_fraction: float = 0.01  # of the documents, chosen by a hash of their content
    shard_tokens: int = 100_000_000
    max_documents: int = 0  # 0: all
    workers: int = 2  # processes that tokenize; 1: tokenize in this process
    on_bad: OnBad = OnBad.stop  # at a record that is not UTF-8, not JSON or has no text


def check_settings(config: PrepareConfig) -> None:
    """Raises ConfigError, naming the knob, for a value out of range, and for an output that could
    not be made when all the work is done."""
    if bool(config.tokenizer) == bool(config.train_tokenizer_vocab_size):
        raise ConfigError(
            f"tokenizer={config.tokenizer!r} and train_tokenizer_vocab_size="
            f"{config.train_tokenizer_vocab_size}: give exactly one of the two"
        )
    if config.train_tokenizer_vocab_size and config.end_of_document_token != END_OF_DOCUMENT:
        raise ConfigError(
            f"end_of_document_token={config.end_of_document_token!r}: a trained tokenizer ends "
            f"documents with {END_OF_DOCUMENT!r}"
        )
    if not 0 <= config.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={config.validation_fraction}: must be at least 0 and below 1"
        )
    for knob in ("workers", "shard_tokens", "train_tokenizer_bytes"):
        if getattr(config, knob) < 1:
            raise ConfigError(f"{knob}={getattr(config, knob)}: must be at least 1")
    for knob in ("max_documents", "train_tokenizer_vocab_size"):
        if getattr(config, knob) < 0:
            raise ConfigError(f"{knob}={getattr(config, knob)}: must be 0 or more")
    try:
        _check_output(config)
    except OSError as error:
        raise ConfigError(f"output={config.output}: cannot be made ({error.strerror})") from None


def _check_output(config: PrepareConfig) -> None:
    """At the end a finished folder gets the name `output`, which is possible for a new name and for
    an empty folder. `exclusive` finds a parent folder that cannot be written."""
    output, knob = Path(config.output), f"output={config.output}"
    if output.name in ("", ".."):
        raise ConfigError(f"{knob}: is no name of a new folder")
    if output.is_symlink() and not output.exists():
        raise ConfigError(f"{knob}: a link to {os.readlink(output)}, where nothing is")
    is_empty = output.is_dir() and not any(output.iterdir())
    if is_empty and (output.is_symlink() or output.is_mount()):
        kind = "a link to an empty folder" if output.is_symlink() else "a mount point"
        raise ConfigError(f"{knob}: {kind}, which cannot be replaced; give a folder below it")
    source = Path(config.input)
    is_local = config.format != InputFormat.dataset and source.is_dir()
    can_be_made = next(path for path in output.resolve().parents if path.exists()).is_dir()
    if is_local and can_be_made and output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{knob}: lies in input={config.input} and would be read as input")


def source_of(config: PrepareConfig, inputs: list[InputFile]) -> dict[str, Any]:
    """Everything the output depends on. `workers` and `on_bad` are not included: they may change
    when an unfinished preparation continues."""
    settings = {
        name: str(value) if isinstance(value, StrEnum) else value
        for name, value in asdict(config).items()
        if name not in ("output", "workers", "on_bad")
    }
    if config.tokenizer:
        settings["tokenizer_sha256"] = load_tokenizer(Path(config.tokenizer)).sha256
    listing = json_text([(str(entry.path), entry.size, entry.modified) for entry in inputs])
    settings["input_files"] = len(inputs)
    settings["input_fingerprint"] = hashlib.sha256(listing.encode()).hexdigest()
    # As it is read back: a name that is not UTF-8 is stored in a form of its own.
    return json.loads(json_text({"kind": "prepared", **settings}))
