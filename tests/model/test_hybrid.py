"""The whole model on one rank: sizes, documents, causality, losses of every head.

Second truths: the parameter formula, each document run alone, a brute-force mask, finite
properties. Other tests compare the layers with another implementation (Mamba-2 in
mamba/test_core.py, experts in moe/test_core.py). Not covered: a comparison with Hugging Face's
whole model.
"""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nemotron_train.assemble.build import build_model, count_parameters, wrap_data_parallel
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import Config
from nemotron_train.model.decode_state import DecodeStates
from nemotron_train.model.hybrid import NemotronModel
from nemotron_train.model.mtp import depth_mask
from nemotron_train.optim.build import decays
from nemotron_train.plan.architecture.layers import parameters
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device

SMALL = (
    "model.hidden_size=64",
    "model.vocab_size=128",
    "model.attention.heads=4",
    "model.attention.head_dim=16",
    "model.mamba.heads=4",
    "model.mamba.head_dim=16",
    "model.mamba.state_size=16",
    "model.mamba.chunk_size=16",
    "model.moe.experts=8",
    "model.moe.expert_hidden_size=32",
    "model.moe.shared_expert_hidden_size=64",
    "model.moe.latent_size=32",
    # Large initial weights give every layer a visible effect, so that a leak would show.
    "model.init_std=0.1",
)
NUM_ROWS, LENGTH = 2, 48


def build(groups: object, *overrides: str) -> tuple[Config, NemotronModel]:
    config = compose_config([*SMALL, *overrides])
    return config, build_model(config, resolve_plan(config), device.prepare(), groups)  # type: ignore[arg-type]


def tokens(seed: int, rows: int = NUM_ROWS, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "name",
    ["tiny", "proxy_10m", "proxy_100m", "nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b"],
)
def test_parameters_equal_the_formula(name: str, groups: object) -> None:
    """Every size is really built: small ones with weights, the others on the meta device."""
    config = compose_config([f"model={name}"])
    where = "cpu" if name in ("tiny", "proxy_10m") else "meta"
    with torch.device(where):
        model = build_model(config, resolve_plan(config), device.prepare(), groups)  # type: ignore[arg-type]
    assert count_parameters(model) == parameters(config.model).total_with_mtp


def test_every_document_of_a_row_is_alone(groups: object) -> None:
    """Logits of packed documents equal those of each document run by itself."""
    _, model = build(groups)
    model.eval()
    row = tokens(0, rows=1)
    cuts = [0, 7, 8, 31, LENGTH]
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        ids[:, start:end] = number
    with torch.no_grad():
        packed = model(row, document_ids_BS=ids)
        for start, end in itertools.pairwise(cuts):
            alone = model(row[:, start:end])
            torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)
        leaking = model(row)  # as one document, the rest of the row is visible
    assert (leaking[:, 31:] - packed[:, 31:]).abs().max() > 0.1


def test_no_token_sees_a_later_one(groups: object) -> None:
    _, model = build(groups)
    model.eval()
    row = tokens(1)
    changed = row.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 128
    with torch.no_grad():
        before, after = model(row), model(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30], rtol=1e-4, atol=1e-5)
    assert (before[:, 30:] - after[:, 30:]).abs().max() > 0.1


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_depth_mask_against_brute_force(depth: int) -> None:
    """A target of depth k counts if all of the tokens i .. i+k+1 are in one document."""
    random = np.random.default_rng(depth)
    ids_with_next = np.sort(random.integers(0, 5, (4, 21)), axis=1)
    ids = ids_with_next[:, :-1]
    mask = (ids_with_next[:, 1:] == ids).astype(np.float32)
    expected = np.zeros_like(mask)
    for row in range(4):
        for i in range(20):
            target = i + depth + 1
            inside = target <= 20 and ids_with_next[row, target] == ids[row, i]
            expected[row, i] = float(inside and i + depth < 20)
    assert np.array_equal(depth_mask(mask, ids, depth), expected)
    as_tensor = depth_mask(torch.from_numpy(mask), torch.from_numpy(ids), depth)
    assert np.array_equal(as_tensor.numpy(), expected)


def test_mtp_depths_share_one_block_and_learn_from_masked_targets_only(groups: object) -> None:
    """Two depths, one physical block. A target outside the mask has no effect on any sum."""
    config, model = build(groups)
    assert config.model.mtp.depths == 2 and len(model.mtp.layers) == 1
    row, labels = tokens(2), tokens(3)
    ids = torch.zeros_like(row)
    ids[:, 20:] = 1
    mask = torch.ones(NUM_ROWS, LENGTH)
    mask[:, 19] = 0.0
    sums = model(row, labels, mask, ids)
    assert sums.shape == (3,)
    for depth in range(3):
        targets = depth_mask(mask, ids, depth)
        # The target of depth k at i is labels[i+k]. Change every label that is no target.
        pointed = torch.zeros_like(mask)
        pointed[:, depth:] = targets[:, : LENGTH - depth]
        other = torch.where(pointed > 0, labels, (labels + 1) % 128)
        assert not torch.equal(other, labels)
        assert model(row, other, mask, ids)[depth] == sums[depth]


