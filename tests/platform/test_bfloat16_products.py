"""BF16 products through FP32 against float64 and against one rounding, and the cases that are not
replaced.

Not covered: speed, and processors with BF16 instructions (nothing is replaced there).
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nemotron_train.platform import bfloat16_products

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mm": lambda a, b, c: torch.mm(a[0], b[0]),
    "mm transposed": lambda a, b, c: torch.mm(b[0].t(), a[0].t()),
    "mm out": lambda a, b, c: torch.mm(a[0], b[0], out=torch.empty_like(c[0])),
    "mm out, columns": lambda a, b, c: torch.mm(a[0], b[0], out=torch.empty_like(c[0].t()).t()),
    "addmm": lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2),
    "addmm, a bias": lambda a, b, c: torch.addmm(c[0, 0], a[0], b[0]),
    "addmm_": lambda a, b, c: c[0].clone().addmm_(a[0], b[0]),
    "addmm out": lambda a, b, c: torch.addmm(c[0], a[0], b[0], out=torch.empty_like(c[0])),
    "bmm": lambda a, b, c: torch.bmm(a, b),
    "bmm out": lambda a, b, c: torch.bmm(a, b, out=torch.empty_like(c)),
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, beta=0, alpha=0.3),
    "baddbmm_": lambda a, b, c: c.clone().baddbmm_(a, b),
    "baddbmm out": lambda a, b, c: torch.baddbmm(c, a, b, out=torch.empty_like(c)),
    "linear": lambda a, b, c: torch.nn.functional.linear(a, b[0].t()),
}


@pytest.fixture(autouse=True)
def through_float32() -> Iterator[None]:
    """Installed for the test only, unless this process has it installed already."""
    if bfloat16_products.needed():
        bfloat16_products.install()
        yield
        return
    library = bfloat16_products.install.__wrapped__()
    yield
    library._destroy()


def _operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((3, 33, 70), (3, 70, 65), (3, 33, 65))
    return tuple(torch.randn(s, generator=generator).bfloat16() for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_rounded_once(form: str) -> None:
    """The exact result, rounded to BF16: half a unit in the last place, plus FP32's own error."""
    exact = FORMS[form](*(t.double() for t in _operands()))
    result = FORMS[form](*_operands())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, rtol=2.0**-8, atol=1e-5)
    wide = FORMS[form](*(t.float() for t in _operands()))
    assert torch.equal(result, wide.bfloat16())


def test_gradients_pass() -> None:
    a, b, _ = (t.requires_grad_() for t in _operands())
    torch.bmm(a, b).sum().backward()
    assert a.grad is not None and b.grad is not None
    expected = torch.bmm(torch.ones(3, 33, 65).bfloat16(), b.detach().mT)
    assert torch.equal(a.grad, expected)


def test_other_types_are_left_alone() -> None:
    a, b, c = (t.float() for t in _operands())
    assert torch.bmm(a, b).dtype == torch.float32
    torch.testing.assert_close(torch.addmm(c[0], a[0], b[0]), c[0] + a[0] @ b[0])
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(a[0], b[0].bfloat16())
