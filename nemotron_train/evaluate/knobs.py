"""The knobs of the `evaluate` verbs, and their checks. No torch."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.manifest import SPLITS
from nemotron_train.generate.knobs import ModelKnobs


@dataclass
class LossConfig(ModelKnobs):
    """Knobs of `evaluate loss`."""

    data: list[str] = field(default_factory=list)  # prepared folders; empty: the run's validation
    split: str = "validation"
    max_tokens: int = 131_072  # per folder, whole rows only; 0: all
    sequence_length: int = 0  # tokens per row; 0: the run's
    output: str = ""  # JSON file for the results; empty: none


@dataclass
class PositionsConfig(ModelKnobs):
    """Knobs of `evaluate nll-by-position`."""

    data: list[str] = field(default_factory=list)  # prepared folders; empty: the run's validation
    split: str = "validation"
    documents: int = 4  # number of documents, each cut to max_tokens
    max_tokens: int = 65_536
    first_position: int = 128  # first position of the fit; earlier tokens have too little context
    prefill_chunk: int = 512  # tokens per forward call; sets memory use, besides the KV cache
    output: str = "nll_by_position"  # OUTPUT.json, OUTPUT.png


@dataclass
class HarnessConfig(ModelKnobs):
    """Knobs of `evaluate harness`."""

    tasks: list[str] = MISSING  # task names, of the harness or in include_path
    include_path: str = ""  # folder with the user's own task files
    num_fewshot: int = -1  # solved examples before each question; -1: as the task sets it
    limit: int = 0  # questions per task; 0: all
    batch: int = 8  # sequences per batch
    max_length: int = 0  # window in tokens: the most given at once; 0: the model's longest context
    prefill_chunk: int = 512
    output: str = ""  # JSON file for the results; empty: none


def check_reading(knobs: LossConfig | PositionsConfig) -> None:
    """Raises ConfigError for a knob outside its range."""
    if knobs.split not in SPLITS:
        raise ConfigError(f"split={knobs.split}: prepared data has {' and '.join(SPLITS)}")
    minimums = {"max_tokens": 0, "sequence_length": 0}
    if isinstance(knobs, PositionsConfig):
        minimums = {"prefill_chunk": 1, "documents": 1, "first_position": 1}
        minimums["max_tokens"] = 2 * knobs.first_position
    for name, minimum in minimums.items():
        value = getattr(knobs, name)
        if value < minimum:
            raise ConfigError(f"{name}={value}: give {minimum} or more")


def check_harness(knobs: HarnessConfig) -> None:
    """Raises ConfigError for a knob outside its range."""
    minimums = {"limit": (0, " (all)"), "num_fewshot": (-1, " (as the task sets it)")}
    minimums |= {"batch": (1, ""), "prefill_chunk": (1, "")}
    for name, (minimum, meaning) in minimums.items():
        value = getattr(knobs, name)
        if value < minimum:
            raise ConfigError(f"{name}={value}: give {minimum}{meaning} or more")
    if knobs.max_length < 0 or knobs.max_length == 1:
        raise ConfigError(
            f"max_length={knobs.max_length}: give 0 (the model's longest context), or 2 or more: a "
            "token of context and a token to predict"
        )
    if knobs.include_path and not Path(knobs.include_path).is_dir():
        raise ConfigError(f"include_path={knobs.include_path}: no such folder")
