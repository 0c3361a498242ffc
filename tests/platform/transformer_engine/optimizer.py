"""Operations on lists of tensors, as the fused optimizer and gradient clipping call them."""

import torch
from torch import Tensor


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float,
    epsilon: float, step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """AdamW (mode 1) in place. lists: gradients, parameters, first and second moments."""
    assert mode == 1, "L2 regularization is not used"
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
    for gradient, parameter, m, v in zip(*lists[:4], strict=True):
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (m / first) / ((v / second).sqrt() + epsilon)
        parameter.sub_(lr * (update + weight_decay * parameter))


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool | None
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together, [1], and of each, or none."""
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_zeros(0)


def multi_tensor_scale(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float | Tensor
) -> None:
    """Tensors of the second list become those of the first times `scale`."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


FUNCTIONS = {
    "multi_tensor_adam": multi_tensor_adam,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_scale": multi_tensor_scale,
    "multi_tensor_scale_tensor": multi_tensor_scale,
}
