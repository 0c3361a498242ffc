"""Compares two sets of shards of the same global tensors, by tensor and by module. NumPy only.

The reference comes from one rank, so its tensors are complete. Every shard of every rank is
compared with its slice of the reference. Replicas are compared too, because any single replica may
be the wrong one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shard:
    """The part `values` of the global tensor `name` that starts at `offset`."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: np.ndarray
    rank: int = 0


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the reference.

    relative: RMS difference of the worst shard, which is on `rank`, divided by the RMS of the whole
    reference tensor.
    """

    name: str
    relative: float
    rank: int
    note: str = ""  # another problem: unknown name, wrong shape, missing shards


@dataclass(frozen=True)
class ModuleDifference:
    """The worst tensor of a module for each kind of comparison."""

    module: str
    worst: dict[str, Difference]

    @property
    def relative(self) -> float:
        """The largest relative difference over all kinds of comparison."""
        return max(difference.relative for difference in self.worst.values())


def assemble(shards: Iterable[Shard]) -> dict[str, np.ndarray]:
    """Complete FP32 tensors by name, from the shards of all ranks.

    A later replica overwrites an earlier one. Elements that no shard covers are NaN.
    """
    whole: dict[str, np.ndarray] = {}
    for shard in shards:
        tensor = whole.setdefault(shard.name, np.full(shard.global_shape, np.nan, np.float32))
        tensor[_slices(shard)] = shard.values
    return whole


def differences(
    reference: Sequence[Shard], shards: Sequence[Shard], base: Sequence[Shard] = ()
) -> dict[str, Difference]:
    """Compare `shards` with `reference` and return the worst difference of each tensor by name.

    A tensor that only one side has, or whose shapes differ, gets an infinite difference.

    base: reference shards from before training. If given, differences are relative to the RMS of
    `reference - base` (the update) instead of the RMS of the weights.
    """
    whole, start = assemble(reference), assemble(base)
    results: dict[str, Difference] = {}
    covered: dict[str, np.ndarray] = {}
    for shard in shards:
        if shard.name not in whole:
            results[shard.name] = Difference(shard.name, np.inf, shard.rank, "not on one rank")
            continue
        expected = whole[shard.name]
        if expected.shape != shard.global_shape:
            note = f"{shard.global_shape}, on one rank {expected.shape}"
            results[shard.name] = Difference(shard.name, np.inf, shard.rank, note)
            continue
        covered.setdefault(shard.name, np.zeros(expected.shape, bool))[_slices(shard)] = True
        change = expected - start[shard.name] if shard.name in start else expected
        relative = _relative(shard.values, expected[_slices(shard)], change)
        previous = results.get(shard.name)
        if previous is None or relative > previous.relative:
            results[shard.name] = Difference(shard.name, relative, shard.rank)
    for name, expected in whole.items():
        if name not in covered:
            results.setdefault(name, Difference(name, np.inf, 0, "on no rank"))
        elif not covered[name].all() and expected.size:
            results[name] = Difference(name, np.inf, 0, "in part on no rank")
    return results


def _slices(shard: Shard) -> tuple[slice, ...]:
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


# The suffix after the module path in a tensor name: "weight", or a part of a packed tensor
# ("weight.z").
_TENSOR = re.compile(r"\.[^.]+?(\.[zxBCt])?$")


def module_of(name: str) -> str:
    """The path of the module that owns the tensor `name`."""
    return _TENSOR.sub("", name)


def by_module(kinds: dict[str, dict[str, Difference]]) -> list[ModuleDifference]:
    """The worst tensor of each module for each kind of comparison, the worst module first.

    kinds: kind of comparison -> result of `differences`.
    """
    modules: dict[str, dict[str, Difference]] = defaultdict(dict)
    for kind, results in kinds.items():
        for name, difference in results.items():
            worst = modules[module_of(name)]
            if kind not in worst or difference.relative > worst[kind].relative:
                worst[kind] = difference
    rows = [ModuleDifference(module, worst) for module, worst in modules.items()]
    return sorted(rows, key=lambda row: -row.relative)


def depth(path: str) -> tuple[int, int]:
    """Sort key of a module in forward order: (part of the model, layer)."""
    parts = ("embedding", "decoder.layers", "decoder", "mtp", "output_layer")
    part = next(
        (index for index, prefix in enumerate(parts) if path.startswith(prefix)), len(parts)
    )
    numbers = re.findall(r"\.layers\.(\d+)", path)
    return part, int(numbers[-1]) if numbers else 0
