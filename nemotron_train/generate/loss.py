"""`evaluate loss`: the loss of every head of a checkpoint on prepared data, folder by folder.

Owns: which rows of each folder are read, the table. Does not own: the losses (`model.hybrid`), the
run's own validation (`train.evaluate`), which this repeats for other data: the forward pass is
training's, one NVFP4 scale for all tokens of a pass included.
"""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nemotron_train.config.schema import BlendSource, ConfigError
from nemotron_train.data.batches import BatchSource
from nemotron_train.generate.acceptance import validation_folders
from nemotron_train.generate.knobs import LossConfig
from nemotron_train.generate.load import Opened, opened
from nemotron_train.train.step import count_targets, micro_batches


def evaluate_loss(run: str, knobs: LossConfig) -> dict[str, list[float]]:
    """Mean loss, nats a token, of the main head and of each depth on the validation split of each
    folder; printed too. Raises ConfigError for data that cannot be used."""
    if knobs.tokens < 0:
        raise ConfigError(f"tokens={knobs.tokens}: give 0 (train.validation_tokens) or more")
    console = Console(width=120)
    with opened(run, knobs, console.print) as model:
        console.quiet = not model.is_first_rank
        model.precision.scale_tokens_apart(False)
        folders = [Path(path) for path in knobs.data] or validation_folders(model.config)
        found = {str(folder): losses(model, folder, knobs.tokens) for folder in folders}
        table = Table("data", "main head")
        for depth in range(1, 1 + model.config.model.mtp.depths):
            table.add_column(f"depth {depth}", justify="right")
        for folder, values in found.items():
            table.add_row(folder, *(f"{value:.4f}" for value in values))
        console.print(f"{model.checkpoint}", highlight=False)
        console.print(table)
    return found


@torch.inference_mode()
def losses(model: Opened, folder: Path, tokens: int = 0) -> list[float]:
    """Mean loss of each head over the first `tokens` (0: the run's validation_tokens, or all there
    are) of the folder's validation split, in rows of the run's sequence length; COLLECTIVE."""
    config, train = model.config, model.config.train
    tokenizer = folder / "tokenizer"
    data = replace(config.data, tokenizer=str(tokenizer), validation=[BlendSource(str(folder))])
    source = BatchSource(
        data,
        sequence_length=train.sequence_length,
        seed=train.seed,
        split="validation",
        vocab_size=config.model.vocab_size,
    )
    wanted = (tokens or train.validation_tokens) // train.sequence_length
    rows = min(max(1, wanted), source.num_samples)
    batch, _ = source.take(source.state_at_start(), rows)
    sums_K = [
        model.model(**part).double() for part in micro_batches(batch, 8, model.platform.device)
    ]
    num_heads = 1 + config.model.mtp.depths
    means_K = torch.stack(sums_K).sum(0).cpu().numpy() / count_targets(batch, num_heads).clip(1)
    return means_K.tolist()
