"""The training and validation batches that a configuration asks for. No torch."""

from collections.abc import Callable

from nemotron_train.config.schema import Config, DataKind
from nemotron_train.data.batches import BatchSource
from nemotron_train.data.corpus import build_embedded


def open_data(config: Config, say: Callable[[str], None]) -> tuple[BatchSource, BatchSource]:
    """Training and validation batches; the embedded corpus is built on first use.

    Raises ConfigError for data that is missing, damaged or of another vocabulary.
    """
    if config.data.kind == DataKind.embedded:
        build_embedded(config.data.embedded_folder, config.model.vocab_size, progress=say)

    def source(split: str) -> BatchSource:
        return BatchSource(
            config.data,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            split=split,
            vocab_size=config.model.vocab_size,
        )

    return source("train"), source("validation")
