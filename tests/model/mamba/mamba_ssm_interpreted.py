"""Run by test_mamba_ssm.py: mamba_ssm's scan under Triton's interpreter, forward and backward.

`ssd` is called as the model calls it, with tensors on a pretended CUDA device: it chooses mamba_ssm
by itself. Second truths: the recurrence in float64, and our chunked scan with the same inputs.
Differences are relative to the largest element of the true result. Measured: FP32 at most 5e-7
(kernels), 6e-7 (ours) and 1e-6 (between the two); BF16 at most 1.2e-2, 1.1e-2 and 1.7e-2. The
bounds are about twice that.

Not covered: what Triton's compiler makes of the kernels, races between threads, the block sizes
that a GPU would choose, and 32-bit offsets (the interpreter has 64).
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.platform.pretend import interpreter, packages, python_view

packages.put_on_path("mamba_ssm")
python_view.install()
interpreter.install()

from nemotron_train.model.mamba import core  # noqa: E402
from nemotron_train.plan.switches import MAMBA_SSM  # noqa: E402
from nemotron_train.platform.packages import problem  # noqa: E402
from tests.model.mamba.recurrence import (  # noqa: E402
    NAMES,
    Shape,
    documents,
    make_inputs,
    recurrence,
)

CHUNK = 32
BOUNDS = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (2e-2, 3e-2)}  # to the truth, to ours


class Case(NamedTuple):
    dtype: torch.dtype
    length: int
    starts: list[list[int]] | None  # of documents, row by row: on and inside chunks
    has_initial: bool
    wants_final: bool
    is_deterministic: bool  # without atomic additions; a run has them


CASES = {
    "training": Case(torch.float32, 70, [[32, 33, 64], [5]], False, False, False),
    "continued": Case(torch.float32, 64, [[32, 40], [3, 63]], True, True, True),
    "prefill": Case(torch.float32, 40, None, True, True, False),
    "training in BF16": Case(torch.bfloat16, 70, [[32, 33, 64], [5]], False, False, False),
    "continued in BF16": Case(torch.bfloat16, 64, [[32, 40], [3, 63]], True, True, True),
}


def make_case(case: Case) -> tuple[list[Tensor], Tensor | None]:
    """The inputs, rounded to the dtypes that a layer gives, and the document ids. x, B and C are
    parts of one wider tensor, as in a layer; ids start above zero."""
    inputs = make_inputs(Shape(2, case.length, 4, 16, 2, 16), 0.1)
    x, dt, A, B, C, D, initial = (t.float() for t in inputs)
    wide = torch.cat([t.flatten(2) for t in (x, B, C)], dim=-1).to(case.dtype)
    parts = wide.split([t[0, 0].numel() for t in (x, B, C)], dim=-1)
    x, B, C = (part.unflatten(2, t.shape[2:]) for part, t in zip(parts, (x, B, C), strict=True))
    ids = None if case.starts is None else documents(case.starts, case.length) + 7
    return [x, dt, A, B, C, D, initial], ids


def results(form: str, case: Case) -> list[Tensor]:
    """y, the final state if it is wanted, and the gradient of each input, on the CPU."""
    inputs, ids = make_case(case)
    dtype = torch.float64 if form == "recurrence" else None
    device = "cpu" if form == "recurrence" else "cuda"
    used = inputs if case.has_initial else inputs[:6]
    leaves = [t.detach().to(device, dtype or t.dtype).requires_grad_() for t in used]
    operands, initial = leaves[:6], leaves[6] if case.has_initial else None
    ids = ids if ids is None else ids.to(device)
    if form == "recurrence":
        outputs = recurrence(*operands, initial, ids)[: 1 + case.wants_final]
    else:
        outputs = core.ssd(
            *operands,
            chunk_size=CHUNK,
            document_ids_BS=ids,
            initial_state_BHPN=initial,
            return_final_state=case.wants_final,
            force_torch=form == "chunked",
        )
        outputs = outputs if case.wants_final else (outputs,)
    noise = torch.Generator().manual_seed(9)
    cotangents = [
        torch.randn(out.shape, generator=noise, dtype=torch.float64).to(out.dtype).to(device)
        for out in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return [t.detach().cpu() for t in (*outputs, *gradients)]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    assert one.shape == other.shape and one.isfinite().all()
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


@pytest.mark.parametrize("name", CASES)
def test_equals_the_recurrence_and_the_chunked_scan(name: str, monkeypatch) -> None:
    assert problem(MAMBA_SSM) == ""  # imports the scan without the package's __init__
    from mamba_ssm.utils.determinism import set_deterministic_mode

    case = CASES[name]
    calls = []
    ours = core._mamba_ssm
    monkeypatch.setattr(core, "_mamba_ssm", lambda *a: calls.append(a) or ours(*a))
    set_deterministic_mode(case.is_deterministic)
    theirs = results("mamba_ssm", case)
    assert len(calls) == 1, "ssd chose mamba_ssm"
    chunked, truth = results("chunked", case), results("recurrence", case)
    assert len(calls) == 1 and theirs[0].dtype == case.dtype
    to_truth, to_ours = BOUNDS[case.dtype]
    names = ["y", *["final"] * case.wants_final, *NAMES[: 6 + case.has_initial]]
    for what, a, b, exact in zip(names, theirs, chunked, truth, strict=True):
        assert distance(a, exact) < to_truth, what
        assert distance(a, b) < to_ours, what
