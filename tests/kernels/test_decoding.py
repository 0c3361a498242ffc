"""The C kernels of decoding against the equivalent modules.

The modules' own tests compare the modules with definitions in float64.
tests/generate/test_one_truth.py compares generation, with either implementation, with training's
forward pass. Here the same layers and tokens run both ways, over shapes that fill no vector and no
block, ragged sequences, caches longer than a piece, and calls that are rewound. Any number of
threads and of tokens in a call must give the same bits. The tests also check which layers use the
modules. Tolerances: both compute in FP32 and differ by the order of sums; under BF16 a result may
round to its neighbour. Not covered: code for another processor or from another compiler.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemotron_train.assemble.build import build_model
from nemotron_train.compose.compose import compose_config
from nemotron_train.kernels import decoding as decoding_kernels
from nemotron_train.kernels import library
from nemotron_train.model.decode_state import DecodeStates
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device
from tests.conftest import SMALL_RUN

SMALL = [knob for knob in SMALL_RUN if knob.startswith("model.")]
SHAPES = {
    "as it comes": [],
    "fills no vector": [
        "model.hidden_size=52",
        "model.vocab_size=500",
        "model.attention.heads=9",
        "model.attention.key_value_heads=3",
        "model.attention.head_dim=20",
        "model.mamba.heads=6",
        "model.mamba.head_dim=11",
        "model.mamba.state_size=19",
        "model.mamba.groups=3",
        "model.moe.experts=7",
        "model.moe.experts_per_token=3",
        "model.moe.expert_hidden_size=21",
        "model.moe.shared_expert_hidden_size=37",
        "model.moe.latent_size=18",
    ],
    "no latent, no shared expert": [
        "model.moe.latent_size=0",
        "model.moe.shared_expert_hidden_size=0",
    ],
    "one key for all heads, dt limited": [
        "model.attention.key_value_heads=1",
        "model.mamba.groups=1",
        "model.mamba.dt_limit_min=0.02",
        "model.mamba.dt_limit_max=0.05",
    ],
    "a key for each head": ["model.attention.key_value_heads=4", "model.mamba.groups=4"],
}

COMPILED = {"mamba_decoding", "moe_decoding", "attention_decoding"}

pytestmark = pytest.mark.skipif(not library.supports(torch.zeros(1)), reason="no C compiler here")


def build(groups: Any, *overrides: str) -> Any:
    """An untrained model with the uneven router biases of a trained one: they take part in the
    choice of experts, not in their weights."""
    config = compose_config([*SMALL, "model.init_std=0.1", *overrides])
    model = build_model(config, resolve_plan(config), device.prepare(), groups).eval()
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            biases: Any = module.expert_bias
            biases.copy_(torch.linspace(-0.2, 0.2, len(biases)))
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C kernels that a test has run."""
    names: list[str] = []
    run = library.Kernel.__call__

    def listed(kernel: library.Kernel, *arguments: object) -> None:
        if kernel.name in COMPILED or kernel.name == "norm_rows":
            names.append(kernel.name)
        run(kernel, *arguments)

    monkeypatch.setattr(library.Kernel, "__call__", listed)
    return names


def by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_kernels, "accepts_tokens", lambda *_: False)


# Per decode call: tokens of each of three sequences, and how many of them are kept (None: all).
PASSES: list[tuple[list[int], list[int] | None]] = [
    ([270, 3, 31], None),  # modules both ways (too many tokens); longer than a piece of the cache
    ([1, 1, 1], None),
    ([9, 1, 4], None),
    ([3, 3, 3], [0, 3, 2]),
    ([1, 1, 1], None),
    ([0, 2, 5], [0, 1, 5]),
    ([2, 1, 1], None),
]


