"""Random states through JSON: the draws after loading equal the original draws.

Second truth: the generators themselves. On a CPU the device's generator is torch's.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from nemotron_train.run_folder import checkpoint_metadata
from nemotron_train.train.checkpoint import random_states


def drawn() -> list[float]:
    """A few numbers of every generator, including the cached second values of the gaussians."""
    numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    numbers += torch.rand(3).tolist()
    with get_cuda_rng_tracker().fork():
        numbers += torch.rand(3).tolist()
    return [float(number) for number in numbers]


def test_the_same_numbers_again(groups: object) -> None:
    model_parallel_cuda_manual_seed(7)
    drawn()
    states = json.loads(json.dumps(random_states.capture()))
    first = drawn()
    assert drawn() != first
    random_states.restore(states)
    assert drawn() == first


def test_equal_ranks_share_a_state(tmp_path: Path) -> None:
    """Three ranks, two states. Another number of ranks gets none."""
    text = checkpoint_metadata.random_text([{"a": 1}, {"b": 2}, {"a": 1}])
    assert len(json.loads(text)["states"]) == 2
    (tmp_path / checkpoint_metadata.RANDOM).write_text(text)
    found = [checkpoint_metadata.random_state_of(tmp_path, rank, 3) for rank in range(3)]
    assert found == [{"a": 1}, {"b": 2}, {"a": 1}]
    assert checkpoint_metadata.random_state_of(tmp_path, 0, 2) is None
