"""`nemotron-train data prepare`: text → shards with a manifest, in parallel, resumable.

One process reads and writes in the order of the input; workers decode and tokenize. So the shards
do not depend on the number of workers. They do not depend on interruptions either: a journal of
input positions is kept in `OUTPUT.partial`, which is renamed to OUTPUT at the end.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data import encode
from nemotron_train.data.indexed import token_dtype
from nemotron_train.data.manifest import (
    FILE_NAME,
    SPLITS,
    Manifest,
    TokenizerEntry,
    build_manifest,
    load_manifest,
    write_json,
    write_manifest,
)
from nemotron_train.data.readers import (
    InputFile,
    InputFormat,
    Position,
    RawBatch,
    TextDocuments,
    list_inputs,
    read_dataset,
    read_files,
)
from nemotron_train.data.rolling import SplitWriter, remove_working_files
from nemotron_train.data.tokenize import (
    END_OF_DOCUMENT,
    LoadedTokenizer,
    copy_tokenizer,
    end_of_document_id,
    load_tokenizer,
    train_tokenizer,
)
from nemotron_train.platform.files import flush_to_disk
from nemotron_train.platform.lock import exclusive

_JOURNAL = "journal.json"
_COMMIT_TOKENS = 1 << 22  # tokens between commits: the work a kill loses, seconds on one worker
_SHOWN_BAD_RECORDS = 5


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


@dataclass
class Progress:
    """Progress of a preparation. The journal stores it too. `empty` and `bad` count records without
    text and bad records, which are left out."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    bad_examples: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_total: int = 0  # 0: unknown


Report = Callable[[Progress], None]


def prepare(config: PrepareConfig, report: Report = lambda progress: None) -> Manifest:
    """Create `config.output` and return its manifest. `report` is called after every batch.

    Returns at once if the output exists and was made from the same input with the same settings.
    Raises ConfigError for wrong settings, unreadable input, a bad record with on_bad=stop, an
    output folder with other content, or an unfinished output with other settings.
    """
    _check(config)
    output = Path(config.output)
    inputs = (
        [] if config.format == InputFormat.dataset else list_inputs(config.input, config.format)
    )
    source = _source(config, inputs)
    with exclusive(output, wait=False):
        if (output / FILE_NAME).is_file():
            manifest = load_manifest(output)
            if dict(manifest.source) != source:
                raise ConfigError(
                    f"output={output}: holds data of another input or of other settings; choose "
                    "another folder or delete it"
                )
            return manifest
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ConfigError(f"output={output}: exists and is no prepared data; choose another")
        work = output.with_name(output.name + ".partial")
        # The manifest already exists if an earlier process was killed in the lines after this `if`.
        if not (work / FILE_NAME).is_file():
            _Preparation(config, inputs, source, work).run(report)
        manifest = load_manifest(work)
        remove_working_files(work)
        (work / _JOURNAL).unlink(missing_ok=True)
        os.replace(work, output)
        flush_to_disk(output.parent)
    return manifest


def _check(config: PrepareConfig) -> None:
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


def _source(config: PrepareConfig, inputs: list[InputFile]) -> dict[str, Any]:
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


