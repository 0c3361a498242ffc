"""Matrix products in the order of cuBLAS: y = op(B) op(A), with row-major matrices."""

from typing import Any

import torch
from torch import Tensor

from tests.platform.transformer_engine.quantized import Storage, decode
from tests.platform.transformer_engine.stand_in import CALLS
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage


def _product(A: Any, transa: bool, B: Any, transb: bool) -> Tensor:
    """FP32 from operands of one format. A block format has one copy for each direction of the sum,
    and the one that this product needs must be there."""
    kinds = {_kind(t) for t in (A, B)}
    assert len(kinds) == 1, f"a product of unlike formats: {kinds}"
    CALLS[f"product {kinds.pop()} {'NT'[transa]}{'NT'[transb]}"] += 1
    a, b = _operand(A, transa), _operand(B, not transb)
    return (b.t() if transb else b) @ (a.t() if transa else a)


def _kind(tensor: Any) -> str:
    if isinstance(tensor, Storage):
        return "NVFP4" if isinstance(tensor, NVFP4TensorStorage) else "MXFP8"
    return str(tensor.dtype).removeprefix("torch.")


def _operand(tensor: Any, sums_along_rows: bool) -> Tensor:
    if isinstance(tensor, Storage):
        return decode(tensor, "rowwise" if sums_along_rows else "columnwise")
    return tensor.reshape(-1, tensor.shape[-1]).float()


def generic_gemm(
    A: Any, transa: bool, B: Any, transb: bool, out: Tensor | None, quantizer: Any,
    out_dtype: int | None, bias: Tensor | None, bias_dtype: int, gelu: bool,
    gelu_in: Tensor | None, grad: bool, workspace: Tensor, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, *rest: Any,
) -> tuple[Any, None, None, None]:  # fmt: skip
    """One product; no bias, GELU or quantized result. rest: overlap with communication, scaling."""
    assert bias is None and not gelu and quantizer is None and rest[0] is None
    y = _product(A, transa, B, transb)
    if out is None:
        dtype = torch.bfloat16 if out_dtype is None else TE_DType_To_Torch[out_dtype]
        rows = (y.shape[0],) if transb else B.shape[:-1]
        return y.to(dtype).reshape(*rows, y.shape[-1]), None, None, None
    _store(y, out.view(-1, out.shape[-1]), accumulate)
    return out, None, None, None


def te_general_grouped_gemm(
    A: list[Any], transa: bool, B: list[Any], transb: bool, out: list[Tensor], out_dtype: int,
    m_splits: list[int], bias: list[Tensor], bias_dtype: int, single_output: bool,
    gelu_in: list[Tensor], grad: bool, workspace: list[Tensor], workspace_size: int,
    accumulate: bool, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """A product an expert, into `out`: one tensor for all experts, or one each."""
    parts = out[0].split(list(m_splits)) if single_output else out
    for a, b, part in zip(A, B, parts, strict=True):
        if b.shape[0] and part.numel():
            _store(_product(a, transa, b, transb), part, accumulate)
        elif not accumulate:
            part.zero_()
    return bias


def _store(y: Tensor, out: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(y.to(out.dtype))
    else:
        out.copy_(y)


FUNCTIONS = {"generic_gemm": generic_gemm, "te_general_grouped_gemm": te_general_grouped_gemm}
