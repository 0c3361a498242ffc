"""`data chat`: conversations in JSONL files to a folder of token ids and loss masks.

The folder is prepared data (`manifest.py`) whose splits have a mask each, so blends, fingerprints,
resume and the watch over changed files are those of any data. `PackedSource` reads it.

Two changes of the conversations teach a model to answer without reasoning and under a budget, as in
Nemotron 3 Nano's fine-tuning: a share of those with reasoning loses it, and in a share it is cut
after a random number of tokens. `</think>` is then no training target, because a budget forces it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.chat.messages import Message, message_json
from nemotron_train.data.chat.render import END, ChatFormat, Rendered
from nemotron_train.data.chat.rows import ChatRow, read_rows
from nemotron_train.data.indexed import token_dtype
from nemotron_train.data.manifest import (
    MASK_OF,
    Manifest,
    TokenizerEntry,
    build_manifest,
    load_manifest,
    write_manifest,
)
from nemotron_train.data.permutation import key64
from nemotron_train.data.rolling import SplitWriter, remove_working_files
from nemotron_train.data.tokenize import (
    GENERATION,
    copy_tokenizer,
    end_token_ids,
    load_tokenizer,
    read_json_object,
)
from nemotron_train.platform.files import file_sha256, flush_to_disk, writing
from nemotron_train.platform.lock import exclusive

KIND = "conversations"
_RECIPE = 3  # increase it if the format or the choice of rows changes
_SHARD_TOKENS = 100_000_000
_REPORT_EVERY = 10_000


class TooLong(StrEnum):
    """What to do with a conversation that is longer than a row."""

    refuse = "refuse"
    drop = "drop"


@dataclass
class ChatDataConfig:
    """The knobs of `data chat`."""

    rows: str = MISSING  # a .jsonl or .jsonl.gz file, or a pattern such as 'rows/*.jsonl'
    output: str = MISSING  # folder to create
    tokenizer: str = MISSING  # folder that holds tokenizer.json
    sequence_length: int = 0  # tokens of a row that a conversation must fit in; 0: any length
    too_long: TooLong = TooLong.refuse
    validation_fraction: float = 0.02  # of the conversations, at least one
    empty_thinking_share: float = 0.1  # of the conversations with reasoning: without it
    cut_thinking_share: float = 0.03  # of the conversations with reasoning: cut at a random budget
    seed: int = 1234  # chooses these shares and the validation split


@dataclass(frozen=True)
class ChatData:
    """What was made: the manifest, the number of rows left out as too long, the trained tokens."""

    manifest: Manifest
    dropped: int
    trained_tokens: int


def prepare_chat(config: ChatDataConfig, say: Callable[[str], None]) -> ChatData:
    """Make the folder `config.output`, or reuse it if the same rows and knobs made it. It appears
    only when complete; several processes may ask at once.

    Raises ConfigError, naming the knob, or file and line: a value out of range, no or bad rows, a
    tokenizer without chat tokens, a conversation longer than a row, other data at `output`.
    """
    _check(config)
    files = [Path(name) for name in sorted(glob(config.rows))] or [Path(config.rows)]
    loaded = load_tokenizer(Path(config.tokenizer))
    chat = ChatFormat(loaded, f"tokenizer={config.tokenizer}")
    output = Path(config.output)
    with writing(output, "output"), exclusive(output, wait=True):
        try:
            digests = [file_sha256(path) for path in files]
        except OSError as error:
            raise ConfigError(f"rows={config.rows}: cannot be read ({error.strerror})") from None
        source: dict[str, Any] = asdict(config) | {"kind": KIND, "recipe": _RECIPE}
        source |= {"rows": digests, "tokenizer": loaded.sha256}
        del source["output"]
        if output.exists():
            manifest = load_manifest(output)
            made = {name: manifest.source.get(name) for name in source}
            if made != source:
                raise ConfigError(f"output={output}: holds other data; give another")
            return _result(manifest)
        work = output.with_name(output.name + ".partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            manifest = _build(config, files, chat, work, source, say)
            flush_to_disk(work)
            os.replace(work, output)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        flush_to_disk(output.parent)
    return _result(manifest)


def _result(manifest: Manifest) -> ChatData:
    return ChatData(manifest, manifest.source["dropped"], manifest.source["trained_tokens"])


def _check(config: ChatDataConfig) -> None:
    for knob in ("validation_fraction", "empty_thinking_share", "cut_thinking_share"):
        value = getattr(config, knob)
        if not 0 <= value <= 1:
            raise ConfigError(f"{knob}={value}: is a share, from 0 to 1")
    if config.empty_thinking_share + config.cut_thinking_share > 1:
        raise ConfigError(
            f"empty_thinking_share={config.empty_thinking_share} and "
            f"cut_thinking_share={config.cut_thinking_share}: are shares of the same "
            "conversations; their sum must be 1 at most"
        )
    if not 0 < config.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={config.validation_fraction}: must be above 0 and below 1"
        )
    if config.sequence_length < 0:
        raise ConfigError(f"sequence_length={config.sequence_length}: must be 0 or more")


def _kept(
    config: ChatDataConfig, files: list[Path], chat: ChatFormat
) -> Iterator[tuple[ChatRow, Rendered | None]]:
    """Every row and its ids; None for a row that is dropped as too long."""
    rows = (row for path in files for row in read_rows(path))
    for number, row in enumerate(rows):
        rendered = _rendered(config, chat, row, number)
        if not config.sequence_length or rendered.ids.size <= config.sequence_length + 1:
            yield row, rendered
        elif config.too_long == TooLong.drop:
            yield row, None
        else:
            raise ConfigError(
                f"{row.where}: has {rendered.ids.size} tokens, more than "
                f"sequence_length={config.sequence_length} and one; raise it, or give too_long=drop"
            )


def _build(
    config: ChatDataConfig,
    files: list[Path],
    chat: ChatFormat,
    work: Path,
    source: dict[str, Any],
    say: Callable[[str], None],
) -> Manifest:
    """Render the rows into `work`. Reads them twice: the first time for the validation split."""
    held_out = _held_out(config, files, chat)
    loaded = chat.tokenizer
    dtypes = dict.fromkeys(MASK_OF, token_dtype(loaded.vocab_size))
    dtypes |= dict.fromkeys(MASK_OF.values(), token_dtype(2))
    writers = {
        name: SplitWriter(
            work,
            name,
            dtype,
            vocab_size=2 if name in MASK_OF.values() else loaded.vocab_size,
            shard_tokens=_SHARD_TOKENS,
        )
        for name, dtype in dtypes.items()
    }
    dropped = trained_tokens = 0
    for number, (row, rendered) in enumerate(_kept(config, files, chat)):
        if rendered is None:
            dropped += 1
            continue
        split = "validation" if _hash(config, row) <= held_out else "train"
        writers[split].add(rendered.ids)
        writers[MASK_OF[split]].add(rendered.trained.astype(np.int64))
        trained_tokens += int(rendered.trained.sum())
        if (number + 1) % _REPORT_EVERY == 0:
            say(f"{number + 1:,} conversations")
    counts = {name: writer.close() for name, writer in writers.items()}
    shards = {name: writer.finished for name, writer in writers.items()}
    copy_tokenizer(Path(config.tokenizer), work / "tokenizer")
    ends = end_token_ids(loaded, Path(config.tokenizer))
    _end_at_the_message(work / "tokenizer", ends, chat)
    entry = TokenizerEntry(loaded.sha256, loaded.vocab_size, ends[0] if ends else 0)
    source = source | {"dropped": dropped, "trained_tokens": trained_tokens}
    dtype = token_dtype(loaded.vocab_size)
    manifest = build_manifest(source, dtype, entry, shards, counts)
    remove_working_files(work)
    write_manifest(work, manifest)
    return manifest


def _end_at_the_message(folder: Path, ends: tuple[int, ...], chat: ChatFormat) -> None:
    """Name <|im_end|> among the ids that end a text, for `generate` and for exports."""
    path = folder / GENERATION
    all_ends = list(dict.fromkeys([*ends, chat.special_ids[END]]))
    settings = read_json_object(path) | {"eos_token_id": all_ends}
    path.write_text(json_text(settings, indent=2) + "\n", encoding="utf-8")


def _held_out(config: ChatDataConfig, files: list[Path], chat: ChatFormat) -> int:
    """The largest hash of a conversation of the validation split: the wanted number of the smallest
    hashes. Equal conversations have equal hashes, so none is in both splits."""
    found = {_hash(config, row) for row, rendered in _kept(config, files, chat) if rendered}
    if len(found) < 2:
        raise ConfigError(
            f"rows={config.rows}: hold {len(found)} different conversations that fit; at least two "
            "are needed, one for validation"
        )
    count = max(1, min(len(found) - 1, round(config.validation_fraction * len(found))))
    return sorted(found)[count - 1]


def _hash(config: ChatDataConfig, row: ChatRow) -> int:
    text = json_text([config.seed, [message_json(message) for message in row.messages], row.tools])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _rendered(config: ChatDataConfig, chat: ChatFormat, row: ChatRow, number: int) -> Rendered:
    """The row as ids, its reasoning perhaps removed or cut."""
    if any(message.thinking for message in row.messages):
        draw = key64("thinking", config.seed, number) / 2.0**64
        if draw < config.empty_thinking_share:
            row = replace(row, messages=tuple(replace(m, thinking="") for m in row.messages))
        elif draw < config.empty_thinking_share + config.cut_thinking_share:
            limits = [_thinking_limit(chat, m, number, config) for m in row.messages]
            return chat.render(row.messages, row.tools, limits)
    return chat.render(row.messages, row.tools)


def _thinking_limit(chat: ChatFormat, message: Message, number: int, config: ChatDataConfig) -> int:
    """A number of tokens after which to cut the reasoning, 1 to all but one; 0: nothing to cut."""
    length = chat.thinking_tokens(message) if message.thinking else 0
    return 1 + key64("cut", config.seed, number) % (length - 1) if length >= 2 else 0