@torch.inference_mode()
def test_each_depth_goes_on_from_the_one_before(groups: object) -> None:
    """Depth k reads the hidden states of depth k - 1 and token i + k, and predicts labels[i + k]
    (Super report, section 2.1.2). Second truth: the steps of generation, called here one depth
    after the other, and torch's cross entropy."""
    _, model = build(groups)
    row, labels = tokens(8, rows=1), tokens(9, rows=1)
    sums = model(row, labels, torch.ones(1, LENGTH), torch.zeros_like(row))
    hidden = model.decode(row[0], DecodeStates(1).next_batch([LENGTH], row.device))
    expected = []
    for depth in range(3):
        if depth > 0:
            new = DecodeStates(1).next_batch([LENGTH - depth], row.device)
            hidden = model.decode_depth(hidden[:-1], row[0, depth:], new)
        logits = model.logits(hidden).double()
        expected.append(F.cross_entropy(logits, labels[0, depth:], reduction="sum"))
    assert len({round(float(loss), 2) for loss in expected}) == 3
    torch.testing.assert_close(sums.double(), torch.stack(expected), rtol=1e-5, atol=0)


def test_repeated_block_counts_its_load_balance_loss_once(groups: object) -> None:
    """Two depths run the block's router twice. Together they add one loss, as every other layer
    does. The sequence loss of a perfectly balanced router is 1 per token, so each sum is near the
    number of tokens."""
    _, model = build(groups, "model.init_std=0.001")
    mask, ids = torch.ones(NUM_ROWS, LENGTH), torch.zeros(NUM_ROWS, LENGTH, dtype=torch.long)
    model(tokens(6), tokens(7), mask, ids)
    sums = {
        name: float(module.load_balance_loss_sum) / (NUM_ROWS * LENGTH)
        for name, module in model.named_modules()
        if name.endswith("mlp.router")
    }
    assert len(sums) == 4 and sum("mtp" in name for name in sums) == 1
    for name, value in sums.items():
        assert value == pytest.approx(1.0, abs=0.3), name


def test_output_layer_gradient_is_accumulated_in_fp32(groups: object) -> None:
    """In BF16, main_grad holds the FP32 sum of the three heads' gradients, each rounded once.
    Adding them in BF16 first would lose the small ones."""
    config, model = build(groups, "precision=bf16")
    wrapped = wrap_data_parallel(model, config, groups)  # type: ignore[arg-type]
    row, labels = tokens(4), tokens(5)
    mask, ids = torch.ones(NUM_ROWS, LENGTH), torch.zeros(NUM_ROWS, LENGTH, dtype=torch.long)
    weight = model.output_layer.weight
    singles = []
    for head in range(3):
        scale = torch.zeros(3)
        scale[head] = (1.0, 1e-3, 1e-3)[head]
        wrapped.zero_grad_buffer()
        (wrapped(row, labels, mask, ids) * scale).sum().backward()
        singles.append(weight.main_grad.clone())
    wrapped.zero_grad_buffer()
    (wrapped(row, labels, mask, ids) * torch.tensor([1.0, 1e-3, 1e-3])).sum().backward()
    assert weight.main_grad.dtype == torch.float32
    torch.testing.assert_close(weight.main_grad, sum(singles), rtol=1e-6, atol=1e-9)
    rounded = (singles[0].bfloat16() + singles[1].bfloat16()) + singles[2].bfloat16()
    lost = (rounded.float() - sum(singles)).norm() / (singles[1] + singles[2]).norm()
    assert lost > 0.1, "the case is one in which BF16 accumulation would lose much"


def test_state_space_parameters_stay_fp32(groups: object) -> None:
    _, model = build(groups, "precision=bf16")
    dtypes = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert {dtypes[name] for name in ("A_log", "D", "dt_bias")} == {torch.float32}
    assert dtypes["weight"] == torch.bfloat16


def test_only_matrices_decay(groups: object) -> None:
    _, model = build(groups)
    undecayed = {
        n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if not decays(n, p.dim())
    }
    assert undecayed == {"weight", "A_log", "D", "dt_bias", "conv_bias"}
    norms = {n for n, p in model.named_parameters() if not decays(n, p.dim()) and "weight" in n}
    assert norms and all("norm" in name for name in norms)


def test_initial_weights_follow_the_seed(groups: object) -> None:
    _, first = build(groups)
    _, again = build(groups)
    _, other = build(groups, "train.seed=7")
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        random = not (name.endswith(("norm.weight", "layernorm.weight")) or name.endswith(".D"))
        assert torch.equal(a, c) != random, name
