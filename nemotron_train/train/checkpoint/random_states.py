"""Saves and restores the states of a process's random generators, as JSON values.

Training does not use these generators. Initial weights are drawn by parameter name before the first
step, the random words of stochastic rounding are a function of the step, and the data has its own
permutation. The states are saved anyway, so that future users (a dropout, an experiment) resume
exactly.
"""

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemotron_train.platform.device import (
    device_kind,
    device_random_state,
    set_device_random_state,
)


def capture() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and the device, and of Megatron's tracker.

    Megatron's tracker holds named device generators, one per kind of parallelism.
    """
    tracker: Any = get_cuda_rng_tracker()
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, _to_text(keys.tobytes()), position, has_gauss, cached],
        "torch": _from_tensor(torch.get_rng_state()),
        "device": _from_tensor(device_random_state()),
        "device_kind": device_kind(),
        "megatron": {
            name: _from_tensor(state)
            for name, state in tracker.get_states().items()
            if isinstance(state, torch.Tensor)
        },
    }


def restore(states: dict[str, Any]) -> None:
    """Set all generators to the states that `capture` returned. Those of the device, and Megatron's
    named ones, only if they were captured on the same kind of device (CPU or CUDA)."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    key_words = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state((name, key_words, position, has_gauss, cached))
    torch.set_rng_state(_to_tensor(states["torch"]))
    device_state = _to_tensor(states["device"])
    kind = states.get("device_kind") or _kind_of(device_state)  # older checkpoints do not say
    if kind != device_kind():
        return  # the generators of another device kind cannot be restored here
    set_device_random_state(device_state)
    tracker: Any = get_cuda_rng_tracker()
    saved_states = {name: _to_tensor(text) for name, text in states["megatron"].items()}
    tracker.set_states({**tracker.get_states(), **saved_states})


def _kind_of(state: torch.Tensor) -> str:
    """The kind of device of a generator's state: a CUDA generator has 16 bytes (seed and offset), a
    CPU's Mersenne Twister thousands."""
    return "cuda" if state.numel() <= 64 else "cpu"


def _to_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _from_tensor(state: torch.Tensor) -> str:
    return _to_text(state.cpu().numpy().tobytes())


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
