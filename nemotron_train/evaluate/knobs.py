"""The knobs of the `evaluate` verbs that read prepared data, and their checks. No torch."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.manifest import SPLITS
from nemotron_train.generate.knobs import ModelKnobs


@dataclass
class LossConfig(ModelKnobs):
    """Knobs of `evaluate loss`."""

    data: list[str] = field(default_factory=list)  # prepared folders; empty: the run's validation
    split: str = "validation"
    max_tokens: int = 131_072  # of each folder, whole rows; 0: all
    sequence_length: int = 0  # tokens a row; 0: the run's
    output: str = ""  # write the figures there too, as JSON


@dataclass
class PositionsConfig(ModelKnobs):
    """Knobs of `evaluate nll-by-position`."""

    data: list[str] = field(default_factory=list)  # prepared folders; empty: the run's validation
    split: str = "validation"
    documents: int = 4  # so many, each cut to max_tokens
    max_tokens: int = 65_536
    first_position: int = 128  # where the fit begins: before it, words are guessed from nothing
    prefill_chunk: int = 512  # tokens a pass: what memory grows with, beside the attention's cache
    output: str = "nll_by_position"  # OUTPUT.json, OUTPUT.png


@dataclass
class HarnessConfig(ModelKnobs):
    """Knobs of `evaluate harness`."""

    tasks: list[str] = MISSING  # names of the harness's tasks or of those in include_path
    include_path: str = ""  # a folder with task files of the user's own
    num_fewshot: int = -1  # worked examples before each question; -1: the task's own number
    limit: int = 0  # questions a task; 0: all
    batch: int = 8  # sequences a pass
    max_length: int = 0  # tokens of a question with its context; 0: as long as it is
    prefill_chunk: int = 512
    output: str = ""  # write the results there too, as JSON


def check_reading(knobs: LossConfig | PositionsConfig) -> None:
    """Raises ConfigError for a knob outside its range."""
    if knobs.split not in SPLITS:
        raise ConfigError(f"split={knobs.split}: prepared data has {' and '.join(SPLITS)}")
    least = {"max_tokens": 0, "sequence_length": 0}
    if isinstance(knobs, PositionsConfig):
        least = {"prefill_chunk": 1, "documents": 1, "first_position": 1}
        least["max_tokens"] = 2 * knobs.first_position
    for name, lowest in least.items():
        value = getattr(knobs, name)
        if value < lowest:
            raise ConfigError(f"{name}={value}: give {lowest} or more")
