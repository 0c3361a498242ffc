"""Vocabulary-parallel cross entropy against torch's and Megatron-Core's.

Not covered: NCCL (the collectives run over gloo), speed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from nemotron_train.model.cross_entropy import vocab_parallel_cross_entropy


def _inputs(dtype: torch.dtype, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    logits_SBV = (torch.randn(7, 3, 48, generator=generator) * scale).to(dtype)
    labels_SB = torch.randint(0, 48, (7, 3), generator=generator)
    weights_SB = torch.rand(7, 3, generator=generator)
    weights_SB[2] = 0.0  # masked tokens
    return logits_SBV, labels_SB, weights_SB


def _loss_and_gradient(function, logits_SBV, labels_SB, weights_SB):
    logits_SBV = logits_SBV.detach().clone().requires_grad_()
    loss_SB = function(logits_SBV, labels_SB)
    (gradient_SBV,) = torch.autograd.grad((loss_SB * weights_SB).sum(), logits_SBV)
    return loss_SB.detach(), gradient_SBV


def _torch_cross_entropy(logits_SBV: torch.Tensor, labels_SB: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits_SBV.flatten(0, 1), labels_SB.flatten(), reduction="none")
    return losses.view(labels_SB.shape)


@pytest.mark.parametrize("scale", [0.01, 3.0, 80.0])
def test_float32_agrees_with_torch_in_float64(scale: float) -> None:
    logits, labels, weights = _inputs(torch.float32, scale)
    loss, gradient = _loss_and_gradient(vocab_parallel_cross_entropy, logits, labels, weights)
    true_loss, true_gradient = _loss_and_gradient(
        _torch_cross_entropy, logits.double(), labels, weights.double()
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=1e-6 * max(1, scale))
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=2e-6, atol=1e-6)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits, labels, weights = _inputs(torch.bfloat16)
    loss, gradient = _loss_and_gradient(vocab_parallel_cross_entropy, logits, labels, weights)
    true_loss, true_gradient = _loss_and_gradient(
        _torch_cross_entropy, logits.double(), labels, weights.double()
    )
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient, true_gradient.bfloat16(), rtol=2**-8, atol=1e-7)


def test_float64_agrees_with_torch_to_the_last_digits() -> None:
    logits, labels, weights = _inputs(torch.float64)
    results = _loss_and_gradient(vocab_parallel_cross_entropy, logits, labels, weights.double())
    truths = _loss_and_gradient(_torch_cross_entropy, logits, labels, weights.double())
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-13, atol=1e-14)


def test_one_certain_token_has_zero_loss_and_an_impossible_one_its_logit_gap() -> None:
    logits_SBV = torch.zeros(1, 2, 48)
    logits_SBV[0, :, 5] = 1000.0
    losses = vocab_parallel_cross_entropy(logits_SBV, torch.tensor([[5, 6]]))
    assert losses.tolist() == [[0.0, 1000.0]]


def test_second_backward_raises_instead_of_returning_a_wrong_gradient() -> None:
    logits, labels, _ = _inputs(torch.float32)
    loss = vocab_parallel_cross_entropy(logits.requires_grad_(), labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _compare_with_megatron(rank: int, num_ranks: int, rendezvous: str) -> None:
    from nemotron_train.platform import device

    device.prepare(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks
    )
    alone = [torch.distributed.new_group([other]) for other in range(num_ranks)][rank]
    for group in (torch.distributed.group.WORLD, alone):
        for dtype in (torch.float32, torch.bfloat16):
            for scale in (0.01, 3.0, 80.0):
                _compare_on_group(group, dtype, scale)
    torch.distributed.destroy_process_group()


def _compare_on_group(group, dtype: torch.dtype, scale: float) -> None:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as megatron_loss

    whole, labels, weights = _inputs(dtype, scale)
    logits = whole.chunk(group.size(), dim=-1)[group.rank()].contiguous()
    loss, gradient = _loss_and_gradient(
        lambda x, y: vocab_parallel_cross_entropy(x, y, group), logits, labels, weights
    )
    other_loss, other_gradient = _loss_and_gradient(
        lambda x, y: megatron_loss(x, y, tp_group=group), logits, labels, weights
    )
    true_loss, _ = _loss_and_gradient(_torch_cross_entropy, whole.double(), labels, weights)
    margin = {"rtol": 1e-6, "atol": 1e-6 * max(1, scale)}
    torch.testing.assert_close(loss, other_loss, **margin)
    torch.testing.assert_close(loss.double(), true_loss, **margin)
    rounding = 2**-7 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(gradient, other_gradient, rtol=rounding, atol=1e-6)


def test_agrees_with_megatron_on_one_rank_and_over_a_split_vocabulary(tmp_path) -> None:
    """Two gloo processes. Each compares over both ranks and over itself alone."""
    spawn(_compare_with_megatron, args=(2, str(tmp_path / "rendezvous")), nprocs=2)
