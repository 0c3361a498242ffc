"""Training's forward pass, chunked prefill, token-by-token decoding and speculative verification
give the same log-probabilities, position by position, under every plan.

Bounds: largest difference of the log-probability of any token of the vocabulary at any position, on
an untrained small model whose logits differ by nats. In FP32 only the order of sums differs. In
BF16 a difference in the last bit changes the rounding, and a router may then choose another expert.
Training here scales NVFP4's activations token by token, as generation does. Transformer Engine's
single scale for all tokens of a call gives other results (the second test).

Not covered: GPUs, native kernels, trained weights (benchmarks/generation.py).
"""

from typing import Any

import pytest
import torch

from nemotron_train.model.decode_state import DecodeStates

FP32_BOUND = 1e-5
BOUNDS = {
    "fp32": FP32_BOUND,
    "bf16": 0.1,
    "mxfp8": 0.1,
    "nvfp4_nemotron3": 0.1,
    "nvfp4_all": 0.1,
    "nvfp4_bf16_forward": 0.1,
}
LENGTH, ROWS = 45, 2


def tokens() -> torch.Tensor:
    return torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def training_forward(model: Any) -> torch.Tensor:
    return torch.log_softmax(model(tokens()).float(), dim=-1)


@torch.inference_mode()
def in_passes(model: Any, sizes: list[int], speculative: bool = False) -> torch.Tensor:
    """Log-probabilities from decode calls of these sizes, in turn. With `speculative`, each call is
    rewound by a varying number of tokens, but never its first."""
    states, found, start, turn = DecodeStates(ROWS), [], 0, 0
    while start < LENGTH:
        part = tokens()[:, start : start + sizes[turn % len(sizes)]]
        counts = [part.shape[1]] * ROWS
        new = states.next_batch(counts, part.device, speculative)
        logits = model.logits(model.decode(part.flatten(), new))
        found.append(torch.log_softmax(logits, dim=-1).view(ROWS, part.shape[1], -1))
        kept = part.shape[1]
        if speculative:
            kept = 1 + turn % part.shape[1]
            states.rewind([kept] * ROWS)
            found[-1] = found[-1][:, :kept]
        start, turn = start + kept, turn + 1
    return torch.cat(found, dim=1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("plan", BOUNDS)
def test_every_way_gives_the_same_probabilities(plan: str, groups: Any, build: Any) -> None:
    model = build(groups, f"precision={plan}")
    truth = training_forward(model)
    ways = {
        "whole prompt": in_passes(model, [LENGTH + 5]),
        "chunks": in_passes(model, [32, 7]),
        "token by token": in_passes(model, [1]),
        "verification": in_passes(model, [3], speculative=True),
    }
    found = {way: difference(values, truth) for way, values in ways.items()}
    assert max(found.values()) <= BOUNDS[plan], found


@pytest.mark.parametrize("plan", ["bf16", "nvfp4_all"])
def test_a_token_does_not_feel_the_others_of_its_pass(plan: str, groups: Any, build: Any) -> None:
    """The second row's tokens change. A thousandfold outlier among them would change a shared
    scale. With a scale per token, the first row's probabilities do not change; without one, they do
    under NVFP4."""
    moved = {}
    for apart in (True, False):
        model = build(groups, f"precision={plan}", tokens_apart=apart)
        with torch.no_grad():
            model.embedding.word_embeddings.weight[0] *= 1000
        found = []
        for other in (1, 0):
            both = tokens()
            both[1] = other
            both[0].clamp_(min=1)
            with torch.inference_mode():
                found.append(model(both)[0].float())
        moved[apart] = difference(*found)
    assert moved[True] == 0
    assert (moved[False] > 0.1) == (plan == "nvfp4_all")


def test_training_can_compute_it_too(groups: Any, build: Any) -> None:
    """Gradients flow through products with one scale per token. They equal the gradients with
    shared scales up to the rounding of activations, so reinforcement learning may train on these
    probabilities."""
    gradients = {}
    for apart in (True, False):
        model = build(groups, "precision=nvfp4_all", tokens_apart=apart)
        logits = model(tokens())
        torch.log_softmax(logits.float(), dim=-1)[..., 7].sum().backward()
        weight = model.decoder.layers[0].mixer.in_proj.weight
        gradients[apart] = weight.grad.float().flatten()
    cosine = torch.nn.functional.cosine_similarity(gradients[True], gradients[False], dim=0)
    assert 0.5 < cosine.item() < 1.0


def test_a_long_context_grows_the_cache_and_nothing_else(groups: Any, build: Any) -> None:
    model = build(groups)
    states = DecodeStates(1)
    sizes = []
    with torch.inference_mode():
        for _ in range(3):
            new = states.next_batch([100], torch.device("cpu"))
            model.decode(torch.arange(100), new)
            mamba = [t.numel() for state in states.mamba.values() for t in state.tensors]
            sizes.append((states.constant_bytes, states.bytes_per_token, mamba))
    assert sizes[0] == sizes[1] == sizes[2]
    # One attention layer: two key/value heads of 16, FP32. Three Mamba-2 layers: a state of
    # 4 x 16 x 16 in FP32 and three inputs of 64 + 2 x 32 channels.
    assert states.bytes_per_token == 2 * 2 * 16 * 4
    assert states.constant_bytes == 3 * 4 * (4 * 16 * 16 + 3 * (64 + 2 * 32))
