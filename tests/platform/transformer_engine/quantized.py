"""Quantized tensors: Transformer Engine's own storage classes, with codes and scales of our
reference quantizers in the layouts that its Python allocates, saves and gathers.

Rounding is to nearest, also where a recipe asks for stochastic rounding. Scales keep their plain
order, also where cuBLAS would want them swizzled.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_train.precision.mxfp8 import MXFP8Tensor, quantize_mxfp8
from nemotron_train.precision.nvfp4 import NVFP4Tensor, quantize_nvfp4
from transformer_engine.pytorch import distributed
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage
from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

Storage = NVFP4TensorStorage | MXFP8TensorStorage


class _Kept:
    """A weight, kept from micro-batch to micro-batch. Upstream's is a torch.Tensor on CUDA, which
    the pretended device cannot make; saving it for the backward pass does not empty it."""

    _quantizer: Any

    def prepare_for_saving(self) -> Any:
        saved = object.__new__(type(self))  # its class's own __new__ wants all buffers
        saved.__dict__ |= self.__dict__
        return super(_Kept, saved).prepare_for_saving()  # type: ignore[misc]

    def quantize_(self, tensor: Tensor, noop_flag: Tensor | None = None) -> Any:
        return quantize(tensor, self._quantizer, self, noop_flag)


class _KeptNVFP4(_Kept, NVFP4TensorStorage):
    pass


class _KeptMXFP8(_Kept, MXFP8TensorStorage):
    pass


_CLASSES: dict[type, tuple[Any, type]] = {
    NVFP4Quantizer: (NVFP4TensorStorage, _KeptNVFP4),
    MXFP8Quantizer: (MXFP8TensorStorage, _KeptMXFP8),
}
_BLOCKS = {NVFP4Quantizer: 16, MXFP8Quantizer: 32}  # elements that share a scale
_HADAMARD = 16  # elements that the random Hadamard transform mixes


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pinned: bool
) -> Storage:
    """Buffers of the shapes that the quantizer's own Python names."""
    plain, kept = _CLASSES[type(quantizer)]
    context = quantizer.create_metadata(shape, dtype=dtype)
    buffers = {
        name: torch.zeros(size, dtype=kind, device=device)
        for name, (size, kind) in quantizer.inner_tensor_specs(tuple(shape)).items()
    }
    context |= {"cls": plain, "is_tensor": False}
    storage = plain.__tensor_unflatten__(buffers, context, tuple(shape), None)
    if not quantizer.internal:
        storage.__class__ = kept
    return storage


def quantize(tensor: Tensor, quantizer: Any, output: Any, noop: Tensor | None) -> Storage:
    """Raises AssertionError for a shape that the block format does not divide, as C++ would."""
    block = _BLOCKS[type(quantizer)]
    flat = tensor.reshape(-1, tensor.shape[-1])
    assert all(size % block == 0 for size in flat.shape), (type(quantizer), tuple(tensor.shape))
    if output is None:
        output = create_empty_quantized_tensor(
            quantizer, list(tensor.shape), tensor.dtype, tensor.device, False
        )
    if tensor.numel():
        fill = _fill_nvfp4 if isinstance(quantizer, NVFP4Quantizer) else _fill_mxfp8
        if quantizer.rowwise_usage:
            fill(output, flat, quantizer, "rowwise")
        if quantizer.columnwise_usage:
            fill(output, flat.t().contiguous(), quantizer, "columnwise")
    return output


def _fill_nvfp4(output: Storage, matrix: Tensor, quantizer: Any, usage: str) -> None:
    """matrix: [rows, columns], or its transpose for the usage "columnwise", which stores that."""
    if usage == "columnwise" and quantizer.with_rht:
        blocks = matrix.float().unflatten(1, (-1, _HADAMARD)) @ quantizer.rht_matrix.float()
        matrix = blocks.flatten(1).to(matrix.dtype)
    found = quantize_nvfp4(
        matrix,
        block="2d" if quantizer.with_2d_quantization else "1d",
        reduce_amax=_amax_reduction(quantizer),
    )
    _buffer(output, usage, "data").view(found.codes.shape).copy_(found.codes)
    scales = found.scales[: len(matrix)]
    _buffer(output, usage, "scale_inv")[: len(scales), : scales.shape[1]] = scales
    getattr(output, f"_amax_{usage}").copy_(found.amax.reshape(1))


