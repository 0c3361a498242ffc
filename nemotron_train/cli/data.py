"""Terminal output of `nemotron-train data prepare` and `nemotron-train data inspect`."""

import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TimeRemainingColumn
from rich.table import Table

from nemotron_train.config.errors import ConfigError
from nemotron_train.data import prepare
from nemotron_train.data.indexed import ShardEntry, ShardReader
from nemotron_train.data.manifest import Manifest, load_manifest
from nemotron_train.data.tokenize import load_tokenizer
from nemotron_train.platform.files import text_lines
from nemotron_train.platform.terminal import open_console, text_column

_PLAIN_SECONDS = 10.0  # between two progress lines without a terminal
_SAMPLE_TOKENS = 80
_SHOWN_LEFT_OUT = 10


def run_prepare(config: prepare.PrepareConfig) -> None:
    """Prepare data with a progress display and print a summary.

    Raises ConfigError as `prepare.prepare` does.
    """
    console = open_console()
    start = time.monotonic()
    latest = prepare.Progress()
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            BarColumn(),
            text_column("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading", total=None)

            def show(progress: prepare.Progress) -> None:
                nonlocal latest
                latest = progress
                bar.update(
                    task,
                    total=progress.bytes_total or None,
                    completed=progress.bytes_read,
                    description=_line(progress),
                )

            manifest = prepare.prepare(config, show)
    else:
        last_printed = start

        def print_line(progress: prepare.Progress) -> None:
            nonlocal latest, last_printed
            latest = progress
            if time.monotonic() - last_printed >= _PLAIN_SECONDS:
                last_printed = time.monotonic()
                print(_line(progress), flush=True)

        manifest = prepare.prepare(config, print_line)
    _summary(console, Path(config.output), manifest, latest, time.monotonic() - start)


def _line(progress: prepare.Progress) -> str:
    share = ""
    if progress.bytes_total:
        share = f" ({100 * progress.bytes_read / progress.bytes_total:.0f}%)"
    return (
        f"{progress.documents:,} documents, {progress.tokens:,} tokens, {progress.bad:,} bad{share}"
    )


def _summary(
    console: Console, output: Path, manifest: Manifest, progress: prepare.Progress, seconds: float
) -> None:
    if not progress.documents:
        console.print(f"{output}: already prepared from this input with these settings")
    _print_manifest(console, output, manifest)
    if progress.bad or progress.empty:
        console.print(f"left out: {progress.bad:,} bad records, {progress.empty:,} empty ones")
        for example in progress.bad_examples:
            console.print(f"  {example}", soft_wrap=True)
    for split in ("train", "validation"):
        if split not in manifest.splits:
            console.print(f"no document fell to the {split} split")
    left_out = output / prepare.LEFT_OUT
    if left_out.is_file():
        lines = text_lines(left_out)
        console.print(f"files and folders not read or without a document: {len(lines):,}")
        for line in lines[:_SHOWN_LEFT_OUT]:
            console.print(f"  {line}", soft_wrap=True)
        if len(lines) > _SHOWN_LEFT_OUT:
            console.print(f"  the others: {left_out}", soft_wrap=True)
    console.print(f"took {seconds:.1f} s")


def _print_manifest(console: Console, folder: Path, manifest: Manifest) -> None:
    console.print(f"{folder}")
    tokenizer = manifest.tokenizer
    console.print(
        f"tokenizer: {tokenizer.vocab_size:,} ids, end of document {tokenizer.end_of_document_id}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for column in ("shards", "documents", "tokens", "unigram entropy (nats/token)"):
        table.add_column(column, justify="right")
    for name, split in manifest.splits.items():
        table.add_row(
            name,
            f"{len(split.shards):,}",
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.unigram_entropy:.4f}",
        )
    console.print(table)
    console.print(f"fingerprint: {manifest.fingerprint}")


def inspect(path: str | Path, samples: int = 3) -> str | None:
    """Print the contents of a prepared folder and some decoded documents, and verify every file.

    samples: documents per split. Returns the first problem with the tokenizer or the shards, or
    None. Raises ConfigError if the folder holds no readable prepared data.
    """
    folder = Path(path)
    console = open_console(soft_wrap=True)
    manifest = load_manifest(folder)
    loaded = load_tokenizer(folder / "tokenizer")
    _print_manifest(console, folder, manifest)
    for key, value in manifest.source.items():
        console.print(f"source.{key}: {value}")
    try:
        if loaded.sha256 != manifest.tokenizer.sha256:
            raise ConfigError(f"{folder / 'tokenizer'}: not the tokenizer of the manifest")
        for split in manifest.splits.values():
            for entry in split.shards:
                _verify(folder, entry, manifest)
        for name, split in manifest.splits.items():
            for entry, document in _spread(split.shards, samples):
                tokens = ShardReader(folder, entry.name, entry).document(document)
                text = loaded.decode(tokens[:_SAMPLE_TOKENS])
                ellipsis = " …" if tokens.size > _SAMPLE_TOKENS else ""
                console.print(
                    f"--- {name}: document {document} of {entry.name}, {tokens.size:,} tokens\n"
                    f"{text}{ellipsis}",
                )
    except ConfigError as error:
        return str(error)
    console.print("checksums of all shards agree with the manifest")
    return None


def run_inspect(path: str | Path, samples: int = 3) -> None:
    """Run `inspect`. Raises ConfigError if it finds a problem."""
    if problem := inspect(path, samples):
        raise ConfigError(problem)


def _verify(folder: Path, entry: ShardEntry, manifest: Manifest) -> None:
    """Verify a shard against its manifest entry: checksums, counts, token ids. Raises ConfigError
    for the first file that is wrong."""
    shard = ShardReader(folder, entry.name, entry)
    shard.check_content()
    shard.verify()
    smallest, largest = shard.token_range()
    counted = {
        "documents": shard.documents,
        "tokens": shard.num_tokens,
        "max_token_id": largest,
    }
    for name, value in counted.items():
        if value != getattr(entry, name):
            raise ConfigError(
                f"{shard.bin_path}: {name} is {value}, the manifest says {getattr(entry, name)}"
            )
    if largest >= manifest.tokenizer.vocab_size or smallest < 0:
        raise ConfigError(f"{shard.bin_path}: holds ids outside the tokenizer's vocabulary")


def _spread(shards: tuple[ShardEntry, ...], count: int) -> list[tuple[ShardEntry, int]]:
    """Up to `count` documents, evenly spread over a split: (shard, document index in the shard)."""
    ends = np.cumsum([shard.documents for shard in shards])
    numbers = sorted({int(ends[-1]) * i // count for i in range(count)}) if count > 0 else []
    spread = []
    for number in numbers:
        index = int(np.searchsorted(ends, number, side="right"))
        spread.append((shards[index], number - int(ends[index]) + shards[index].documents))
    return spread
