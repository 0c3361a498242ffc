"""Our half of the step benchmark: a complete training step of our model on random tokens.

Uses the same code path as `pretrain`: Megatron's schedule, gradient buffers, AdamW, the metrics.
"""

from collections.abc import Callable, Sequence

import numpy as np

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import Config
from nemotron_train.plan.derive import derive
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform.runtime import usable_platform

DIMENSIONS = (
    "model.name=benchmark",
    "model.pattern=MEMEM*EMEMEM*E",
    "model.hidden_size=256",
    "model.vocab_size=4096",
    "model.attention.heads=8",
    "model.attention.key_value_heads=2",
    "model.attention.head_dim=32",
    "model.mamba.heads=16",
    "model.mamba.head_dim=32",
    "model.mamba.state_size=64",
    "model.mamba.groups=2",
    "model.mamba.chunk_size=64",
    "model.moe.experts=32",
    "model.moe.experts_per_token=4",
    "model.moe.expert_hidden_size=128",
    "model.moe.shared_expert_hidden_size=256",
    "model.moe.latent_size=64",
    "model.mtp.depths=0",
)
NUM_ROWS, NUM_TOKENS = 4, 512


def configuration(dtype: str, overrides: Sequence[str] = ()) -> Config:
    """The benchmark's configuration. `dtype`: "float32" or "bfloat16"."""
    return compose_config(
        [
            *DIMENSIONS,
            f"precision={'fp32' if dtype == 'float32' else 'bf16'}",
            f"train.sequence_length={NUM_TOKENS}",
            f"train.micro_batch_sequences={NUM_ROWS}",
            f"train.global_batch_tokens={NUM_ROWS * NUM_TOKENS}",
            f"train.validation_tokens={NUM_ROWS * NUM_TOKENS}",
            *overrides,
        ]
    )


class RandomBatches:
    """Training data: random tokens, one document per row, independent of the data state."""

    def __init__(self, vocab_size: int) -> None:
        self._random = np.random.default_rng(0)
        self._vocab_size = vocab_size

    def take(self, state: object, num_sequences: int, rank_slice: tuple[int, int]) -> tuple:
        """(batch with the rows of `rank_slice`, unchanged state)."""
        from nemotron_train.data.batches import Batch

        shape = (rank_slice[1] - rank_slice[0], NUM_TOKENS + 1)
        tokens = self._random.integers(0, self._vocab_size, shape)
        batch = Batch(
            tokens_BS=tokens[:, :-1].copy(),
            labels_BS=tokens[:, 1:].copy(),
            loss_mask_BS=np.ones((shape[0], NUM_TOKENS), np.float32),
            document_ids_BS=np.zeros((shape[0], NUM_TOKENS), np.int64),
            sample_ids_B=np.arange(shape[0]),
            origins_B3=np.zeros((shape[0], 3), np.int64),
        )
        return batch, state


def our_step(
    dtype: str, num_threads: int = 2, overrides: Sequence[str] = ()
) -> Callable[[], float]:
    """Builds the model; returns a function that takes one step and returns its loss."""
    return build_step(configuration(dtype, overrides), num_threads)


def build_step(config: Config, num_threads: int = 2) -> Callable[[], float]:
    """As `our_step`, for any configuration with sequence length NUM_TOKENS."""
    platform = usable_platform(num_threads)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemotron_train.assemble.build import build_model, wrap_data_parallel
    from nemotron_train.optim.build import build_optimizer
    from nemotron_train.platform import groups as process_groups
    from nemotron_train.precision.attach import PrecisionControl
    from nemotron_train.run_folder.progress import Progress
    from nemotron_train.train.guard.guard import Guard
    from nemotron_train.train.supply import DataSupply
    from nemotron_train.train.train_step import TrainStep

    groups = process_groups.start(config.parallel, platform.backend)
    model_parallel_cuda_manual_seed(config.train.seed)
    model = wrap_data_parallel(
        build_model(config, resolve_plan(config), platform, groups), config, groups
    )
    optimizer = build_optimizer(config, [model], groups, platform)
    batches = RandomBatches(config.model.vocab_size)
    train_step = TrainStep(
        config,
        derive(config),
        [model],
        optimizer,
        DataSupply(config, derive(config), batches, groups, platform.device),  # type: ignore[arg-type]
        groups,
        platform.device,
        PrecisionControl([model.module], config, resolve_plan(config), groups),
        Guard(config.guard, platform.device),
    )
    progress = Progress(0, 0, None)  # type: ignore[arg-type]

    def step() -> float:
        return float(train_step(progress).metrics["loss"])  # type: ignore[arg-type]

    return step