def _amax_reduction(quantizer: Any) -> Any:
    """Ranks that hold parts of one gathered tensor share its scale."""
    if not quantizer.with_amax_reduction:
        return None

    def reduce(amax: Tensor) -> Tensor:
        torch.distributed.all_reduce(
            amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
        )
        return amax

    return reduce


def _fill_mxfp8(output: Storage, matrix: Tensor, quantizer: Any, usage: str) -> None:
    """As above, but the columns' codes and scales are stored in the order of the tensor."""
    found = quantize_mxfp8(matrix)
    codes, scales = found.codes, found.scales
    if usage == "columnwise":
        codes, scales = codes.t(), scales.t()
    _buffer(output, usage, "data").view(codes.shape).copy_(codes)
    _buffer(output, usage, "scale_inv")[: len(scales), : scales.shape[1]] = scales


def _buffer(storage: Storage, usage: str, name: str) -> Tensor:
    found = getattr(storage, f"_{usage}_{name}")
    assert found is not None, f"{type(storage).__name__} has no {usage} {name}"
    return found


def decode(storage: Storage, usage: str) -> Tensor:
    """[rows, columns] FP32 from the codes and scales of one usage."""
    codes = _buffer(storage, usage, "data")
    scales = _buffer(storage, usage, "scale_inv")
    if isinstance(storage, NVFP4TensorStorage):
        codes = codes.reshape(-1, codes.shape[-1]) if usage == "rowwise" else codes.flatten(1)
        shape = torch.Size((len(codes), 2 * codes.shape[1]))
        scales = scales[: shape[0], : shape[1] // _BLOCKS[NVFP4Quantizer]]
        amax = getattr(storage, f"_amax_{usage}")[0]
        found = NVFP4Tensor(codes, scales.contiguous(), amax, shape).dequantize()
        return found if usage == "rowwise" else found.t()
    codes = codes.reshape(-1, codes.shape[-1])
    block = _BLOCKS[MXFP8Quantizer]
    if usage == "rowwise":
        scales = scales[: len(codes), : codes.shape[1] // block]
        return MXFP8Tensor(codes, scales, codes.shape).dequantize()
    scales = scales[: len(codes) // block, : codes.shape[1]]
    transposed = codes.t()
    return MXFP8Tensor(transposed.contiguous(), scales.t(), transposed.shape).dequantize().t()


def dequantize(storage: Storage, dtype: int) -> Tensor:
    """The numbers of whichever usage there is."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    usage = "rowwise" if storage._rowwise_data is not None else "columnwise"
    return decode(storage, usage).view(storage.size()).to(TE_DType_To_Torch[dtype])


def split_quantize(
    tensor: Tensor, sections: list[int], quantizers: list[Any], without_bulk: bool
) -> list[Storage]:
    """Each section of the rows by its own quantizer."""
    parts = tensor.split(list(sections))
    return [quantize(t.contiguous(), q, None, None) for t, q in zip(parts, quantizers, strict=True)]


def swap_first_dims(tensor: Tensor, out: Tensor | None) -> Tensor:
    """[a, b, ...] -> [b, a, ...], for parts that were gathered one behind the other."""
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def pad_columnwise_scale_inv(scales: Tensor) -> Tensor:
    """Zeros up to multiples of 128 rows and 4 columns. Upstream's is a Triton kernel."""
    rows, columns = scales.shape
    return F.pad(scales, (0, -columns % 4, 0, -rows % 128))


distributed.pad_columnwise_scale_inv = pad_columnwise_scale_inv
FUNCTIONS = {
    "create_empty_quantized_tensor": create_empty_quantized_tensor,
    "quantize": quantize,
    "dequantize": dequantize,
    "split_quantize": split_quantize,
    "swap_first_dims": swap_first_dims,
}
