"""Two sets of shards of the same global tensors: how far apart, and in which modules. NumPy only.

The reference is whole (one rank). Every shard of every rank is held against its place in it,
replicas too: one rank of a group that should agree may be the one that is wrong.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shard:
    """`values` is the part of the global tensor `name` that begins at `offset`."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: np.ndarray
    rank: int = 0


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the reference: the worst shard's root mean square difference over
    the root mean square of the whole reference, on `rank`."""

    name: str
    relative: float
    rank: int
    note: str = ""  # what else is wrong with it: missing, covered in part, not a number


@dataclass(frozen=True)
class ModuleDifference:
    """The worst tensor of a module, of each kind of comparison."""

    module: str
    worst: dict[str, Difference]

    @property
    def relative(self) -> float:
        return max(difference.relative for difference in self.worst.values())


def assembled(shards: Iterable[Shard]) -> dict[str, np.ndarray]:
    """Whole tensors by name, from the shards of all ranks (replicas written over each other)."""
    whole: dict[str, np.ndarray] = {}
    for shard in shards:
        tensor = whole.setdefault(shard.name, np.full(shard.global_shape, np.nan, np.float32))
        tensor[_place(shard)] = shard.values
    return whole


def differences(
    reference: Sequence[Shard], shards: Sequence[Shard], base: Sequence[Shard] = ()
) -> dict[str, Difference]:
    """Every tensor of `reference` against `shards`, by name; a name of one side only differs.

    base: shards of the reference subtracted first, to measure differences against what a step
    changed instead of against the weights.
    """
    whole, start = assembled(reference), assembled(base)
    found: dict[str, Difference] = {}
    covered: dict[str, np.ndarray] = {}
    for shard in shards:
        if shard.name not in whole:
            found[shard.name] = Difference(shard.name, np.inf, shard.rank, "not on one rank")
            continue
        expected = whole[shard.name]
        if expected.shape != shard.global_shape:
            note = f"{shard.global_shape}, on one rank {expected.shape}"
            found[shard.name] = Difference(shard.name, np.inf, shard.rank, note)
            continue
        covered.setdefault(shard.name, np.zeros(expected.shape, bool))[_place(shard)] = True
        change = expected - start[shard.name] if shard.name in start else expected
        relative = _relative(shard.values, expected[_place(shard)], change)
        before = found.get(shard.name)
        if before is None or relative > before.relative:
            found[shard.name] = Difference(shard.name, relative, shard.rank)
    for name, expected in whole.items():
        if name not in covered:
            found.setdefault(name, Difference(name, np.inf, 0, "on no rank"))
        elif not covered[name].all() and expected.size:
            found[name] = Difference(name, np.inf, 0, "in part on no rank")
    return found


def _place(shard: Shard) -> tuple[slice, ...]:
    return tuple(
        slice(start, start + size)
        for start, size in zip(shard.offset, shard.values.shape, strict=True)
    )


def _relative(ours: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> float:
    difference = np.sqrt(np.mean(np.square(ours.astype(np.float64) - expected)))
    if not np.isfinite(difference):
        return float("inf")
    size = np.sqrt(np.mean(np.square(scale, dtype=np.float64)))
    return float(difference / size) if size > 0 else (float("inf") if difference > 0 else 0.0)


# What follows a module's path in a tensor's name: "weight", a packed tensor's part ("weight.z").
_TENSOR = re.compile(r"\.[^.]+?(\.[zxBCt])?$")


def module_of(name: str) -> str:
    """The path of the module that owns the tensor called `name`."""
    return _TENSOR.sub("", name)


def by_module(kinds: dict[str, dict[str, Difference]]) -> list[ModuleDifference]:
    """The worst tensor of every module in each kind of comparison, the worst module first."""
    modules: dict[str, dict[str, Difference]] = defaultdict(dict)
    for kind, found in kinds.items():
        for name, difference in found.items():
            worst = modules[module_of(name)]
            if kind not in worst or difference.relative > worst[kind].relative:
                worst[kind] = difference
    rows = [ModuleDifference(module, worst) for module, worst in modules.items()]
    return sorted(rows, key=lambda row: -row.relative)


def depth(path: str) -> tuple[int, int]:
    """Where a module stands in the order of the forward pass: (part of the model, layer)."""
    parts = ("embedding", "decoder.layers", "decoder", "mtp", "output_layer")
    part = next((n for n, prefix in enumerate(parts) if path.startswith(prefix)), len(parts))
    numbers = re.findall(r"\.layers\.(\d+)", path)
    return part, int(numbers[-1]) if numbers else 0
