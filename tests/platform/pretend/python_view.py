"""What Python sees of the pretended device: `tensor.device`, `.to`, `torch.cuda`. `install` is for
the whole process and is never undone.
"""

import contextlib
import inspect
import itertools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._shard.sharded_tensor.api as sharded_tensor
import torch.nn.attention.varlen
from torch.utils._python_dispatch import _disable_current_modes

from tests.platform.pretend.device import (
    CPU,
    CUDA,
    STATE,
    PretendCuda,
    caller,
    is_cuda_device,
    note,
    on_cuda,
    true_device,
)

_plain_to = torch.Tensor.to
_plain_type = torch.Tensor.type
_plain_numpy = torch.Tensor.numpy
_plain_tolist = torch.Tensor.tolist
_GENERATOR_BYTES = 16  # of a CUDA generator's state; a CPU generator has 5,056
_TOTAL_MEMORY = 140 << 30


class _Download(torch.autograd.Function):
    """A copy on the CPU, differentiable."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        note(STATE.waits, "to the host")
        with _disable_current_modes():
            return tensor.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.to(CUDA)


def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and isinstance(args[0], torch.Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        named = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype = torch._C._nn._parse_to(*args, **named)[:2]  # type: ignore[attr-defined]
    if device is None or device.type == "meta":
        return _plain_to(self, *args, **kwargs)
    here, goes = on_cuda(self), device.type == "cuda"
    extra = {name: kwargs[name] for name in ("copy", "memory_format") if name in kwargs}
    if here == goes:
        return _plain_to(self, dtype or self.dtype, **extra)
    if here:
        host = _Download.apply(self)
        return _plain_to(host, dtype) if dtype else host
    if args and isinstance(args[0], torch.Tensor):
        return _plain_to(self, CUDA, dtype)
    return _plain_to(self, *map(_cuda, args), **{k: _cuda(v) for k, v in kwargs.items()})


def _cuda(argument: Any) -> Any:
    """cuda:0 for an argument that names a CUDA device, in whatever form."""
    is_number = isinstance(argument, int) and not isinstance(argument, bool)
    names = isinstance(argument, str | torch.device) or is_number
    return CUDA if names and is_cuda_device(argument) else argument


def _numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if on_cuda(self):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy @ {caller()}")
    return _plain_numpy(self, *args, **kwargs)


def _tolist(self: torch.Tensor) -> Any:
    if on_cuda(self):
        note(STATE.waits, "tolist")
    return _plain_tolist(self)


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return _plain_type(self, *args, **kwargs)
    name = _plain_type(self)
    return name.replace("torch.", "torch.cuda.") if on_cuda(self) else name


def _made_on_host(maker: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = maker(*args, **kwargs)
        return made.to(device) if device is not None else made

    return make


class Event:
    """A time stamp that has always been reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        note(STATE.waits, "event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class Stream:
    """The one stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.device = CUDA

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Event:
        return Event()

    def synchronize(self) -> None:
        note(STATE.waits, "stream.synchronize")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class _Generator:
    """The device's random generator: a state, and no numbers of its own."""

    def __init__(self) -> None:
        self.state = torch.zeros(_GENERATOR_BYTES, dtype=torch.uint8)

    def get_state(self, device: Any = None) -> torch.Tensor:
        return self.state.clone()

    def set_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        if new_state.numel() != _GENERATOR_BYTES:
            raise RuntimeError("RNG state is wrong size")  # torch's words
        self.state = new_state.clone()

    def manual_seed(self, seed: int) -> None:
        pass


def _varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """torch's variable-length kernel, [tokens, heads, width]: one causal product a document."""
    assert window_size == (-1, 0) and cu_seq_q.dtype == torch.int32 and on_cuda(cu_seq_q)
    with _disable_current_modes():
        cuts = _plain_tolist(cu_seq_q)
    rows = []
    for start, end in itertools.pairwise(cuts):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        if enable_gqa:
            k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
        scores = (q @ k.mT).float() / q.shape[-1] ** 0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype)
        rows.append((weights @ v).transpose(0, 1))
    return torch.cat(rows)


def install(name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0)) -> None:
    """Pretend one device of this name and compute capability, before the first CUDA tensor."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    _install_module(name, capability)
    tensor = torch.Tensor
    tensor.device = property(  # type: ignore[assignment]
        lambda self: (
            CUDA if true_device(self).type == "cpu" and on_cuda(self) else true_device(self)
        )
    )
    # ShardedTensor looks up what to do by the getter that torch.Tensor has when it is called.
    sharded = sharded_tensor._SHARDED_OPS
    sharded[tensor.device.__get__] = sharded[true_device]  # type: ignore[attr-defined]
    tensor.is_cuda = property(on_cuda)  # type: ignore[assignment]
    tensor.is_cpu = property(lambda self: not on_cuda(self))  # type: ignore[assignment]
    tensor.get_device = lambda self: 0 if on_cuda(self) else -1  # type: ignore[assignment]
    tensor.to = _to  # type: ignore[assignment]
    tensor.numpy = _numpy  # type: ignore[assignment]
    tensor.tolist = _tolist  # type: ignore[assignment]
    tensor.type = _type  # type: ignore[assignment]
    tensor.cpu = lambda self, *args, **kwargs: self.to(CPU)  # type: ignore[assignment]
    tensor.cuda = lambda self, *args, **kwargs: self.to(CUDA)  # type: ignore[assignment]
    tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]
    torch.tensor = _made_on_host(torch.tensor)
    torch.as_tensor = _made_on_host(torch.as_tensor)
    if "enable_gqa" in inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters:
        torch.nn.attention.varlen.varlen_attn = _varlen_attn  # type: ignore[assignment]
    PretendCuda().__enter__()


def _install_module(name: str, capability: tuple[int, int]) -> None:
    stream, generator = Stream(), _Generator()
    properties = types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=_TOTAL_MEMORY,
    )
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "device": lambda device: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "synchronize": lambda *args: note(STATE.waits, "cuda.synchronize"),
        "empty_cache": lambda: None,
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": generator.get_state,
        "set_rng_state": generator.set_state,
        "default_generators": (generator,),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (100 << 30, _TOTAL_MEMORY),
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **kwargs: call(),
    }
    for word, value in replaced.items():
        setattr(torch.cuda, word, value)
    for word in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, word, replaced[word])
    torch.cuda.nvtx.range_push = lambda *args: None  # type: ignore[assignment]
    torch.cuda.nvtx.range_pop = lambda *args: None  # type: ignore[assignment]
    torch.accelerator.current_stream = lambda device=None: stream  # type: ignore[assignment]
    torch.accelerator.current_device_index = lambda: 0
