"""Raw batches to documents to token ids: the part of `data prepare` that runs in the workers."""

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_train.data.readers import InputFormat, RawBatch, TextDocuments, Undecodable
from nemotron_train.data.tokenize import LoadedTokenizer, load_tokenizer


@dataclass(frozen=True)
class BadRecord:
    """A record without a usable text."""

    where: str  # file:line
    why: str


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of a raw batch, in order, each followed by the end-of-document id.

    ids: [tokens], all documents concatenated. lengths: int64 [documents], in tokens. held_out:
    bool [documents], True for validation. bad: the records without a usable text. num_empty:
    number of empty texts, which are left out.
    """

    ids: np.ndarray
    lengths: np.ndarray
    held_out: np.ndarray
    bad: tuple[BadRecord, ...]
    num_empty: int


def documents(
    batch: RawBatch, text_field: str, text_documents: TextDocuments
) -> Iterator[str | BadRecord]:
    """The text of each record of a batch, possibly empty, or a BadRecord with the reason."""
    for number, record in _records(batch, text_documents):
        try:
            text = _text(batch.format, record, text_field)
            text.encode()  # fails on an unpaired surrogate, which JSON can contain
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            yield BadRecord(f"{batch.name}:{number}" if number else batch.name, reason)
        else:
            yield text


def _records(batch: RawBatch, text_documents: TextDocuments) -> Iterator[tuple[int, Any]]:
    """(line or row number, or 0 for a whole file; record) pairs."""
    by_line = text_documents == TextDocuments.line
    whole_file = batch.format == InputFormat.text and not by_line
    if isinstance(batch.payload, list):
        yield from enumerate(batch.payload, batch.first_line)
    elif whole_file:
        yield 0, batch.payload
    else:
        # Only a newline ends a line; str.splitlines would also split at U+2028 within JSON.
        lines = batch.payload.removesuffix(b"\n").split(b"\n")
        yield from enumerate(lines, batch.first_line)


def _text(record_format: InputFormat, record: Any, text_field: str) -> str:
    """The text of one record. Raises ValueError, KeyError or TypeError with the reason."""
    if record_format == InputFormat.text:
        text = _utf8(record)
    elif record_format == InputFormat.jsonl:
        line = _utf8(record)
        if not line.strip():
            return ""
        value = json.loads(line)
        if not isinstance(value, dict):
            raise TypeError("not a JSON object")
        if text_field not in value:
            raise TypeError(f"no field {text_field!r}")
        text = value[text_field]
    elif isinstance(record, Undecodable):
        raise ValueError(record.reason)
    else:
        text = record
    if not isinstance(text, str):
        raise TypeError(f"{text_field!r} is {type(text).__name__}, not text")
    return text


def _utf8(record: bytes) -> str:
    try:
        return record.decode("utf-8-sig").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a hash of its content decides.

    Equal documents thus go to the same split, for any order, shard or worker.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


@dataclass
class Encoder:
    """Turns a raw batch into an EncodedBatch."""

    tokenizer: LoadedTokenizer
    end_of_document_id: int
    dtype: np.dtype
    text_field: str
    text_documents: TextDocuments
    validation_fraction: float

    def encode(self, batch: RawBatch) -> EncodedBatch:
        """Decode and tokenize all records of a batch. Bad records are listed, not raised."""
        pieces, held_out, bad = [], [], []
        num_empty = 0
        for text in documents(batch, self.text_field, self.text_documents):
            if isinstance(text, BadRecord):
                bad.append(text)
            elif not text:
                num_empty += 1
            else:
                ids = self.tokenizer.encode(text)
                pieces.append(np.append(ids, self.end_of_document_id).astype(self.dtype))
                held_out.append(is_held_out(text, self.validation_fraction))
        return EncodedBatch(
            ids=np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype),
            lengths=np.array([piece.size for piece in pieces], dtype=np.int64),
            held_out=np.array(held_out, dtype=bool),
            bad=tuple(bad),
            num_empty=num_empty,
        )


# One per worker process: a tokenizer is too large to send with every batch.
_encoder: Encoder | None = None


def start_worker(folder: str, *settings: Any) -> None:
    """Pool initializer: `settings` are Encoder's fields after the tokenizer."""
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(Path(folder)), *settings)


def _end_with_parent() -> None:
    # Workers hold both ends of the queue, so a killed parent does not close it. Without this thread
    # they would wait forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_in_worker(batch: RawBatch) -> EncodedBatch:
    """Encode a batch. Runs in a worker that `start_worker` initialized."""
    assert _encoder is not None
    return _encoder.encode(batch)
