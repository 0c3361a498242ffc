"""The split of the packed projection against torch's own, values and gradients. Not covered:
speed."""

import torch

from nemotron_train.model.mamba.split import split_to_batch_first

WIDTHS = [3, 5, 1]


def test_equals_torch_split_in_values_and_gradients() -> None:
    """The results are exact, because a split only moves numbers. One part has no gradient."""
    packed = torch.randn(7, 2, 9, requires_grad=True)
    reference = packed.detach().clone().requires_grad_()
    parts = split_to_batch_first(packed, WIDTHS)
    expected = reference.transpose(0, 1).split(WIDTHS, dim=-1)
    for part, other in zip(parts, expected, strict=True):
        assert torch.equal(part, other)
    for chosen in (parts, expected):
        (chosen[0].sin().sum() + chosen[1].square().sum()).backward()
    assert torch.equal(packed.grad, reference.grad)
    assert packed.grad.is_contiguous()
    assert not packed.grad[..., 8].any()


def test_parts_are_views() -> None:
    packed = torch.randn(4, 2, 9)
    for part in split_to_batch_first(packed, WIDTHS):
        assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
