"""The random generators of a process: their states as JSON values, and back.

Training draws nothing from them: weights are drawn by name before the first step, stochastic
rounding's words are a function of the step, data has its own permutation. They are saved all the
same, so that whatever draws one day (a dropout, an experiment) resumes exactly.
"""

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nemotron_train.platform.device import device_random_state, set_device_random_state


def capture() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, the device's, and Megatron's named ones
    (the device's, one a kind of parallelism)."""
    tracker: Any = get_cuda_rng_tracker()
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, _to_text(keys.tobytes()), position, has_gauss, cached],
        "torch": _from_tensor(torch.get_rng_state()),
        "device": _from_tensor(device_random_state()),
        "megatron": {
            name: _from_tensor(state)
            for name, state in tracker.get_states().items()
            if isinstance(state, torch.Tensor)
        },
    }


def restore(states: dict[str, Any]) -> None:
    """The inverse of `capture`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    words = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state((name, words, position, has_gauss, cached))
    torch.set_rng_state(_to_tensor(states["torch"]))
    set_device_random_state(_to_tensor(states["device"]))
    tracker: Any = get_cuda_rng_tracker()
    saved = {name: _to_tensor(text) for name, text in states["megatron"].items()}
    tracker.set_states({**tracker.get_states(), **saved})


def _to_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _from_tensor(state: torch.Tensor) -> str:
    return _to_text(state.cpu().numpy().tobytes())


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
