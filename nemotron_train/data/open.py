"""Opens the training and validation data of a configuration. No torch."""

from collections.abc import Callable

from nemotron_train.config.schema import Config, DataKind
from nemotron_train.data.batches import BatchSource
from nemotron_train.data.corpus import build_embedded


def open_data(config: Config, say: Callable[[str], None]) -> tuple[BatchSource, BatchSource]:
    """Batch sources for training and validation. The embedded corpus is built on first use.

    `say` prints progress lines. Raises ConfigError if data is missing, damaged or has another
    vocabulary.
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
