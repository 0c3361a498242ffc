"""Log-probabilities of drawn tokens, under the distribution that they were drawn from.

Second truth: a softmax in NumPy's float64, over the logits of one forward pass of the whole
sequence. Not covered here: several ranks, formats of low precision.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_train.generate.continuation import Answer
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling

KNOBS = DecodingKnobs(max_new_tokens=8, batch=4)
KNOWN = range(7, 480)
BOUND = 1e-5


@pytest.fixture(scope="module")
def model(groups: Any, build: Any) -> Any:
    return build(groups)


def drawn_from(logits_V: np.ndarray, sampling: Sampling, known: Any) -> np.ndarray:
    """The probabilities, from float64 logits."""
    allowed_V = np.full(logits_V.shape, known is None)
    if known is not None:
        allowed_V[list(known)] = True
    scaled_V = np.where(allowed_V, logits_V / sampling.temperature, -np.inf)
    order = np.argsort(-scaled_V, kind="stable")
    if sampling.top_k:
        scaled_V[order[sampling.top_k :]] = -np.inf
    probabilities_V = np.exp(scaled_V - scaled_V.max())
    probabilities_V /= probabilities_V.sum()
    if sampling.top_p < 1:
        count = int(np.searchsorted(np.cumsum(probabilities_V[order]), sampling.top_p)) + 1
        probabilities_V[order[count:]] = 0
        probabilities_V /= probabilities_V.sum()
    return probabilities_V


@pytest.mark.parametrize("known", [None, KNOWN], ids=["all ids", "known ids"])
@pytest.mark.parametrize(
    "cut",
    [{}, {"top_k": 9}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.8}],
    ids=lambda cut: " ".join(cut) or "whole",
)
def test_drawn_is_a_softmax_in_float64(
    model: Any, prompts: Any, cut: dict[str, Any], known: Any
) -> None:
    """The plain log-probabilities stay those of the whole vocabulary at temperature 1."""
    sampling = Sampling(temperature=0.7, seed=3, **cut)
    sequences = Engine(model, known_ids=known).generate(prompts, sampling, KNOBS)
    for sequence in sequences:
        with torch.inference_mode():
            logits_TV = model(torch.tensor([sequence.tokens]))[0].double().numpy()
        before = len(sequence.prompt) - 1
        for place, token in enumerate(sequence.new):
            logits_V = logits_TV[before + place]
            drawn = drawn_from(logits_V, sampling, known)[token]
            assert sequence.drawn_log_probabilities[place] == pytest.approx(
                math.log(drawn), abs=BOUND
            )
            plain = drawn_from(logits_V, Sampling(), None)[token]
            assert sequence.log_probabilities[place] == pytest.approx(math.log(plain), abs=BOUND)


def test_greedy_tokens_are_certain(model: Any, prompts: Any) -> None:
    for sequence in Engine(model, known_ids=KNOWN).generate(
        prompts, Sampling(temperature=0), KNOBS
    ):
        assert sequence.drawn_log_probabilities == [0.0] * len(sequence.new)
        assert max(sequence.log_probabilities) < 0


@pytest.mark.parametrize("cut", [{}, {"top_k": 40, "top_p": 0.8}], ids=["whole", "cut"])
def test_drafts_change_no_log_probability(model: Any, prompts: Any, cut: dict[str, Any]) -> None:
    """Coupled: the same tokens, drawn with the same probabilities. Given tokens have none."""
    sampling = Sampling(temperature=0.7, seed=3, coupled=True, **cut)

    def on_token(sequence: Any, token: int) -> Answer:
        return [1, 2] if len(sequence.new) == 3 else ""

    found = [
        Engine(model, known_ids=KNOWN).generate(
            prompts, sampling, replace(KNOBS, speculative=speculative), on_token
        )
        for speculative in (False, True)
    ]
    for plain, drafted in zip(*found, strict=True):
        assert drafted.new == plain.new and drafted.given == plain.given
        assert plain.given == [place in (3, 4) for place in range(8)]
        for ours, theirs, given in zip(
            drafted.drawn_log_probabilities,
            plain.drawn_log_probabilities,
            plain.given,
            strict=True,
        ):
            assert math.isnan(ours) == math.isnan(theirs) == given
            assert given or ours == pytest.approx(theirs, abs=BOUND)
