"""Metrics of the rollouts of a step. No torch but for the merging over ranks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from nemotron_train.posttrain.environments.protocol import EndedBy
from nemotron_train.posttrain.rollout import SAMPLED, Rollout
from nemotron_train.posttrain.sandbox.verdict import Verdict

_ANSWERED = (Verdict.passed, Verdict.failed)
# How metrics of several ranks become one, by the end of their name; others: a weighted mean.
_LARGEST, _SMALLEST, _TOTAL = "_max", "_min", "_sum"


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over rollouts, by name; reward/NAME and pass/NAME for each environment."""
    sampled = [rollout.kinds.count(SAMPLED) for rollout in rollouts]
    metrics = {
        "pass": _mean([rollout.passed for rollout in rollouts]),
        "response_tokens_mean": _mean(sampled),
        "response_tokens_max": max(sampled, default=0),
        "thinking_tokens": _mean([rollout.thinking_tokens for rollout in rollouts]),
        "answer_tokens": _mean([rollout.answer_tokens for rollout in rollouts]),
        "truncated": _mean([rollout.cut for rollout in rollouts]),
        "malformed": _mean([bool(r.episode.last.fault) and not r.cut for r in rollouts]),
        "invalid_calls": _mean([rollout.malformed_calls > 0 for rollout in rollouts]),
        "forced_closes": _mean([rollout.forced_closes > 0 for rollout in rollouts]),
        "turns": _mean([rollout.turns for rollout in rollouts]),
        "turns_reached": _mean([r.episode.ended_by == EndedBy.turns for r in rollouts]),
        "timeouts": _mean([rollout.score.verdict == Verdict.timeout for rollout in rollouts]),
        "errors": _mean([rollout.score.verdict not in _ANSWERED for rollout in rollouts]),
    }
    for name in sorted({rollout.row.environment for rollout in rollouts}):
        some = [rollout for rollout in rollouts if rollout.row.environment == name]
        metrics[f"reward/{name}"] = _mean([rollout.reward for rollout in some])
        metrics[f"pass/{name}"] = _mean([rollout.passed for rollout in some])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def merged(metrics: dict[str, float], count: int, group: Any) -> dict[str, float]:
    """Metrics of all ranks: means weighted by `count`, largest, smallest or sum by the end of the
    name. Numbers that are NaN on a rank do not count. COLLECTIVE."""
    if group.size() == 1:
        return metrics
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, (metrics, count), group=group)
    names = dict.fromkeys(name for part, _ in parts for name in part)
    result = {}
    for name in names:
        found = [
            (part[name], weight)
            for part, weight in parts
            if name in part and weight and not math.isnan(part[name])
        ]
        values = [value for value, _ in found]
        if not found:
            result[name] = math.nan
        elif name.endswith(_LARGEST):
            result[name] = max(values)
        elif name.endswith(_SMALLEST):
            result[name] = min(values)
        elif name.endswith(_TOTAL):
            result[name] = math.fsum(values)
        else:
            total = sum(weight for _, weight in found)
            result[name] = math.fsum(value * weight for value, weight in found) / total
    return result
