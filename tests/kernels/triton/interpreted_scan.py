"""Run by test_triton.py: our Triton scan under Triton's interpreter.

Truth: the recurrence of `core.ssd`'s docstring, token by token in float64. Bounds: FP32 by the
order of sums and the last digits of exp; BF16 by the rounding of operands, results and gradients,
as in tests/model/mamba/test_core.py. Not covered: speed, races, and offsets beyond 32 bits, which
need tensors of more than 4 GB (compiled.py looks at the arithmetic of the offsets).
"""

import pytest
import torch
from torch import Tensor

from nemotron_train.kernels.triton import available, scan, scan_backward
from nemotron_train.model.mamba import core
from tests.model.mamba.test_core import NAMES, Shape, both, documents, make_inputs

# The interpreter computes with NumPy, which reports what the kernels expect: exp(-1e5) = 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`core.ssd` takes the Triton form for FP32 and BF16; what it called."""
    types, found = (torch.bfloat16, torch.float32), []
    monkeypatch.setattr(available, "can_use", lambda *t: all(x.dtype in types for x in t))
    for module, name in ((scan, "scan"), (scan_backward, "scan_backward")):
        function = getattr(module, name)

        def counted(*arguments, name=name, function=function):
            found.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
    return found


def _errors(ours: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """The largest error of each, relative to its largest element (at least 1e-3)."""
    names = ("y", "final", *NAMES)
    return {
        name: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for name, a, b in zip(names, ours, truth, strict=False)
    }


# Documents inside chunks, on their edges, of one token, in one row only; a row that is no multiple
# of a chunk; sizes that are no tiles; one chunk; several column tiles of the state.
CASES = [
    (torch.float32, Shape(2, 70, 2, 20, 2, 40), 32, [[5, 32, 33, 69], [64]], True),
    (torch.float32, Shape(1, 40, 2, 16, 1, 70), 16, None, False),
    (torch.bfloat16, Shape(1, 50, 2, 20, 1, 24), 32, [[16, 17, 47]], True),
]


@pytest.mark.parametrize(("dtype", "shape", "chunk", "starts", "with_initial"), CASES)
def test_equals_recurrence(dtype, shape, chunk, starts, with_initial, calls) -> None:
    exact = make_inputs(shape, 0.05)
    narrow = [t.to(dtype if name in "xBC" else torch.float32)
              for name, t in zip(NAMES, exact, strict=True)]  # fmt: skip
    ids = None if starts is None else documents(starts, shape.length)
    ours, truth = both(narrow, ids, chunk, with_initial)
    assert calls == ["scan", "scan_backward"]
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    bound = 2e-6 if dtype == torch.float32 else 1.2e-2
    errors = _errors(ours, truth)
    assert max(errors.values()) < bound, errors


def test_violent_decay(calls) -> None:
    """One token in five forgets everything (dt A to -1e5), others nothing: no overflow, no NaN, and
    the small decays after a huge one keep their precision."""
    inputs = make_inputs(Shape(1, 40, 2, 4, 1, 4))
    inputs[1][:, ::5] *= 1e5
    inputs[1][:, 1::5] = 0
    ours, truth = both([t.float() for t in inputs], None, 32, True)
    assert all(torch.isfinite(t).all() for t in ours)
    errors = _errors(ours, truth)
    for name in ("y", "final", "x", "B", "C", "D"):  # dt and A are scaled by dt and A of 1e5
        assert errors[name] < 2e-5, errors


def test_documents_do_not_leak(calls) -> None:
    """Another document before a document changes neither its output nor its gradients, to a bit;
    nor does one after it."""
    boundary, length = 21, 40
    ids = documents([[boundary]], length)

    def run(seeds: tuple[int, int]) -> list[Tensor]:
        first, second = (make_inputs(Shape(1, length, 2, 4, 1, 4), 0.05, seed) for seed in seeds)
        leaves = [
            torch.cat([a[:, :boundary], b[:, boundary:]], 1).float().requires_grad_()
            for a, b in ((first[i], second[i]) for i in (0, 1, 3, 4))
        ]
        x, dt, B, C = leaves
        A, D = -torch.ones(2), torch.ones(2)
        y = core.ssd(x, dt, A, B, C, D, chunk_size=16, document_ids_BS=ids)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    base, other_first, other_second = run((1, 2)), run((3, 2)), run((1, 4))
    for a, b, c in zip(base, other_first, other_second, strict=True):
        assert torch.equal(a[:, boundary:], b[:, boundary:])
        assert torch.equal(a[:, :boundary], c[:, :boundary])
        assert not torch.equal(a[:, :boundary], b[:, :boundary])


def test_other_forms_are_kept(calls) -> None:
    """FP64, `force_torch` and heads wider than the kernels hold go to torch's operators."""
    inputs = make_inputs(Shape(1, 8, 2, 4, 1, 4))[:6]
    core.ssd(*inputs, chunk_size=16)
    narrow = [t.float() for t in inputs]
    core.ssd(*narrow, chunk_size=16, force_torch=True)
    x = torch.zeros(1, 8, 2, 129)
    core.ssd(x, *narrow[1:], chunk_size=16)
    assert calls == []
