"""Labels that put CPU storages on cuda:0, and the dispatch mode that moves and checks them.

torch's kernels see the CPU's tensors; Python sees the label (`python_view`). The mode carries
labels from the inputs of an operator to its outputs, refuses what a GPU would refuse, and counts,
by source line, what makes the host wait (`STATE.waits`) and what crosses the bus (`STATE.copies`).
"""

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

true_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
_PACKAGES = ("nemotron_train/", "megatron/", "mamba_ssm/", "transformer_engine/")
_SWEEP_EVERY = 20_000  # labels of freed storages are dropped this often

_INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten.index_put.default,
}
# Operators that take a CPU and a CUDA tensor.
_MIXED = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default} | _INDEXED
# A GPU's products with BF16 operands and an FP32 result.
_WIDE_PRODUCTS = {
    aten.mm.dtype: torch.mm,
    aten.bmm.dtype: torch.bmm,
    aten.addmm.dtype: torch.addmm,
    aten.baddbmm.dtype: torch.baddbmm,
}
# Operators that take a CPU tensor without dimensions as a number, besides the pointwise ones.
_TAKES_NUMBERS = {
    aten.fill_.Tensor,
    aten.fill.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_fill_.int_Tensor,
    aten.where.self,
}
# Operators whose result's size or value the host must know.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}


class DeviceMismatch(RuntimeError):
    """What a GPU would have refused."""


@dataclass
class State:
    """What happened so far in this process. by_line: "kind @ file:line < file:line" -> count."""

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    mismatches: Counter[str] = field(default_factory=Counter)
    by_line: Counter[str] = field(default_factory=Counter)
    operators: int = 0  # with a CUDA tensor
    launches: Counter[str] = field(default_factory=Counter)  # of Triton's kernels, by name

    def clear(self) -> None:
        """Forget what happened."""
        self.__init__()


STATE = State()
GLOO_GROUPS: set[str] = set()  # names of the process groups that were asked for as gloo
_labels: dict[int, StorageWeakRef] = {}


def on_cuda(tensor: torch.Tensor) -> bool:
    """Whether the tensor's storage has a label."""
    if true_device(tensor).type != "cpu":
        return true_device(tensor).type == "cuda"
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    reference = _labels.get(storage._cdata)
    return reference is not None and not reference.expired()


def label(tensor: torch.Tensor) -> None:
    """Put the tensor's storage on cuda:0."""
    storage = tensor.untyped_storage()
    if len(_labels) % _SWEEP_EVERY == _SWEEP_EVERY - 1:
        for key in [key for key, reference in _labels.items() if reference.expired()]:
            del _labels[key]
    _labels[storage._cdata] = StorageWeakRef(storage)


def caller(depth: int = 3) -> str:
    """The innermost lines of the project and of the libraries that it drives."""
    found: list[str] = []
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        name = frame.f_code.co_filename
        if not any(package in name for package in _PACKAGES) or "tests/platform/pretend" in name:
            continue
        found.append(f"{name.split('site-packages/')[-1].rpartition('/nemotron_train/')[2]}:{line}")
        if len(found) == depth or (len(found) > 1 and "nemotron_train/" in name):
            break
    return " < ".join(found)


def note(counter: Counter[str], kind: str) -> None:
    """Count a wait or a copy, and the line that asked for it."""
    counter[kind] += 1
    STATE.by_line[f"{kind} @ {caller()}"] += 1


def refuse(text: str) -> None:
    """Raises DeviceMismatch, and keeps it for a caller that catches everything."""
    text = f"{text} @ {caller(4)}"
    STATE.mismatches[text] += 1
    raise DeviceMismatch(text)


def is_cuda_device(value: Any) -> bool:
    """Whether an argument names a CUDA device."""
    if value is None or isinstance(value, torch.dtype):
        return False
    return torch.device(value).type == "cuda"


