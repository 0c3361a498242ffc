"""Builds the model of a configuration on this rank: specs, initial weights, Megatron's DDP.

A rank holds one chunk of the model: the layers of its pipeline stage. With interleaved stages
(`parallel.virtual_pipeline`) it holds several, in the order of the forward pass.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import PerBufferParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from nemotron_train.assemble.fused import start_user_buffers
from nemotron_train.assemble.initialize import initialize
from nemotron_train.assemble.specs import Parts, parts, stack_submodules
from nemotron_train.assemble.transformer_config import transformer_config
from nemotron_train.config.schema import Config
from nemotron_train.model.hybrid import NemotronModel, stack_spec
from nemotron_train.model.moe.layer import LatentMoELayer
from nemotron_train.plan.architecture.stages import stage_pattern
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.platform.device import Platform
from nemotron_train.precision.attach import emulates
from nemotron_train.precision.native import transformer_fields


def megatron_pattern(config: Config) -> str:
    """The layer pattern in Megatron's grammar: "|" between pipeline stages, then "/" and the
    block's pattern for each multi-token-prediction depth."""
    mtp = config.model.mtp
    return stage_pattern(config) + f"/{mtp.pattern}" * mtp.depths


def build_model(
    config: Config,
    plan: PrecisionPlan,
    platform: Platform,
    groups: ProcessGroupCollection,
    native: bool = False,
) -> NemotronModel:
    """`build_chunks` for a rank with one chunk."""
    (model,) = build_chunks(config, plan, platform, groups, native)
    return model


def build_chunks(
    config: Config,
    plan: PrecisionPlan,
    platform: Platform,
    groups: ProcessGroupCollection,
    native: bool = False,
) -> list[NemotronModel]:
    """This rank's chunks of the model, with initial weights, on the platform's device.

    native: Transformer Engine computes the plan's block-scaled formats (`precision.backend`). Under
    `torch.device("meta")` the parameters stay on the meta device, without values.
    """
    # All chunks share one TransformerConfig: the trainer sets functions on the first chunk's, and
    # the pipeline schedule reads them there.
    fields = transformer_fields(config, plan) if native else {}
    model_config = transformer_config(config, platform, fields)
    emulated = emulates(config, plan) and not native
    switches = platform.switches
    part = parts(platform.transformer_engine, emulated, native, switches)
    if switches.tensor_parallel_overlap:
        start_user_buffers(config, quantized=native)
    return [
        _build_chunk(config, model_config, part, groups, native, chunk)
        for chunk in range(config.parallel.virtual_pipeline)
    ]


def _build_chunk(
    config: Config,
    model_config: TransformerConfig,
    part: Parts,
    groups: ProcessGroupCollection,
    native: bool,
    chunk: int,
) -> NemotronModel:
    num_chunks = config.parallel.virtual_pipeline
    rank, num_ranks = groups.pp.rank(), groups.pp.size()
    submodules = stack_submodules(config, part, native)
    model = NemotronModel(
        config=model_config,
        hybrid_stack_spec=stack_spec(submodules, part.norm),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.train.sequence_length,
        hybrid_layer_pattern=megatron_pattern(config),
        pre_process=rank == 0 and chunk == 0,
        post_process=rank == num_ranks - 1 and chunk == num_chunks - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
        pg_collection=groups,
        vp_stage=chunk if num_chunks > 1 else None,
    )
    model.detaches_mtp = config.train.mtp_detached
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in config.train.frozen):
            parameter.requires_grad_(False)
    if next(model.parameters()).device.type != "meta":
        initialize(model, config.model, config.train.seed)
    return model


def wrap_chunks(
    chunks: Sequence[NemotronModel], config: Config, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """`wrap_data_parallel` of every chunk."""
    return [wrap_data_parallel(chunk, config, groups) for chunk in chunks]


def wrap_data_parallel(
    model: NemotronModel, config: Config, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    """Megatron's DDP: FP32 gradient buffers, summed (not averaged) over data-parallel ranks.
    Sets `shows_gradient` on every parameter."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_gradient_reduce,
        overlap_param_gather=parallel.overlap_parameter_gather,
        bucket_size=parallel.bucket_parameters,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    layout = None
    if parallel.distributed_optimizer:
        layout = DistributedOptimizer.compute_full_param_layout(
            [p for p in model.parameters() if p.requires_grad],
            # None: one bucket, since nothing overlaps.
            parallel.bucket_parameters if parallel.overlap_gradient_reduce else None,
            groups.dp_cp.size(),
            ddp_config,
            expert_data_parallel_world_size=groups.expt_dp.size(),
        )
        for buffer in layout.layouts.values():
            _count_padding_between_buckets(buffer)
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=ddp_config,
        module=model,
        pg_collection=groups,
        full_param_layout=layout,
    )
    parameter: Any
    for parameter in model.parameters():
        parameter.shows_gradient = parallel.overlap_gradient_reduce  # see `model.hybrid`
    if parallel.overlap_parameter_gather:
        _wait_for_whole_layers(wrapped)
    return wrapped


def _wait_for_whole_layers(wrapped: DistributedDataParallel) -> None:
    """Make each MoE layer wait for the all-gather of all its parameters before it computes.

    UPSTREAM(megatron-core 0.19.2): a module waits for its own parameters when it is called. But the
    MoE layer reads the weights of experts and router without calling the modules that hold them.
    """
    model: Any = wrapped

    def wait(module: torch.nn.Module, *unused: object) -> None:
        for parameter in module.parameters():
            group = model.param_to_bucket_group.get(parameter)
            if group is not None:
                group.finish_param_sync()

    for module in wrapped.modules():
        if isinstance(module, LatentMoELayer):
            module.register_forward_pre_hook(wait)


def _count_padding_between_buckets(buffer: PerBufferParamLayout) -> None:
    """Count the padding of all buckets but the last as elements.

    UPSTREAM(megatron-core 0.19.2): a checkpoint of the distributed optimizer leaves out the
    padding between buckets and then reads parameters at offsets that include it. With an
    embedding on two pipeline stages (its own bucket), the optimizer state would be shifted and
    its end lost; upstream warns of 'data corruption' and continues.
    """
    for bucket, (start, end) in enumerate(buffer.bucket_indices[:-1]):
        buffer.per_bucket_numel_unpadded[bucket] = end - start


def count_parameters(model: torch.nn.Module) -> int:
    """Number of elements of all parameters of `model` on this rank."""
    return sum(parameter.numel() for parameter in model.parameters())
