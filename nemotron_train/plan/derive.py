"""Values derived from a configuration: one frozen `Derived` object, which holds the precision plan.

Owns: the derived values. The configuration is checked first (`plan.checks`) and never modified. No
torch.
"""

from dataclasses import dataclass, fields
from typing import Any

from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import parameters, training_flops
from nemotron_train.plan.architecture.stages import stages
from nemotron_train.plan.checks import check
from nemotron_train.plan.precision.resolve import PrecisionPlan, resolve_plan


@dataclass(frozen=True)
class Derived:
    """Values derived from a configuration on `num_ranks` ranks. A step is one optimizer step on one
    global batch. All fields except the plan are ints, strings or a tuple of ints; `derived.yaml`
    stores them (`numbers`)."""

    num_ranks: int
    data_parallel: int  # replicas of the dense layers, each of tensor x pipeline x context ranks
    expert_data_parallel: int  # replicas of each expert
    sequences_per_step: int
    micro_batches_per_step: int  # gradient accumulation steps of one replica
    tokens_per_step: int
    total_steps: int  # the last step uses a whole batch and may exceed train.total_tokens
    warmup_steps: int  # until the peak rate; for display only, because the schedule counts tokens
    decay_steps: int  # steps of the decay; for display only
    validation_sequences: int
    num_layers: int  # layers of the decoder
    layers_per_stage: tuple[int, ...]  # stage s is on pipeline rank s % pipeline
    parameter_dtype: str
    parameters: int  # with multi-token prediction, without expert biases
    active_parameters: int  # with embedding and output layer, without multi-token prediction
    training_flops_per_token: int
    vocab_per_rank: int
    attention_heads_per_rank: int
    key_value_heads_per_rank: int  # at least 1: several ranks may share a head
    mamba_heads_per_rank: int
    mamba_groups_per_rank: int
    experts_per_rank: int
    plan: PrecisionPlan

    def numbers(self) -> dict[str, Any]:
        """Every field except the plan, which the run folder stores as precision.txt."""
        names = [entry.name for entry in fields(self) if entry.name != "plan"]
        return {name: getattr(self, name) for name in names}


def derive(config: Config, num_ranks: int = 1) -> Derived:
    """Check the configuration on `num_ranks` ranks and compute the derived values.

    Raises ConfigError at the first violation: one line with the knob or knobs, the value and what
    would be valid.
    """
    check(config, num_ranks)
    plan = resolve_plan(config)
    layers_per_stage = tuple(len(stage.pattern) for stage in stages(config))
    parallel, train, optim = config.parallel, config.train, config.optim
    data_parallel = num_ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    expert_ranks = parallel.pipeline * parallel.expert * parallel.expert_tensor
    batch, total = train.global_batch_tokens, train.total_tokens
    total_steps = _ceil_divide(total, batch)
    steps_before_decay = (total - optim.decay_tokens) // batch
    sequences = batch // train.sequence_length
    counts = parameters(config.model)
    return Derived(
        num_ranks=num_ranks,
        data_parallel=data_parallel,
        expert_data_parallel=num_ranks // expert_ranks,
        sequences_per_step=sequences,
        micro_batches_per_step=sequences // (train.micro_batch_sequences * data_parallel),
        tokens_per_step=batch,
        total_steps=total_steps,
        warmup_steps=_ceil_divide(optim.warmup_tokens, batch),
        decay_steps=total_steps - steps_before_decay if optim.decay_tokens > 0 else 0,
        validation_sequences=train.validation_tokens // train.sequence_length,
        num_layers=sum(layers_per_stage),
        layers_per_stage=layers_per_stage,
        parameter_dtype=config.precision.parameter_dtype.value,
        parameters=counts.total_with_mtp,
        active_parameters=counts.active_with_embeddings,
        training_flops_per_token=training_flops(config.model, train.sequence_length),
        vocab_per_rank=config.model.vocab_size // parallel.tensor,
        attention_heads_per_rank=config.model.attention.heads // parallel.tensor,
        key_value_heads_per_rank=max(1, config.model.attention.key_value_heads // parallel.tensor),
        mamba_heads_per_rank=config.model.mamba.heads // parallel.tensor,
        mamba_groups_per_rank=config.model.mamba.groups // parallel.tensor,
        experts_per_rank=config.model.moe.experts // parallel.expert,
        plan=plan,
    )


def _ceil_divide(value: int, divisor: int) -> int:
    return -(-value // divisor)
