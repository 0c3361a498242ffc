"""From logits to tokens: the sampling distribution, random draws per sequence, draft acceptance.

Owns: the order of temperature, top-k and top-p, and the acceptance rule of speculative sampling
(arXiv 2211.17192, algorithm 1; arXiv 2302.01318, algorithm 2). Does not own: computing logits, when
a sequence ends.

Coupled sampling draws a token as the argmax of log p + g, where g is Gumbel noise that belongs to
the token's position in its sequence. A draft and the token that verifies it use the same noise, and
the draft is accepted if they are the same token. So the text is that of decoding without drafts,
whatever the drafts are. A draft from q is accepted with probability (1 - TV) / (1 + TV) at least,
where TV is the total variation distance of p and q (arXiv 2408.07978). The rule above accepts with
probability 1 - TV.

Shapes: B sequences, V vocabulary, k drafted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_train.generate.knobs import Sampling


class Draws:
    """Random numbers for one sequence. Philox is keyed by the seed and the sequence's number, so
    the draws depend neither on the batch nor on other sequences.

    position: number of tokens that the sequence has got so far, which `gumbel` counts from.
    """

    def __init__(self, seed: int, sequence: int) -> None:
        self._key = np.array([seed, sequence], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=self._key))
        self.position = 0

    def gumbel(self, offset: int, count: int) -> np.ndarray:
        """Standard Gumbel noise of the token `offset` places after `position`, FP64 [count]."""
        # A counter far from those that `next` uses.
        counter = np.array([0, 0, self.position + offset, 1], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        return -np.log(generator.standard_exponential(count))

    def next(self) -> float:
        """The next number."""
        return self._generator.random()


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """FP64 sampling probabilities [..., V] from FP32 logits [..., V].

    With temperature 0, the largest logit (the first of equal ones) has probability 1.
    """
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
        # Keep a token if the larger probabilities sum to less than top_p. The first always stays.
        preceding = ordered.cumsum(-1) - ordered
        nucleus = ordered.masked_fill(preceding >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, nucleus)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities_BV: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """Draw one token per row, int64 [B], by inverse transform sampling.

    A row may hold unnormalized weights. uniform_B: one number in [0, 1) per row.
    """
    cumulated_BV = probabilities_BV.cumsum(-1)
    uniform = torch.tensor(uniform_B, dtype=torch.float64, device=probabilities_BV.device)
    target_B1 = uniform.unsqueeze(1) * cumulated_BV[:, -1:]
    # right=True finds the first token whose cumulated probability exceeds the target. Its own
    # probability is above 0.
    tokens_B = torch.searchsorted(cumulated_BV, target_B1, right=True).squeeze(1)
    return tokens_B.clamp_(max=probabilities_BV.shape[1] - 1)


def perturbed(
    logits_BV: Tensor, sampling: Sampling, draws: Sequence[Draws], offset: int = 0
) -> Tensor:
    """log p + Gumbel noise, FP64 [B,V]. Its argmax is a draw from p = `distribution`."""
    noise = np.stack([row.gumbel(offset, logits_BV.shape[-1]) for row in draws])
    return distribution(logits_BV, sampling).log() + torch.from_numpy(noise).to(logits_BV.device)


def choose(
    logits_BV: Tensor, sampling: Sampling, draws: Sequence[Draws], offset: int = 0
) -> Tensor:
    """One token per row, int64 [B]: drawn from `distribution`, or the argmax if greedy.

    offset: of the token's position from the sequence's next one, for drafts.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    if sampling.coupled:
        return perturbed(logits_BV, sampling, draws, offset).argmax(-1)
    return draw(distribution(logits_BV, sampling), [row_draws.next() for row_draws in draws])


@dataclass(frozen=True)
class Verdict:
    """Result of one round: the number of accepted drafts of each sequence, and the token after
    them."""

    accepted: list[int]
    following: list[int]


def judge(
    model_BkV: Tensor, drafted_BkV: Tensor, tokens_Bk: Tensor, draws: Sequence[Draws]
) -> Verdict:
    """Accept drafted token i with probability min(1, p_i / q_i), up to the first rejection.

    Then draw the next token from max(p - q, 0), or from p if all drafts were accepted.

    model_BkV: p, [B,k+1,V], before the first and after each drafted token. drafted_BkV: q, [B,k,V].
    Both come from `distribution`. The resulting tokens are distributed as p for any q.
    """
    num_drafted = tokens_Bk.shape[1]
    chosen = tokens_Bk.unsqueeze(-1)
    p_Bk = model_BkV[:, :num_drafted].gather(-1, chosen).squeeze(-1).tolist()
    q_Bk = drafted_BkV.gather(-1, chosen).squeeze(-1).tolist()
    accepted = []
    for p_k, q_k, row_draws in zip(p_Bk, q_Bk, draws, strict=True):
        count = 0
        while count < num_drafted and row_draws.next() * q_k[count] < p_k[count]:
            count += 1
        accepted.append(count)
    rows_B = torch.arange(len(accepted), device=model_BkV.device)
    places_B = torch.tensor(accepted, device=model_BkV.device)
    next_BV = model_BkV[rows_B, places_B]
    refused = places_B < num_drafted
    if num_drafted and bool(refused.any()):
        refused_BV = drafted_BkV[rows_B, places_B.clamp(max=num_drafted - 1)]
        residual_BV = (next_BV - refused_BV).clamp_(min=0)
        # The residual is zero only if p and q are equal after rounding; then draw from p.
        has_residual = refused & (residual_BV.sum(-1) > 0)
        next_BV = torch.where(has_residual.unsqueeze(1), residual_BV, next_BV)
    following = draw(next_BV, [row_draws.next() for row_draws in draws])
    return Verdict(accepted, following.tolist())


def judge_greedily(logits_BnV: Tensor, tokens_Bk: Tensor) -> Verdict:
    """`judge` for greedy decoding: accept drafts as long as they are the most probable token.

    logits_BnV: before the first and after each drafted token, n = k + 1.
    """
    best, drafted = logits_BnV.argmax(-1).tolist(), tokens_Bk.tolist()
    accepted = [
        next(
            (i for i, (a, b) in enumerate(zip(best_n, drafted_k, strict=False)) if a != b),
            len(drafted_k),
        )
        for best_n, drafted_k in zip(best, drafted, strict=True)
    ]
    return Verdict(accepted, [best_n[count] for best_n, count in zip(best, accepted, strict=True)])
