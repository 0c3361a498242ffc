"""All adaptations that let Megatron-Core 0.19 run without a CUDA device.

`install()` applies three kinds of adaptation. It raises an error if a GPU exists.

1. Stand-ins on `torch.cuda` for functions that Megatron calls without checking for a GPU (current
   device, streams, events, random state).
2. Constants inside Megatron's functions that name the CUDA device or its tensor types: replaced by
   those of the CPU (`RENAMED`). This is narrower than wrapping torch's factories process-wide.
3. Single functions that lack a CPU branch upstream: replaced (see `install`).

tests/platform/test_megatron_cpu.py has one canary per patch: it fails as soon as upstream no longer
needs the patch. Does not own: the choice of kernels and layers (`assemble.specs`).
"""

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# UPSTREAM(megatron-core 0.19.2): modules with CUDA constants in functions, and the replacement of
# each constant. `install` raises an error if a listed module has no such constant.
RENAMED = {"cuda": "cpu"} | {
    f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}
MODULES_WITH_CONSTANTS = (
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "megatron.core.tensor_parallel.random",
)

# Modules whose decorators compile at import, or that import a replaced function by value.
IMPORTED_EARLY = (
    "megatron.core.models.hybrid.hybrid_model",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.distributed",
    "megatron.core.optimizer",
)

# Collectives that param_and_grad_buffer calls in place on whole buffers, once per step.
WHOLE_BUFFER_COLLECTIVES = ("dist_all_gather_func", "dist_reduce_scatter_func")


class Stream:
    """Stand-in for `torch.cuda.Stream`. It does nothing, because CPU work is synchronous."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: object = None) -> "Event":
        """An event that is already complete."""
        return Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always True: all work is complete."""
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing to restore."""


class Event:
    """Stand-in for `torch.cuda.Event`. It is always complete."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Accept and ignore the timing flags of CUDA events."""

    def record(self, stream: object = None) -> None:
        """Nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always True."""
        return True


class _DefaultGenerators:
    """Stand-in for `torch.cuda.default_generators`: the CPU generator at every index."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.random.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.random.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _new_no_op() -> Callable[..., None]:
    """A new function that does nothing, for CUDA functions that synchronize, initialize or release.

    Each call returns a different function: torch's compiler rejects one function under two names.
    """

    def no_op(*args: object, **kwargs: object) -> None:
        """Nothing to do on a CPU."""

    return no_op


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[object]:
    yield stream


def _cuda_stand_ins() -> dict[str, object]:
    """Attributes of `torch.cuda` that Megatron-Core uses without checking for a device."""
    cpu_stream = Stream()
    return {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "current_stream": lambda device=None: cpu_stream,
        "default_stream": lambda device=None: cpu_stream,
        "stream": _stream_context,
        "Stream": Stream,
        "Event": Event,
        "synchronize": _new_no_op(),
        "empty_cache": _new_no_op(),
        "set_device": _new_no_op(),
        "manual_seed": _manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "default_generators": _DefaultGenerators(),
        "_lazy_init": _new_no_op(),
        "_lazy_call": lambda function, **kwargs: function(),
        "is_current_stream_capturing": lambda: False,
    }


def _with_renamed_constants(code: types.CodeType) -> types.CodeType:
    def renamed(value: object) -> object:
        if isinstance(value, str):
            return RENAMED.get(value, value)
        if isinstance(value, tuple):
            return tuple(renamed(item) for item in value)
        if isinstance(value, types.CodeType):
            return _with_renamed_constants(value)
        return value

    constants = tuple(renamed(value) for value in code.co_consts)
    return code if constants == code.co_consts else code.replace(co_consts=constants)


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Plain functions, methods and static methods defined in `module` itself."""
    owners = [module] + [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    for owner in owners:
        for value in list(vars(owner).values()):
            function = getattr(value, "__func__", value)
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                yield function


def rename_constants(module: types.ModuleType) -> int:
    """Replace CUDA constants (`RENAMED`) in every function of `module`. Returns the number of
    changed functions."""
    num_changed = 0
    for function in _functions_of(module):
        code = _with_renamed_constants(function.__code__)
        if code is not function.__code__:
            function.__code__ = code
            num_changed += 1
    return num_changed


def _move_to_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Replacement of `moe_utils.maybe_move_tensor_to_cpu`. Upstream converts only GPU tensors to
    NumPy, but gloo's all-to-all needs its split sizes as a list-like."""
    if isinstance(tensor, torch.Tensor) and as_numpy:
        return tensor.numpy()
    return tensor


def _unless_alone(collective: Callable) -> Callable:
    """`collective`, skipped for a group of one rank that works in place. Gloo would copy the whole
    buffer, a tenth of an optimizer step; NCCL copies nothing."""

    def collect(
        output: torch.Tensor, source: torch.Tensor, *, group: Any, **options: object
    ) -> object:
        if group.size() == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, group=group, **options)

    return collect


