"""Chooses the source of each sample: phases of blends, and the data state.

Owns: the order of sources and the state. Does not own: files and tokens (`windows`). The schedule
is a function from state to state that costs a few integer operations per sample. Every rank
computes the whole order, so the order does not depend on the number of ranks.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text


@dataclass(frozen=True)
class Phase:
    """The blend from `from_tokens` on: (source key, integer weight) pairs in the exact ratio."""

    from_tokens: int
    weights: tuple[tuple[str, int], ...]


class Draw(NamedTuple):
    """One sample of the order: its source, and the number of samples drawn from it before."""

    source: str
    drawn: int


@dataclass(frozen=True)
class DataState:
    """The position in the data: all that a resumed run needs, and the values it must match.

    samples: number of samples taken so far. drawn: samples by source key. phase_drawn: samples by
    source key since the current phase began. `drawn` of a source carries over to the next phase, so
    no data is repeated or lost.
    """

    split: str
    sequence_length: int
    seed: int
    fingerprint: str  # of the phases up to the current one and of the data they name
    samples: int = 0
    phase: int = 0
    phase_drawn: Mapping[str, int] = field(default_factory=dict)
    drawn: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens taken so far: samples times the sequence length."""
        return self.samples * self.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> "DataState":
        """The inverse of `to_dict`. Raises ConfigError if `raw` is not such a dictionary."""
        numbers = {"sequence_length": 1, "seed": None, "samples": 0, "phase": 0}  # name -> minimum
        texts, counts = ("split", "fingerprint"), ("phase_drawn", "drawn")
        if not isinstance(raw, dict) or set(raw) != {*numbers, *texts, *counts}:
            raise ConfigError("the checkpoint's data state has not the fields of this version")
        for name, value in raw.items():
            if name in texts:
                is_valid = type(value) is str
            elif name in counts:
                is_valid = type(value) is dict and all(_is_count(count) for count in value.values())
            else:
                minimum = numbers[name]
                is_valid = type(value) is int and (minimum is None or value >= minimum)
            if not is_valid:
                raise ConfigError(f"the checkpoint's data state is damaged: {name}={value!r}")
        return cls(**raw)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def exact_weights(weights: Sequence[float], knob: str) -> list[int]:
    """Integers in the exact ratio of these decimal weights. Raises ConfigError if a weight is not
    above 0 or is infinite."""
    for index, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ConfigError(f"{knob}[{index}].weight={weight}: must be a number above 0")
    # Through str, so that 0.1 means one tenth, not the nearest double.
    fractions = [Fraction(str(weight)) for weight in weights]
    denominator = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * denominator) for fraction in fractions]


def next_source(phase: Phase, drawn: Mapping[str, int]) -> str:
    """The source of the next sample of a phase. `drawn`: samples by source key in this phase.

    Balinski and Young's quota method ("The quota method of apportionment", 1975): among the sources
    below their share of the next total, choose the one with the largest weight / (count + 1). At
    every length, the count of each source then lies between its exact share rounded down and
    rounded up. Choosing the largest deficit would not guarantee this for three or more sources.
    Ties go to the source listed first.
    """
    total_weight = sum(weight for _, weight in phase.weights)
    next_total = sum(drawn.values()) + 1
    best = ""
    best_weight, best_count = 0, 1
    for source, weight in phase.weights:
        count = drawn.get(source, 0)
        below_share = count * total_weight < weight * next_total
        if below_share and weight * best_count > best_weight * (count + 1):
            best = source
            best_weight, best_count = weight, count + 1
    assert best, "counts that sum to less than the next total leave one source below its share"
    return best


def fingerprint(phases: Sequence[Phase], phase: int) -> str:
    """SHA-256 that identifies the order up to and including a phase. Later phases may still be
    edited."""
    history = [(entry.from_tokens, entry.weights) for entry in phases[: phase + 1]]
    return hashlib.sha256(json_text(history).encode()).hexdigest()


def schedule(
    phases: Sequence[Phase], state: DataState, num_samples: int
) -> tuple[list[Draw], DataState]:
    """The next `num_samples` samples of the order, and the state after them.

    A phase begins with the first sample that starts at or after its `from_tokens`.
    """
    draws = []
    phase, samples = state.phase, state.samples
    phase_drawn, drawn = dict(state.phase_drawn), dict(state.drawn)
    for _ in range(num_samples):
        tokens = samples * state.sequence_length
        while phase + 1 < len(phases) and tokens >= phases[phase + 1].from_tokens:
            phase, phase_drawn = phase + 1, {}
        source = next_source(phases[phase], phase_drawn)
        draws.append(Draw(source, drawn.get(source, 0)))
        phase_drawn[source] = phase_drawn.get(source, 0) + 1
        drawn[source] = drawn.get(source, 0) + 1
        samples += 1
    after = replace(
        state,
        fingerprint=fingerprint(phases, phase) if phase != state.phase else state.fingerprint,
        samples=samples,
        phase=phase,
        phase_drawn=phase_drawn,
        drawn=drawn,
    )
    return draws, after


def check_state(
    phases: Sequence[Phase],
    state: DataState,
    *,
    split: str,
    sequence_length: int,
    seed: int,
    knob: str,
) -> None:
    """Raises ConfigError, naming the knob, if `state` does not match these phases, this sequence
    length or this seed."""
    assert state.split == split, f"a state of the {state.split} split given to {split}"
    for name, value in (("sequence_length", sequence_length), ("seed", seed)):
        before = getattr(state, name)
        if before != value:
            raise ConfigError(
                f"train.{name}={value}: the checkpoint's data position was made with {before}; "
                "set it back or start a new run"
            )
    known = {source for phase in phases for source, _ in phase.weights}
    missing = sorted(set(state.drawn) - known)
    actual = fingerprint(phases, state.phase) if state.phase < len(phases) else "none"
    if missing or actual != state.fingerprint:
        note = f"; source {missing[0]} is gone" if missing else ""
        raise ConfigError(
            f"{knob}: the checkpoint was made with other data or another blend (fingerprint "
            f"{state.fingerprint[:16]}, now {actual[:16]}{note}); restore the files and the phases "
            "up to here, or start a new run"
        )
    later = phases[state.phase + 1 :]
    if later and state.samples and later[0].from_tokens <= state.tokens - sequence_length:
        raise ConfigError(
            f"{knob}[{state.phase + 1}].from_tokens={later[0].from_tokens}: the checkpoint has "
            f"already taken {state.tokens} tokens; a new phase must begin later"
        )
