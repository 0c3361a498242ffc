"""`nemotron-train data prepare`: text → shards with a manifest, in parallel, resumable.

One process reads and writes in the order of the input; workers decode and tokenize. So the shards
do not depend on the number of workers. They do not depend on interruptions either: a journal of
input positions is kept in `OUTPUT.partial`, which is renamed to OUTPUT at the end.
"""

import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.visible import one_line
from nemotron_train.data import encode
from nemotron_train.data.indexed import token_dtype
from nemotron_train.data.inputs import Found, InputFormat, find_inputs
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
from nemotron_train.data.prepare_settings import OnBad, PrepareConfig, check_settings, source_of
from nemotron_train.data.readers import Position, RawBatch, read_dataset, read_files
from nemotron_train.data.rolling import SplitWriter, remove_working_files
from nemotron_train.data.tokenize import (
    LoadedTokenizer,
    copy_tokenizer,
    end_of_document_id,
    load_tokenizer,
    train_tokenizer,
)
from nemotron_train.platform.files import flush_to_disk, write_atomically, writing
from nemotron_train.platform.lock import exclusive

_JOURNAL = "journal.json"
_COMMIT_TOKENS = 1 << 22  # tokens between commits: the work a kill loses, seconds on one worker
_SHOWN_BAD_RECORDS = 5
_NAMED_FILES = 10_000  # without a document; more are only counted
LEFT_OUT = "left_out.txt"


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
    last_file: int = -1  # number of the last input file that gave a document
    without_documents: int = 0  # input files
    without_names: list[str] = field(default_factory=list)
    token_bytes: int = 2

    def bytes_needed(self) -> int:
        """Bytes still to be written, from the share of the input that is read; 0 if unknown."""
        if not self.bytes_read:
            return 0
        return (
            self.tokens
            * self.token_bytes
            * (self.bytes_total - self.bytes_read)
            // (self.bytes_read)
        )


Report = Callable[[Progress], None]


def prepare(config: PrepareConfig, report: Report = lambda progress: None) -> Manifest:
    """Create `config.output` and return its manifest. `report` is called after every batch.

    Returns at once if the output exists and was made from the same input with the same settings.
    Raises ConfigError for wrong settings, unreadable input, a bad record with on_bad=stop, an
    output folder with other content, or an unfinished output with other settings.
    """
    check_settings(config)
    output = Path(config.output)
    found = Found([], [])
    if config.format != InputFormat.dataset:
        found = find_inputs(config.input, config.format)
    source = source_of(config, found.files)
    progress = Progress(bytes_total=sum(entry.size for entry in found.files))
    resumes = "; make room, and the same command continues"
    with (
        writing(output, "output", progress.bytes_needed, resumes),
        exclusive(output, wait=False),
    ):
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
            _Preparation(config, found, source, work, progress).run(report)
        manifest = load_manifest(work)
        remove_working_files(work)
        (work / _JOURNAL).unlink(missing_ok=True)
        os.replace(work, output)
        flush_to_disk(output.parent)
    return manifest


class _Preparation:
    """One run over the input, from the start or from the position in the journal."""

    def __init__(
        self,
        config: PrepareConfig,
        found: Found,
        source: dict[str, Any],
        work: Path,
        progress: Progress,
    ) -> None:
        self._config = config
        self._inputs, self._left_out = found
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
        self._progress = progress
        if journal:
            vars(progress).update(journal["progress"])
        progress.token_bytes = self._dtype.itemsize
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
        try:
            journal = json.loads(path.read_text()) if path.is_file() else None
            is_begun = journal is not None and bool(journal["progress"]["documents"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}: damaged; delete {self._work} and prepare again") from None
        if journal is None or not is_begun:
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
        except BrokenProcessPool:
            raise ConfigError(
                f"workers={config.workers}: one was killed, perhaps because memory ran out; the "
                "same command continues, also with fewer workers"
            ) from None
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
        if len(encoded.lengths):
            self._note_files_without_documents(batch.files[0])
            progress.last_file = batch.files[1] - 1
        self._position = batch.after

    def _note_files_without_documents(self, end: int) -> None:
        """Files between the last one that gave a document and number `end` gave none."""
        for index in range(self._progress.last_file + 1, end):
            self._progress.without_documents += 1
            if len(self._progress.without_names) < _NAMED_FILES:
                self._progress.without_names.append(str(self._inputs[index].path))

    def _write_left_out(self) -> None:
        """Write `left_out.txt`, one line for each file that was not read or gave no document."""
        lines = [f"{path}: {reason}" for path, reason in self._left_out]
        lines += [f"{name}: holds no document" for name in self._progress.without_names]
        if hidden := self._progress.without_documents - len(self._progress.without_names):
            lines.append(f"{hidden} more files hold no document")
        if lines:
            text = "".join(one_line(line) + "\n" for line in lines)
            write_atomically(self._work / LEFT_OUT, text)

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
        if not self._reached_limit():
            self._note_files_without_documents(len(self._inputs))
        self._write_left_out()
        counts = {split: writer.close() for split, writer in self._writers.items()}
        tokenizer = TokenizerEntry(self._tokenizer.sha256, self._tokenizer.vocab_size, self._end_id)
        shards = {split: writer.finished for split, writer in self._writers.items()}
        write_manifest(
            self._work, build_manifest(self._source, self._dtype, tokenizer, shards, counts)
        )