def _gather_uneven(original: Callable) -> Callable:
    """`mappings._gather_along_first_dim` for parts of different lengths. Gloo's all-gather rejects
    them, so they are padded to the longest part. Needed for experts that are split over ranks
    (expert_tensor) and receive tokens of several expert-parallel ranks."""

    def gather(
        part: torch.Tensor, group: Any, sizes: list[int] | None = None, *extra_args: object
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return original(part, group, sizes, *extra_args)
        longest = max(sizes)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat(
            [padded_part[:size] for padded_part, size in zip(parts, sizes, strict=True)]
        )

    return gather


def _reduce_scatter_uneven(original: Callable) -> Callable:
    """`mappings._reduce_scatter_along_first_dim` for parts of different lengths: an all-reduce of
    the whole tensor, of which every rank keeps its part."""

    def reduce_scatter(
        whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *extra_args: object
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return original(whole, group, sizes, *extra_args)
        total = whole.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].contiguous()

    return reduce_scatter


def _replace_everywhere(name: str, original: Callable, replacement: Callable) -> None:
    """Rebind `name` in every loaded Megatron module that imported `original` by value."""
    import sys

    for module in list(sys.modules.values()):
        is_megatron = getattr(module, "__name__", "").startswith("megatron.core")
        if is_megatron and module.__dict__.get(name) is original:
            setattr(module, name, replacement)


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    """Make `torch.compile` return its function unchanged while Megatron's modules are imported.
    Otherwise inductor would query CUDA properties, and compile for half a minute at the first
    step."""

    def uncompiled(function: Callable | None = None, **options: object) -> Callable:
        return function if function is not None else lambda wrapped: wrapped

    compile_function = torch.compile
    torch.compile = uncompiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function  # type: ignore[assignment]


_installed = False


def install() -> None:
    """Adapt torch and Megatron-Core in this process to a machine without a GPU; idempotent.

    Raises RuntimeError if a CUDA device exists, because the stand-ins would hide it, or if a module
    of `MODULES_WITH_CONSTANTS` has no CUDA constants.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adaptations must not be installed where a GPU is present")
    stand_ins = _cuda_stand_ins()
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, stand_ins[name])
    torch.cuda.nvtx.range_push = _new_no_op()  # type: ignore[assignment]
    torch.cuda.nvtx.range_pop = _new_no_op()  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    with _without_compile():
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
        for module_name in MODULES_WITH_CONSTANTS:
            if rename_constants(importlib.import_module(module_name)) == 0:
                raise RuntimeError(f"{module_name} no longer names CUDA: drop it from the list")
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        for module_name in IMPORTED_EARLY:
            importlib.import_module(module_name)
    name = "maybe_move_tensor_to_cpu"
    _replace_everywhere(name, getattr(moe_utils, name), _move_to_host)
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    for name, wrap in (
        ("_gather_along_first_dim", _gather_uneven),
        ("_reduce_scatter_along_first_dim", _reduce_scatter_uneven),
    ):
        _replace_everywhere(name, getattr(mappings, name), wrap(getattr(mappings, name)))
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in WHOLE_BUFFER_COLLECTIVES:
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))
    _installed = True
