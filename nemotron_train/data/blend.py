"""Which source the next sample comes from: phases of blends, and the state that says how far.

Pure bookkeeping: no files, no tokens. A schedule is a function from state to state that costs a
few integer operations a sample, so every rank computes the whole order alone and the order does
not depend on how many ranks there are.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple

from nemotron_train.config.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """The blend from `from_tokens` on: source keys and integer weights in their exact ratio."""

    from_tokens: int
    weights: tuple[tuple[str, int], ...]


class Draw(NamedTuple):
    """One sample of the order: from which source, and how many it had given before."""

    source: str
    drawn: int


@dataclass(frozen=True)
class DataState:
    """Where the data stands: all that a resumed run needs, and what it must agree with.

    `samples` were taken in all, `drawn` of them by source key, `phase_drawn` since the current
    phase began. A source keeps its `drawn` across phases, so nothing is repeated or lost.
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
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> "DataState":
        """The inverse of `to_dict`; ConfigError if `raw` is not such a dictionary."""
        numbers = {"sequence_length": 1, "seed": None, "samples": 0, "phase": 0}  # lower limits
        texts, counts = ("split", "fingerprint"), ("phase_drawn", "drawn")
        if not isinstance(raw, dict) or set(raw) != {*numbers, *texts, *counts}:
            raise ConfigError("the checkpoint's data state has not the fields of this version")
        for name, value in raw.items():
            if name in texts:
                good = type(value) is str
            elif name in counts:
                good = type(value) is dict and all(_is_count(count) for count in value.values())
            else:
                lowest = numbers[name]
                good = type(value) is int and (lowest is None or value >= lowest)
            if not good:
                raise ConfigError(f"the checkpoint's data state is damaged: {name}={value!r}")
        return cls(**raw)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def exact_weights(weights: Sequence[float], knob: str) -> list[int]:
    """Integers in the exact ratio of these decimal weights; ConfigError if one is not > 0."""
    for index, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ConfigError(f"{knob}[{index}].weight={weight}: must be a number above 0")
    # str: 0.1 means one tenth, not the nearest double.
    fractions = [Fraction(str(weight)) for weight in weights]
    denominator = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * denominator) for fraction in fractions]


def next_source(phase: Phase, drawn: Mapping[str, int]) -> str:
    """The source of the next sample of a phase, given what each has given in it.

    Balinski and Young's quota method ("The quota method of apportionment", 1975): among the
    sources that are below their share of the next total, the one with the largest weight per
    sample it would then have. At every length each source's count lies between its exact share
    rounded down and rounded up. Taking the largest deficit instead would not keep that with
    three sources or more. Ties go to the source listed first.
    """
    total_weight = sum(weight for _, weight in phase.weights)
    next_total = sum(drawn.values()) + 1
    best, best_weight, best_count = "", 0, 1
    for source, weight in phase.weights:
        count = drawn.get(source, 0)
        below_share = count * total_weight < weight * next_total
        if below_share and weight * best_count > best_weight * (count + 1):
            best, best_weight, best_count = source, weight, count + 1
    assert best, "counts that sum to less than the next total leave one source below its share"
    return best


def fingerprint(phases: Sequence[Phase], phase: int) -> str:
    """Identifies the order up to and including a phase: later phases may still be edited."""
    history = [(entry.from_tokens, entry.weights) for entry in phases[: phase + 1]]
    return hashlib.sha256(json.dumps(history).encode()).hexdigest()


def schedule(
    phases: Sequence[Phase], state: DataState, num_samples: int
) -> tuple[list[Draw], DataState]:
    """The next samples of the order and the state after them.

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
    """ConfigError, saying which knob, if `state` was not made with these phases and numbers."""
    assert state.split == split, f"a state of the {state.split} split given to {split}"
    for name, value in (("sequence_length", sequence_length), ("seed", seed)):
        before = getattr(state, name)
        if before != value:
            raise ConfigError(
                f"train.{name}={value}: the checkpoint's data position was made with {before}; "
                "set it back or start a new run"
            )
    known = {source for phase in phases for source, _ in phase.weights}
    gone = sorted(set(state.drawn) - known)
    here = fingerprint(phases, state.phase) if state.phase < len(phases) else "none"
    if gone or here != state.fingerprint:
        what = f"; source {gone[0]} is gone" if gone else ""
        raise ConfigError(
            f"{knob}: the checkpoint was made with other data or another blend (fingerprint "
            f"{state.fingerprint[:16]}, now {here[:16]}{what}); restore the files and the phases "
            "up to here, or start a new run"
        )
    later = phases[state.phase + 1 :]
    if later and state.samples and later[0].from_tokens <= state.tokens - sequence_length:
        raise ConfigError(
            f"{knob}[{state.phase + 1}].from_tokens={later[0].from_tokens}: the checkpoint has "
            f"already taken {state.tokens} tokens; a new phase must begin later"
        )