class _Preparation:
    """One run over the input, from the start or from the position in the journal."""

    def __init__(
        self, config: PrepareConfig, inputs: list[InputFile], source: dict[str, Any], work: Path
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._source = source
        self._work = work
        journal = self._open_journal()
        self._tokenizer = self._make_tokenizer(journal is not None)
        tokenizer_folder = work / "tokenizer"
        self._end_id = end_of_document_id(
            self._tokenizer, config.end_of_document_token, tokenizer_folder
        )
        self._dtype = token_dtype(self._tokenizer.vocab_size)
        self._position = Position(**journal["position"]) if journal else Position()
        self._progress = Progress(**journal["progress"]) if journal else Progress()
        self._progress.bytes_total = sum(entry.size for entry in inputs)
        self._writers = {
            split: SplitWriter(
                work,
                split,
                self._dtype,
                vocab_size=self._tokenizer.vocab_size,
                shard_tokens=config.shard_tokens,
                state=journal["splits"][split] if journal else None,
            )
            for split in SPLITS
        }

    def _open_journal(self) -> dict[str, Any] | None:
        """The journal of an earlier attempt; None, with the work folder emptied, if there is none.

        Raises ConfigError if the earlier attempt had other settings.
        """
        path = self._work / _JOURNAL
        journal = json.loads(path.read_text()) if path.is_file() else None
        if journal is None or not journal["progress"]["documents"]:  # nothing to continue
            if self._work.exists():
                shutil.rmtree(self._work)
            self._work.mkdir(parents=True)
            return None
        if journal["source"] != self._source:
            changed = [
                name for name in self._source if journal["source"].get(name) != self._source[name]
            ]
            raise ConfigError(
                f"output={self._config.output}: {self._work} is an unfinished preparation with "
                f"other settings ({', '.join(changed)}); repeat those, or delete that folder"
            )
        return journal

    def _make_tokenizer(self, exists: bool) -> LoadedTokenizer:
        folder, config = self._work / "tokenizer", self._config
        if exists:
            return load_tokenizer(folder)
        if config.tokenizer:
            copy_tokenizer(Path(config.tokenizer), folder)
            return load_tokenizer(folder)
        return train_tokenizer(self._tokenizer_texts(), config.train_tokenizer_vocab_size, folder)

    def _tokenizer_texts(self) -> Iterator[str]:
        """Documents of the train split from the start of the input, up to train_tokenizer_bytes."""
        bytes_left, config = self._config.train_tokenizer_bytes, self._config
        for batch in self._batches(Position()):
            for text in encode.documents(batch, config.text_field, config.text_documents):
                if isinstance(text, str) and not encode.is_held_out(
                    text, config.validation_fraction
                ):
                    yield text
                    bytes_left -= len(text.encode())
                    if bytes_left <= 0:
                        return

    def _batches(self, start: Position) -> Iterator[RawBatch]:
        config = self._config
        if config.format == InputFormat.dataset:
            return read_dataset(
                config.input, config.dataset_config, config.dataset_split, config.text_field, start
            )
        return read_files(self._inputs, start, config.text_field, config.text_documents)

    def run(self, report: Report) -> None:
        """Read, encode and write the remaining input. The work folder then holds finished data."""
        try:
            self._commit()
            committed = self._progress.tokens
            for batch, encoded in self._encoded():
                shards_before = self._num_shards()
                self._write(batch, encoded)
                report(self._progress)
                due = self._progress.tokens - committed >= _COMMIT_TOKENS
                if due or self._num_shards() > shards_before or self._reached_limit():
                    self._commit()
                    committed = self._progress.tokens
                if self._reached_limit():
                    break
            self._finish()
        except BaseException:
            # Close the files now: a buffer that the garbage collector flushes later would corrupt
            # the files of a continuation.
            for writer in self._writers.values():
                writer.abandon()
            raise

    def _num_shards(self) -> int:
        return sum(len(writer.finished) for writer in self._writers.values())

    def _reached_limit(self) -> bool:
        limit = self._config.max_documents
        return bool(limit) and self._progress.documents >= limit

    def _encoded(self) -> Iterator[tuple[RawBatch, encode.EncodedBatch]]:
        """Raw and encoded batches, in input order. At most 2 * workers + 1 are in flight."""
        config = self._config
        settings = (
            self._end_id,
            self._dtype,
            config.text_field,
            config.text_documents,
            config.validation_fraction,
        )
        batches = self._batches(self._position)
        if self._reached_limit():
            return
        if config.workers == 1:
            encoder = encode.Encoder(self._tokenizer, *settings)
            for batch in batches:
                yield batch, encoder.encode(batch)
            return
        # spawn: a fork could copy a locked lock of the tokenizer library's threads.
        pool = ProcessPoolExecutor(
            config.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=encode.start_worker,
            initargs=(str(self._work / "tokenizer"), *settings),
        )
        in_flight: deque[tuple[RawBatch, Future[encode.EncodedBatch]]] = deque()
        try:
            for batch in batches:
                in_flight.append((batch, pool.submit(encode.encode_in_worker, batch)))
                if len(in_flight) > 2 * config.workers:
                    first, future = in_flight.popleft()
                    yield first, future.result()
            while in_flight:
                first, future = in_flight.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _write(self, batch: RawBatch, encoded: encode.EncodedBatch) -> None:
        progress = self._progress
        if encoded.bad:
            first = encoded.bad[0]
            if self._config.on_bad == OnBad.stop:
                raise ConfigError(
                    f"{first.where}: {first.why}; on_bad=skip leaves such records out, and the "
                    "same command then continues"
                )
            examples = [f"{record.where}: {record.why}" for record in encoded.bad]
            progress.bad_examples = (progress.bad_examples + examples)[:_SHOWN_BAD_RECORDS]
            progress.bad += len(encoded.bad)
        progress.empty += encoded.num_empty
        progress.bytes_read = batch.bytes_read
        pieces = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]) if encoded.ids.size else []
        for piece, held_out in zip(pieces, encoded.held_out, strict=True):
            if self._reached_limit():
                break
            self._writers["validation" if held_out else "train"].add(piece)
            progress.documents += 1
            progress.tokens += piece.size
        self._position = batch.after

    def _commit(self) -> None:
        """Make the position, and everything written up to it, durable together."""
        journal = {
            "source": self._source,
            "position": asdict(self._position),
            "progress": asdict(self._progress),
            "splits": {split: writer.state() for split, writer in self._writers.items()},
        }
        write_json(self._work / _JOURNAL, journal)
        for writer in self._writers.values():
            writer.on_state_saved()

    def _finish(self) -> None:
        if not self._progress.documents:
            raise ConfigError(f"input={self._config.input}: holds no document with text in it")
        counts = {split: writer.close() for split, writer in self._writers.items()}
        tokenizer = TokenizerEntry(self._tokenizer.sha256, self._tokenizer.vocab_size, self._end_id)
        shards = {split: writer.finished for split, writer in self._writers.items()}
        write_manifest(
            self._work, build_manifest(self._source, self._dtype, tokenizer, shards, counts)
        )
