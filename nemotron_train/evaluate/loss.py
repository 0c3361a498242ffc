"""`evaluate loss`: the loss of every head of a checkpoint on prepared data, by folder.

Owns: which rows of each folder are read, the sums, table and JSON. Does not own: computing losses
(`model.hybrid`), validation during training (`train.evaluate`).

The forward pass is the same as in training, including one NVFP4 scale for all tokens of a
micro-batch, so the losses are comparable with the run's validation losses.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from nemotron_train.config.json_text import json_text
from nemotron_train.config.schema import BlendSource, DataPhase
from nemotron_train.data.batches import Batch, BatchSource
from nemotron_train.data.tokenize import load_tokenizer
from nemotron_train.evaluate.acceptance import validation_folders
from nemotron_train.evaluate.knobs import LossConfig, check_reading
from nemotron_train.evaluate.positions import check_tokenizer
from nemotron_train.evaluate.text_bytes import TokenBytes
from nemotron_train.generate.checkpoint import LoadedCheckpoint, open_checkpoint
from nemotron_train.platform.files import check_output, write_output
from nemotron_train.platform.terminal import open_console
from nemotron_train.train.global_batch import count_targets, micro_batches

ROWS_A_PASS = 4  # rows per forward pass


@dataclass(frozen=True)
class FolderLoss:
    """Mean losses over one folder.

    tokens: targets of the main head. bytes: UTF-8 bytes of the text of these targets, where the end
    of a document, though a target, is no text.
    """

    folder: str
    tokens: int
    bytes: int
    loss: float  # of the main head, nats per token
    standard_error: float  # of `loss`, from batches of ROWS_A_PASS rows
    depths: list[float]  # loss of each multi-token prediction depth

    @property
    def bits_a_byte(self) -> float:
        """Bits per byte of text; comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / max(self.bytes, 1)


def evaluate_loss(run: str, knobs: LossConfig) -> list[FolderLoss]:
    """Measure and print the losses of the checkpoint `run`, one entry per folder.

    Raises ConfigError if a knob is out of range or the data cannot be used. COLLECTIVE over the
    ranks of this launch.
    """
    check_reading(knobs)
    if knobs.output:
        check_output(Path(knobs.output), "output")
    console = open_console()
    with open_checkpoint(run, knobs, console.print) as model:
        console.quiet = not model.is_first_rank
        model.precision.set_per_token_scales(False)
        folders = [Path(path) for path in knobs.data] or validation_folders(model.config)
        check_tokenizer(model, folders)
        losses = [folder_loss(model, folder, knobs) for folder in folders]
        console.print(f"{model.checkpoint}, {knobs.split} split")
        console.print(_table(losses))
        if knobs.output and model.is_first_rank:
            _write(Path(knobs.output), str(model.checkpoint), knobs.split, losses)
            console.print(f"wrote {knobs.output}")
    return losses


@torch.inference_mode()
def folder_loss(model: LoadedCheckpoint, folder: Path, knobs: LossConfig) -> FolderLoss:
    """The losses over the first rows of the folder's split; COLLECTIVE.

    P: forward passes, K: heads (the main head, then the depths).
    """
    train = model.config.train
    length = knobs.sequence_length or train.sequence_length
    tokenizer, blend = folder / "tokenizer", [BlendSource(str(folder), 1.0)]
    source = BatchSource(
        replace(
            model.config.data,
            tokenizer=str(tokenizer),
            phases=[DataPhase(0, blend)],
            validation=blend,
        ),
        sequence_length=length,
        seed=train.seed,
        split=knobs.split,
        vocab_size=model.config.model.vocab_size,
    )
    num_rows = source.num_samples
    if knobs.max_tokens:
        num_rows = max(1, min(num_rows, knobs.max_tokens // length))
    token_bytes = TokenBytes(load_tokenizer(tokenizer))
    num_heads = 1 + model.config.model.mtp.depths
    state = source.state_at_start()
    sums, counts = [], []
    num_bytes = 0
    for start in range(0, num_rows, ROWS_A_PASS):
        batch, state = source.take(state, min(ROWS_A_PASS, num_rows - start))
        (inputs,) = micro_batches(batch, ROWS_A_PASS, model.platform.device)
        sums.append(model.model(**inputs).double().cpu().numpy())
        counts.append(count_targets(batch, num_heads))
        num_bytes += target_bytes(batch, token_bytes)
    sums_PK, counts_PK = np.array(sums), np.array(counts)
    means_K = sums_PK.sum(0) / counts_PK.sum(0).clip(1)
    residual_P = sums_PK[:, 0] - means_K[0] * counts_PK[:, 0]
    total = int(counts_PK[:, 0].sum())
    error = math.sqrt(float((residual_P**2).sum())) / max(total, 1)
    return FolderLoss(str(folder), total, num_bytes, float(means_K[0]), error, means_K[1:].tolist())


def target_bytes(batch: Batch, token_bytes: TokenBytes) -> int:
    """UTF-8 bytes of the text of a batch's targets; the end of a document has none."""
    return token_bytes.of(batch.labels_BS[batch.loss_mask_BS > 0].tolist())


def _table(losses: list[FolderLoss]) -> Table:
    table = Table("data", "targets", "nats a token", "perplexity", "bits a byte")
    for depth in range(1, 1 + len(losses[0].depths)):
        table.add_column(f"depth {depth}")
    for column in table.columns[1:]:
        column.justify = "right"
    for loss in losses:
        table.add_row(
            loss.folder,
            f"{loss.tokens:,}",
            f"{loss.loss:.4f} ± {loss.standard_error:.4f}",
            f"{math.exp(loss.loss):.2f}",
            f"{loss.bits_a_byte:.3f}",
            *(f"{depth:.4f}" for depth in loss.depths),
        )
    if len(losses) > 1:
        tokens = sum(loss.tokens for loss in losses)
        mean = sum(loss.loss * loss.tokens for loss in losses) / tokens
        table.add_row("all targets", f"{tokens:,}", f"{mean:.4f}", f"{math.exp(mean):.2f}", "")
    return table


def _write(path: Path, checkpoint: str, split: str, losses: list[FolderLoss]) -> None:
    folders = [asdict(loss) | {"bits_a_byte": loss.bits_a_byte} for loss in losses]
    content = {"checkpoint": checkpoint, "split": split, "folders": folders}
    write_output(path, json_text(content, indent=1) + "\n", "output")
