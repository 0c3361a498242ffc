"""The platform prepared and a grid of one rank, for tests that build Megatron modules."""

from collections.abc import Iterator

import pytest

from nemotron_train.platform import device

PLATFORM = device.prepare()  # before a test module imports Megatron-Core


@pytest.fixture(scope="session")
def groups() -> Iterator[object]:
    """Megatron's process groups over this one process."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_train.config.schema import ParallelConfig
    from nemotron_train.platform import groups as process_groups

    started = process_groups.start(ParallelConfig(), PLATFORM.backend)
    model_parallel_cuda_manual_seed(1234)
    yield started
    process_groups.stop()