@torch.inference_mode()
def decode(model: Any, vocab_size: int = 500) -> Iterator[torch.Tensor]:
    """The result of each decode call, then the final states."""
    draw = torch.Generator().manual_seed(0)
    states = DecodeStates(3)
    for counts, kept in PASSES:
        tokens_T = torch.randint(0, vocab_size, (sum(counts),), generator=draw)
        new = states.next_batch(counts, torch.device("cpu"), speculative=kept is not None)
        yield model.decode(tokens_T, new)
        if kept is not None:
            states.rewind(kept)
    for state in states.mamba.values():
        yield from state.tensors
    for cache in states.attention.values():
        for row, length in enumerate(states.lengths):
            yield cache.keys_BGLD[row, :, :length]
            yield cache.values_BGLD[row, :, :length]


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_modules(
    shape: str, groups: object, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP32, over several calls: the effect of a wrong state would accumulate."""
    model = build(groups, *SHAPES[shape])
    ours = list(decode(model))
    assert {*COMPILED, "norm_rows"} == set(runs)
    count = len(runs)
    by_modules(monkeypatch)
    for one, other in zip(ours, decode(model), strict=True):
        bound = 1e-5 * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, atol=bound, rtol=0)
    assert {"norm_rows"} == set(runs[count:]), "the other way went through the modules"


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_in_bfloat16(shape: str, groups: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, since rounding to a neighbour in one layer may change the expert choice in
    the next. Each layer's contribution to the residual stream is compared at its own magnitude."""
    model = build(groups, "precision=bf16", *SHAPES[shape])
    draw = torch.Generator().manual_seed(1)
    width = model.config.hidden_size
    for layer in model.decoder.layers:
        results: list[list[torch.Tensor]] = []
        hidden = [torch.randn(n, 1, width, generator=draw).bfloat16() for n in (6, 9)]
        for compiled in (True, False):
            with monkeypatch.context() as patch, torch.inference_mode():
                if not compiled:
                    by_modules(patch)
                states, found = DecodeStates(3), []
                for x, counts in zip(hidden, ([1, 2, 3], [3, 3, 3]), strict=True):
                    new = states.next_batch(counts, torch.device("cpu"), counts == [3, 3, 3])
                    out = layer(hidden_states=x, attention_mask=None, packed_seq_params=new)
                    out = out[0] if isinstance(out, tuple) else out
                    found.append(out.float() - x.float())
                results.append(found)
        for one, other in zip(*results, strict=True):
            # Rounded twice: the layer's result, and its sum with values of magnitude about three.
            bound = 2.0**-6 * (4.0 + float(other.abs().max()))
            torch.testing.assert_close(one, other, atol=bound, rtol=0)
            assert (one - other).abs().mean() < 2.0**-10 * (1.0 + float(other.abs().mean()))


def test_no_number_of_threads_or_tokens_moves_a_bit(groups: object) -> None:
    model = build(groups, *SHAPES["fills no vector"])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = list(decode(model))
        torch.set_num_threads(3)
        for one, other in zip(alone, decode(model), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)
    tokens, where = torch.arange(12), torch.device("cpu")
    with torch.inference_mode():
        together, apart = DecodeStates(1), DecodeStates(1)
        whole = model.decode(tokens, together.next_batch([12], where))
        for start, count in ((0, 1), (1, 3), (4, 8)):
            new = apart.next_batch([count], where)
            part = model.decode(tokens[start : start + count], new)
            assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize(
    "precision", ["nvfp4_nemotron3", "nvfp4_all", "mxfp8", "nvfp4_bf16_forward"]
)
def test_plans_with_block_formats_go_through_the_modules(
    precision: str, groups: object, runs: list[str]
) -> None:
    model = build(groups, f"precision={precision}")
    for _ in decode(model):
        pass
    assert set(runs) <= {"norm_rows"}


def test_many_tokens_and_gradients_are_not_taken() -> None:
    """A residual stream of another dtype than the weights is not taken either."""
    x = weight = torch.zeros(1)
    with torch.no_grad():
        assert decoding_kernels.accepts_tokens(32, x, weight)
        assert not decoding_kernels.accepts_tokens(33, x, weight)
        assert not decoding_kernels.accepts_tokens(32, x.bfloat16(), weight)
    assert not decoding_kernels.accepts_tokens(32, x, weight)


def test_few_rows_in_bfloat16() -> None:
    draw = torch.Generator().manual_seed(2)
    for rows, width, outputs in ((1, 64, 50), (3, 37, 5), (6, 200, 64)):
        x, w = (torch.randn(n, width, generator=draw).bfloat16() for n in (rows, outputs))
        wanted = x.double() @ w.double().t()
        found = decoding_kernels.few_rows(x, w)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=2.0**-8)
