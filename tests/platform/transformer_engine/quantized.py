"""Quantized tensors: what `quantize` returns is the dequantized numbers of both usages, by our
emulation. Rounding is to nearest, also where a recipe asks for stochastic rounding.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.nvfp4 import nvfp4_operand
from transformer_engine.pytorch.cpp_extensions import gemm
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

_BLOCKS = {NVFP4Quantizer: 16, MXFP8Quantizer: 32}  # elements that share a scale


class ReferenceTensor(QuantizedTensorStorage):
    """row, column: the numbers quantized along the rows and along the columns, [rows, columns] in
    FP32; None where that usage was not asked for or was dropped."""

    def __init__(self, row: Tensor | None, column: Tensor | None, quantizer: Any, shape: Any):
        self.row, self.column = row, column
        self._quantizer = quantizer
        self._shape = torch.Size(shape)
        self.kind = type(quantizer).__name__
        # Kept from micro-batch to micro-batch, as a weight is: saving must not empty it.
        self._is_kept = not quantizer.internal

    def size(self, dim: int | None = None) -> Any:
        return self._shape if dim is None else self._shape[dim]

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def device(self) -> torch.device:
        values = self.row if self.row is not None else self.column
        assert values is not None
        return values.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def usage(self, is_row: bool) -> Tensor:
        """The numbers for a product that sums along the rows, or along the columns."""
        values = self.row if is_row else self.column
        assert values is not None, f"{self.kind}: the {'row' if is_row else 'column'} usage is gone"
        return values

    def update_usage(
        self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None
    ) -> None:
        if rowwise_usage is False:
            self.row = None
        if columnwise_usage is False:
            self.column = None
        for wanted, is_row in ((rowwise_usage, True), (columnwise_usage, False)):
            if wanted:
                self.usage(is_row)

    def get_usages(self) -> dict[str, bool]:
        return {"rowwise": self.row is not None, "columnwise": self.column is not None}

    def quantize_(self, tensor: Tensor, noop_flag: Tensor | None = None) -> "ReferenceTensor":
        return quantize(tensor, self._quantizer, self, noop_flag)

    def prepare_for_saving(self) -> tuple[list[Tensor | None], "ReferenceTensor"]:
        saved = copy.copy(self) if self._is_kept else self
        tensors = [self.row, self.column]
        assert any(t is not None for t in tensors), (self.kind, self._shape)
        saved.row = saved.column = None
        return tensors, saved

    def restore_from_saved(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        self.row, self.column = tensors[:2]
        return tensors[2:]

    def _get_quantizer(self) -> Any:
        return self._quantizer

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        values = self.usage(True)
        return values if dtype is None else values.to(dtype)


gemm._NATIVE_GEMM_INPUT_STORAGES += (ReferenceTensor,)


def quantize(tensor: Tensor, quantizer: Any, output: Any, noop: Tensor | None) -> ReferenceTensor:
    """Raises AssertionError for a shape that the block format does not divide, as C++ would."""
    block = _BLOCKS[type(quantizer)]
    flat = tensor.reshape(-1, tensor.shape[-1])
    assert all(size % block == 0 for size in flat.shape), (type(quantizer), tuple(tensor.shape))
    row = _values(flat, quantizer, -1) if quantizer.rowwise_usage else None
    column = _values(flat, quantizer, 0) if quantizer.columnwise_usage else None
    if output is None:
        return ReferenceTensor(row, column, quantizer, tensor.shape)
    output.row, output.column = row, column
    return output


def _values(flat: Tensor, quantizer: Any, dim: int) -> Tensor:
    if not flat.numel():
        return flat.float()
    if isinstance(quantizer, MXFP8Quantizer):
        return mxfp8_operand(flat, dim=dim).dequantize().float()
    if dim == 0 and quantizer.with_rht:  # the random Hadamard transform of 16 rows at a time
        blocks = flat.float().unflatten(0, (-1, 16))
        mixed = torch.einsum("bic,ij->bjc", blocks, quantizer.rht_matrix.float())
        flat = mixed.flatten(0, 1).to(flat.dtype)
    block = "2d" if quantizer.with_2d_quantization else "1d"
    return nvfp4_operand(flat, block=block, dim=dim).dequantize().float()


def split_quantize(
    tensor: Tensor, sections: list[int], quantizers: list[Any], without_bulk: bool
) -> list[ReferenceTensor]:
    """Each section of the rows by its own quantizer."""
    parts = tensor.split(list(sections))
    return [quantize(t.contiguous(), q, None, None) for t, q in zip(parts, quantizers, strict=True)]


FUNCTIONS = {"quantize": quantize, "split_quantize": split_quantize}
