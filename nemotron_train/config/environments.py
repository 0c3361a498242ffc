"""The knobs of environments and of their scoring. No torch, no logic."""

from dataclasses import dataclass
from enum import StrEnum


class Isolation(StrEnum):
    """How code of the model is kept from the machine."""

    namespaces = "namespaces"
    none_i_accept_the_risk = "none_i_accept_the_risk"  # it may read, write and send anything


@dataclass
class EnvironmentConfig:
    """One environment of a run: an entry of the mapping from its name to these knobs."""

    ratio: float = 1.0  # share of the prompts of a step, relative to the others'; 0: none
    level: int = 0  # of generated rows: 1, 2, 3; 0: the three in turn
    rows: str = ""  # JSONL file; empty: generated, which only the families can
    use: str = ""  # module:name or file.py:name of your own; empty: the one that the key names


@dataclass
class ScoringConfig:
    """How environments run."""

    scoring_workers: int = 2  # processes
    scoring_seconds: float = 10.0  # wall clock of one call of an environment
    scoring_load_seconds: float = 60.0  # wall clock of an environment's import
    scoring_memory_gib: float = 8.0  # of each worker
    sandbox: Isolation = Isolation.namespaces
