"""`evaluate loss`: a checkpoint's loss on prepared data, folder by folder.

Owns: which rows are read, the sums, table and JSON. Does not own: the forward pass (`generate.
engine`), data (`data.batches`).

The same rows and targets as the run's own validation: rows of `sequence_length` tokens in file
order, each document of a row for itself, the first token of a document not a target. The decoding
engine computes them, so under emulated NVFP4 activations are scaled token by token
(docs/generate.md).
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nemotron_train.config.schema import BlendSource, DataPhase
from nemotron_train.data.batches import Batch, BatchSource
from nemotron_train.data.tokenize import load_tokenizer
from nemotron_train.evaluate.knobs import LossConfig, check_reading
from nemotron_train.evaluate.positions import check_tokenizer
from nemotron_train.generate.acceptance import validation_folders
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.load import Opened, opened

ROWS_A_PASS = 8


@dataclass(frozen=True)
class FolderLoss:
    """Mean NLL over `tokens` targets of one folder, which decode to `bytes` of UTF-8."""

    folder: str
    tokens: int
    bytes: int
    loss: float  # nats a token
    standard_error: float  # of the mean, over rows

    @property
    def bits_a_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / max(self.bytes, 1)


def evaluate_loss(run: str, knobs: LossConfig) -> list[FolderLoss]:
    """Measure and print the checkpoint `run`. Raises ConfigError for knobs out of range and data
    that cannot be used."""
    check_reading(knobs)
    console = Console(width=120)
    with opened(run, knobs, console.print) as model:
        console.quiet = not model.is_first_rank
        folders = [Path(path) for path in knobs.data] or validation_folders(model.config)
        check_tokenizer(model, folders)
        losses = [_folder_loss(model, folder, knobs) for folder in folders]
        console.print(f"{model.checkpoint}, {knobs.split} split", highlight=False)
        console.print(_table(losses))
        if knobs.output and model.is_first_rank:
            content = {
                "checkpoint": str(model.checkpoint),
                "split": knobs.split,
                "folders": [asdict(loss) | {"bits_a_byte": loss.bits_a_byte} for loss in losses],
            }
            Path(knobs.output).write_text(json.dumps(content, indent=1) + "\n")
            console.print(f"wrote {knobs.output}", highlight=False)
    return losses


def _folder_loss(model: Opened, folder: Path, knobs: LossConfig) -> FolderLoss:
    length = knobs.sequence_length or model.config.train.sequence_length
    blend = [BlendSource(str(folder), 1.0)]
    data = replace(
        model.config.data,
        tokenizer=str(folder / "tokenizer"),
        phases=[DataPhase(0, blend)],
        validation=blend,
    )
    source = BatchSource(
        data,
        sequence_length=length,
        seed=model.config.train.seed,
        split=knobs.split,
        vocab_size=model.config.model.vocab_size,
    )
    num_rows = source.num_samples
    if knobs.max_tokens:
        num_rows = max(1, min(num_rows, knobs.max_tokens // length))
    engine = Engine(model.model, None, model.platform.device)
    tokenizer = load_tokenizer(folder / "tokenizer")
    state, sums, counts, num_bytes = source.state_at_start(), [], [], 0
    for start in range(0, num_rows, ROWS_A_PASS):
        batch, state = source.take(state, min(ROWS_A_PASS, num_rows - start))
        pieces, rows = pieces_of(batch)
        found = engine.log_probabilities(pieces, knobs.prefill_chunk)
        for row in range(len(batch.tokens_BS)):
            own = [i for i, of in enumerate(rows) if of == row]
            sums.append(-sum(sum(found[i]) for i in own))
            counts.append(sum(len(found[i]) for i in own))
        num_bytes += sum(len(tokenizer.decode(piece[1:]).encode()) for piece in pieces)
    total = sum(counts)
    loss = sum(sums) / max(total, 1)
    rest = np.array(sums) - loss * np.array(counts)
    error = math.sqrt(float((rest**2).sum())) / max(total, 1)
    return FolderLoss(str(folder), total, num_bytes, loss, error)


def pieces_of(batch: Batch) -> tuple[list[list[int]], list[int]]:
    """The documents of each row with the row's last label, those of one token left out, and the row
    of each: their tokens after the first are the counted targets."""
    pieces, rows = [], []
    for row, (tokens_S, labels_S, mask_S) in enumerate(
        zip(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, strict=True)
    ):
        whole = np.append(tokens_S, labels_S[-1])
        starts = [0, *(np.flatnonzero(mask_S == 0) + 1).tolist(), len(whole)]
        for begin, end in pairwise(starts):
            if end - begin > 1:
                pieces.append(whole[begin:end].tolist())
                rows.append(row)
    return pieces, rows


def _table(losses: list[FolderLoss]) -> Table:
    table = Table("data", "targets", "nats a token", "perplexity", "bits a byte")
    for column in table.columns[1:]:
        column.justify = "right"
    for loss in losses:
        table.add_row(
            loss.folder,
            f"{loss.tokens:,}",
            f"{loss.loss:.4f} ± {loss.standard_error:.4f}",
            f"{math.exp(loss.loss):.2f}",
            f"{loss.bits_a_byte:.3f}",
        )
    if len(losses) > 1:
        tokens = sum(loss.tokens for loss in losses)
        mean = sum(loss.loss * loss.tokens for loss in losses) / tokens
        table.add_row("all targets", f"{tokens:,}", f"{mean:.4f}", f"{math.exp(mean):.2f}", "")
    return table