class PretendCuda(TorchDispatchMode):
    """Checks each operator, runs it on the CPU and labels its results."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._can_decompose():
            # Without autograd's keys, composite operators arrive whole.
            with self:
                whole = func.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        flat, spec = tree_flatten((args, kwargs))
        any_cuda = _check(func, args, flat)
        STATE.operators += any_cuda
        device = kwargs.get("device")
        to_cuda = is_cuda_device(device)
        _count_copies(func, args, to_cuda)
        flat = [CPU if isinstance(a, torch.device) and a.type == "cuda" else a for a in flat]
        known = {
            a.untyped_storage()._cdata
            for a in flat
            if isinstance(a, torch.Tensor) and true_device(a).type == "cpu"
        }
        result = _run(func, *tree_unflatten(flat, spec))
        goes = to_cuda or any_cuda
        if not goes and device is not None and not any(isinstance(a, torch.Tensor) for a in flat):
            goes = _autograd_asks()
        if goes and func.namespace != "c10d":
            for item in tree_flatten(result)[0]:
                if isinstance(item, torch.Tensor) and item.untyped_storage()._cdata not in known:
                    label(item)
        return result


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    if func is aten.histc.default and not args[0].is_floating_point():
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    if func in _WIDE_PRODUCTS:
        *operands, dtype = args
        return _WIDE_PRODUCTS[func](*(operand.to(dtype) for operand in operands))
    return func(*args, **kwargs)


def _count_copies(func: Any, args: Any, to_cuda: bool) -> None:
    if func is aten.copy_.default and on_cuda(args[0]) != on_cuda(args[1]):
        if on_cuda(args[0]):
            note(STATE.copies, "to the device, copy_")
        else:
            note(STATE.waits, "to the host, copy_")
    if func is aten._to_copy.default and to_cuda and not on_cuda(args[0]):
        note(STATE.copies, "to the device")


def _check(func: Any, args: Any, flat: list[Any]) -> bool:
    """Whether a CUDA tensor takes part. Raises DeviceMismatch."""
    tensors = [a for a in flat if isinstance(a, torch.Tensor)]
    there = [t for t in tensors if on_cuda(t)]
    here = [t for t in tensors if not on_cuda(t)]
    if func.namespace == "c10d":
        if any(t.numel() for t in here) and "barrier" not in str(func) and not _is_gloo(flat):
            refuse(f"{func}: NCCL got a CPU tensor {[tuple(t.shape) for t in here]}")
        return bool(there)
    if not there:
        return False
    if func in _INDEXED:
        _check_index(func, args)
    elif func not in _MIXED and here:
        takes_numbers = torch.Tag.pointwise in func.tags or func in _TAKES_NUMBERS
        wrong = [t for t in here if t.dim() > 0 or not takes_numbers]
        if not wrong and func._schema.is_mutable and not on_cuda(args[0]):
            wrong = [args[0]]
        if wrong:
            refuse(f"{func}: CPU {list(_described(wrong))} meets CUDA {list(_described(there))}")
    if func in _WAITS and not _knows_size(func, args, flat):
        note(STATE.waits, str(func))
    return True


def _knows_size(func: Any, args: Any, flat: list[Any]) -> bool:
    """Whether the caller gave the size of the result of `repeat_interleave`."""
    return func is aten.repeat_interleave.Tensor and any(isinstance(a, int) for a in flat)


def _check_index(func: Any, args: Any) -> None:
    target, indices = args[0], args[1]
    for index in indices:
        if index is None:
            continue
        if on_cuda(index) and not on_cuda(target):
            refuse(f"{func}: a CUDA index of a CPU tensor")
        if on_cuda(index) and index.dtype in (torch.bool, torch.uint8):
            note(STATE.waits, "index by a mask")
        if not on_cuda(index) and on_cuda(target):
            note(STATE.copies, "to the device, index")
    if len(args) > 2 and args[2].dim() > 0 and on_cuda(args[2]) != on_cuda(target):
        refuse(f"{func}: values and target on two devices")


def _described(tensors: list[torch.Tensor]) -> Iterator[str]:
    for tensor in tensors:
        yield f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _is_gloo(flat: list[Any]) -> bool:
    for item in flat:
        if isinstance(item, torch.ScriptObject):
            try:
                group = torch.distributed.ProcessGroup.unbox(item)
            except Exception:  # another kind of script object
                continue
            return group.group_name in GLOO_GROUPS
    return False


def _autograd_asks() -> bool:
    """Whether C++ autograd itself makes this tensor (zeros for a gradient that nobody gave), from
    options that say CPU. In a pass of CUDA tensors it would be on CUDA."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py")):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"
