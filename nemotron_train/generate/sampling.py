"""From logits to tokens: the distribution that is sampled, draws that belong to a sequence, and the
acceptance of drafted tokens.

Owns: the order of temperature, top-k and top-p, and speculative sampling's rule (arXiv 2211.17192,
algorithm 1; arXiv 2302.01318, algorithm 2). Does not own: where logits come from, when to stop.

Shapes: B sequences, V vocabulary, k drafted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_train.generate.knobs import Sampling


class Draws:
    """Uniform numbers in [0, 1) of one sequence: Philox keyed by seed and the sequence's number, so
    they depend neither on the batch nor on what other sequences draw."""

    def __init__(self, seed: int, sequence: int) -> None:
        key = np.array([seed, sequence], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def next(self) -> float:
        return self._generator.random()


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """FP64 probabilities [..., V] of what is sampled from FP32 logits [..., V]; greedy: all on the
    largest logit, the first of equals."""
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(-1, best, 1.0)
    logits = logits.double() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it fall short of top_p: the first always does.
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """One token a row, int64 [B], by inverting the cumulated probabilities; a row of weights that
    do not sum to 1 is taken relative to its sum."""
    cumulated_BV = probabilities_BV.cumsum(-1)
    uniform = torch.tensor(uniform_B, dtype=torch.float64, device=probabilities_BV.device)
    wanted_B1 = uniform.unsqueeze(1) * cumulated_BV[:, -1:]
    # The first token whose cumulated probability exceeds the number has a probability above 0.
    tokens_B = torch.searchsorted(cumulated_BV, wanted_B1, right=True).squeeze(1)
    return tokens_B.clamp_(max=probabilities_BV.shape[1] - 1)


def choose(logits_BV: Tensor, sampling: Sampling, draws: Sequence[Draws]) -> Tensor:
    """One token a row, int64 [B]: drawn from `distribution`, or the most probable one."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    return draw(distribution(logits_BV, sampling), [own.next() for own in draws])


@dataclass(frozen=True)
class Verdict:
    """Of one round: how many drafted tokens each sequence accepts, and the token that follows
    them."""

    accepted: list[int]
    following: list[int]


def judge(
    model_BkV: Tensor, drafted_BkV: Tensor, tokens_Bk: Tensor, draws: Sequence[Draws]
) -> Verdict:
    """Accept drafted token i with probability min(1, p_i / q_i), stop at the first refusal and draw
    what follows from max(p - q, 0), or from p where all were accepted.

    model_BkV: p, [B,k+1,V], after each drafted token too; drafted_BkV: q, [B,k,V], both as
    `distribution` gives them. What comes out is distributed as p, whatever q is.
    """
    num_drafted = tokens_Bk.shape[1]
    chosen = tokens_Bk.unsqueeze(-1)
    p_Bk = model_BkV[:, :num_drafted].gather(-1, chosen).squeeze(-1).tolist()
    q_Bk = drafted_BkV.gather(-1, chosen).squeeze(-1).tolist()
    accepted = []
    for p_k, q_k, own in zip(p_Bk, q_Bk, draws, strict=True):
        count = 0
        while count < num_drafted and own.next() * q_k[count] < p_k[count]:
            count += 1
        accepted.append(count)
    rows_B = torch.arange(len(accepted), device=model_BkV.device)
    places_B = torch.tensor(accepted, device=model_BkV.device)
    next_BV = model_BkV[rows_B, places_B]
    refused = places_B < num_drafted
    if num_drafted and bool(refused.any()):
        refuted_BV = drafted_BkV[rows_B, places_B.clamp(max=num_drafted - 1)]
        left_BV = (next_BV - refuted_BV).clamp_(min=0)
        # Nothing is left only where rounding made p and q equal: p itself then.
        is_left = refused & (left_BV.sum(-1) > 0)
        next_BV = torch.where(is_left.unsqueeze(1), left_BV, next_BV)
    following = draw(next_BV, [own.next() for own in draws])
    return Verdict(accepted, following.tolist())


def judge_greedily(logits_BnV: Tensor, tokens_Bk: Tensor) -> Verdict:
    """`judge` where all probability lies on the largest logit: drafts are accepted as long as they
    are what decoding would have chosen. logits_BnV: after each drafted token too, n = k + 1."""
    best, drafted = logits_BnV.argmax(-1).tolist(), tokens_Bk.tolist()
    accepted = [
        next((i for i, (a, b) in enumerate(zip(own, row, strict=False)) if a != b), len(row))
        for own, row in zip(best, drafted, strict=True)
    ]
    return Verdict(accepted, [own[count] for own, count in zip(best, accepted, strict=True)])
