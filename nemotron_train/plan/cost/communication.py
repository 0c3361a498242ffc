"""Communication of a rank in a training step: bytes by group, kind of collective and purpose.

Owns: these predictions. Counted are the tensor of an all-reduce, the input of a reduce-scatter or
an all-to-all, the output of an all-gather, and messages sent to another stage. The bytes on the
network depend on the algorithm: a ring of n ranks sends (n-1)/n of the count, an all-reduce twice
that.

Not counted: tensors of a few KiB (losses, norms, counts of routed tokens, the guard's agreement),
evaluation, checkpoints, and the exchange of telemetry and tensor scales between ranks. No torch.
tests/distributed/test_communication.py compares the predictions with the calls to torch in a step.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, lcm, prod

from nemotron_train.config.schema import Config, Dtype, RecomputeMode
from nemotron_train.plan.architecture.layers import (
    LayerKind,
    LayerShape,
    Sharding,
    Tensor,
    embedding_tensors,
    expert_width,
    layers,
)
from nemotron_train.plan.cost.memory import stage_tensors
from nemotron_train.plan.cost.operators import GPU, WIDE, Local
from nemotron_train.plan.derive import Derived

_ALIGNED, _BUCKET = 64, 128  # elements; Megatron's optimizer/param_layout.py
_FLOAT32_NAMES = ("A_log", ".D", "dt_bias")  # always FP32 (model.mamba.layer)
ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, SEND = "all-to-all", "send"


@dataclass(frozen=True)
class Traffic:
    """Bytes per step that a rank passes to one kind of collective for one purpose. group: an axis
    of `report.plan.ranks`, or `embedding` (the first and the last pipeline rank)."""

    group: str
    collective: str
    purpose: str
    size: int


def rank_traffic(config: Config, derived: Derived) -> list[list[Traffic]]:
    """The traffic of a rank in one step, for every pipeline rank; equal purposes are added up. With
    expert parallelism it is the mean over the expert-parallel ranks, because the routing decides
    the share of each."""
    local = Local(config, derived.plan.at(0).formats, GPU)
    tensors, num_ranks = stage_tensors(config, derived), config.parallel.pipeline
    result = []
    for rank in range(num_ranks):
        rank_stages = range(rank, len(tensors), num_ranks)
        per_micro_batch = [t for stage in rank_stages for t in _micro_batch(local, derived, stage)]
        per_step = [t for stage in rank_stages for t in _gradients(local, derived, tensors[stage])]
        per_step += _embedding(local, rank)
        times = derived.micro_batches_per_step
        result.append(_sum([*((t, times) for t in per_micro_batch), *((t, 1) for t in per_step)]))
    return result


def _sum(parts: Iterable[tuple[Traffic, int]]) -> list[Traffic]:
    sums: dict[tuple[str, str, str], int] = {}
    for part, times in parts:
        key = (part.group, part.collective, part.purpose)
        sums[key] = sums.get(key, 0) + part.size * times
    return [Traffic(*key, size) for key, size in sums.items() if size > 0]


# A micro-batch -------------------------------------------------------------------------------


def _micro_batch(local: Local, derived: Derived, stage: int) -> Iterator[Traffic]:
    """Forward and backward pass of one pipeline stage."""
    sizes, shapes = derived.layers_per_stage, layers(local.config.model)
    decoder = [shape for shape in shapes if not shape.in_mtp]
    start, last = sum(sizes[:stage]), stage == len(sizes) - 1
    depths = local.config.model.mtp.depths
    for shape in decoder[start : start + sizes[stage]]:
        yield from _layer(local, shape)
    if stage == 0:
        yield from _row(local)  # the embedding reduces its output like a row-parallel linear
    if last:
        for _ in range(1 + depths):
            yield from _column(local, "output_layer", 1)
            yield from _cross_entropy(local)
        for _ in range(depths):
            yield from _row(local)
            yield from _column(local, "mtp.layers.0.eh_proj", 2)
            yield from _gathered_join(local)
            for shape in shapes:
                if shape.in_mtp:
                    yield from _layer(local, shape)
    if len(sizes) > 1 and local.config.parallel.pipeline > 1:
        # Megatron's pipeline_parallel/p2p_communication.py.
        yield Traffic("pipeline", SEND, "activations to the next stage", local.stream * (not last))
        yield Traffic("pipeline", SEND, "gradients to the one before", local.stream * (stage > 0))


def _layer(local: Local, shape: LayerShape) -> Iterator[Traffic]:
    recompute = local.config.train.recompute
    if shape.kind == LayerKind.mamba:
        yield from _column(local, f"{shape.path}.mixer.in_proj", 1, recompute.mamba)
        yield from _row(local)
        yield from _mamba_heads(local, recompute.mamba)
    elif shape.kind == LayerKind.attention:
        yield from _column(local, f"{shape.path}.self_attention.linear_qkv", 1, recompute.attention)
        yield from _row(local)
        yield from _attention_heads(local, recompute.attention)
    else:
        if local.config.model.moe.shared_expert_hidden_size > 0:
            path = f"{shape.path}.mlp.shared_experts.linear_fc1"
            yield from _column(local, path, 1, recompute.moe)
            # In the middle of the layer, so full recomputation repeats it.
            yield from _row(local, recompute.moe)
        yield from _dispatch(local, recompute.moe)


def _column(
    local: Local, path: str, width: int, recompute: RecomputeMode = RecomputeMode.off
) -> Iterator[Traffic]:
    """A column-parallel linear with `width` x hidden inputs (Megatron's tensor_parallel/layers.py).

    Under sequence parallelism it all-gathers its input in the forward pass and once more for the
    weight gradient (an emulated format saves the operand instead, `precision.linear`), and
    reduce-scatters the input gradient. Otherwise it all-reduces the input gradient."""
    size = width * local.gathered
    if local.splits_sequence:
        formats = local.formats.get(path)
        saves_operand = formats is not None and formats.is_quantized
        times = 1 + (not saves_operand) + (recompute == RecomputeMode.full)
        yield Traffic("tensor", ALL_GATHER, "activations", size * times)
        yield Traffic("tensor", REDUCE_SCATTER, "activations", size)
    elif local.config.parallel.tensor > 1:
        yield Traffic("tensor", ALL_REDUCE, "activations", size)


def _row(local: Local, recompute: RecomputeMode = RecomputeMode.off) -> Iterator[Traffic]:
    """A row-parallel linear: the reverse of `_column`. At the end of a layer no operator saves its
    reduced output, and torch's checkpoint stops the recomputation before it."""
    times = 1 + (recompute == RecomputeMode.full)
    if local.splits_sequence:
        yield Traffic("tensor", REDUCE_SCATTER, "activations", local.gathered * times)
        yield Traffic("tensor", ALL_GATHER, "activations", local.gathered)
    elif local.config.parallel.tensor > 1:
        yield Traffic("tensor", ALL_REDUCE, "activations", local.gathered * times)


def _gathered_join(local: Local) -> Iterator[Traffic]:
    """The output of eh_proj: all-gathered over features, then split by tokens under sequence
    parallelism (Megatron's transformer/multi_token_prediction.py)."""
    if local.config.parallel.tensor > 1:
        times = 1 + local.splits_sequence
        yield Traffic("tensor", ALL_GATHER, "activations", local.gathered * times)


def _cross_entropy(local: Local) -> Iterator[Traffic]:
    """model.cross_entropy: per token, the maximum logit and two sums."""
    if local.config.parallel.tensor > 1:
        yield Traffic("tensor", ALL_REDUCE, "logits' sums", 3 * WIDE * local.tokens)


# Heads and experts ----------------------------------------------------------------------------


def _exchange(local: Local, parts: Iterable[tuple[int, int]]) -> int:
    """model.context: bytes of an all-to-all that distributes the heads of a tensor-parallel rank
    over the context-parallel ranks. parts: (heads, channels per head); if there are fewer heads
    than ranks, each is sent to several ranks."""
    ranks = local.config.parallel.context
    elements_per_token = sum(max(1, count // ranks) * width for count, width in parts)
    return ranks * local.tokens * elements_per_token * local.element


def _mamba_heads(local: Local, recompute: RecomputeMode) -> Iterator[Traffic]:
    mamba, tensor = local.config.model.mamba, local.config.parallel.tensor
    heads, states = mamba.heads // tensor, (mamba.groups // tensor, mamba.state_size)
    scattered = _exchange(local, [(heads, mamba.head_dim), states, states, (heads, 1)])
    returned = _exchange(local, [(heads, mamba.head_dim)])
    times = 2 + (recompute != RecomputeMode.off)
    if local.config.parallel.context > 1:
        yield Traffic("context", ALL_TO_ALL, "Mamba-2 heads", times * (scattered + returned))


def _attention_heads(local: Local, recompute: RecomputeMode) -> Iterator[Traffic]:
    """Selective recomputation ends before the all-to-all of the result."""
    attention, tensor = local.config.model.attention, local.config.parallel.tensor
    query = (attention.heads // tensor, attention.head_dim)
    key = (max(1, attention.key_value_heads // tensor), attention.head_dim)
    scattered = _exchange(local, [query, key, key]) * (2 + (recompute != RecomputeMode.off))
    returned = _exchange(local, [query]) * (2 + (recompute == RecomputeMode.full))
    if local.config.parallel.context > 1:
        yield Traffic("context", ALL_TO_ALL, "attention heads", scattered + returned)


def _dispatch(local: Local, recompute: RecomputeMode) -> Iterator[Traffic]:
    """Megatron's transformer/moe/token_dispatcher.py: tokens in latent width and their FP32
    probabilities go to the experts, results come back; the same in the backward pass. With
    expert_tensor above 1, tokens are all-gathered and outputs are reduce-scattered."""
    moe, parallel = local.config.model.moe, local.config.parallel
    copies = local.stream_tokens * moe.experts_per_token
    tokens = copies * expert_width(local.config.model) * local.element
    full = recompute == RecomputeMode.full
    # The second latent projection saves the combined result. Without it no operator does, and the
    # recomputation stops before the combine.
    dispatch_times, combine_times = 2 + full, 2 + (full and moe.latent_size > 0)
    if parallel.expert > 1:
        yield Traffic("expert", ALL_TO_ALL, "dispatch", (tokens + WIDE * copies) * dispatch_times)
        yield Traffic("expert", ALL_TO_ALL, "combine", tokens * combine_times)
    if parallel.expert_tensor > 1:
        gathered = tokens * dispatch_times + WIDE * copies * (dispatch_times - 1)
        scattered = tokens * combine_times + WIDE * copies
        ranks = parallel.expert_tensor
        yield Traffic("expert tensor", ALL_GATHER, "tokens", ranks * gathered)
        yield Traffic("expert tensor", REDUCE_SCATTER, "tokens", ranks * scattered)


# Gradients and parameters ---------------------------------------------------------------------


def _gradients(local: Local, derived: Derived, tensors: list[Tensor]) -> Iterator[Traffic]:
    """Once per step: Megatron's distributed/param_and_grad_buffer.py and finalize_model_grads.py.

    Gradients are FP32, parameters have their own dtype. Experts have separate buffers if their
    ranks differ from those of the dense layers."""
    config, parallel = local.config, local.config.parallel
    if local.splits_sequence:
        replicated = sum(prod(t.shape) for t in tensors if t.sharding == Sharding.replicated)
        yield Traffic("tensor", ALL_REDUCE, "gradients of what is not cut", WIDE * replicated)
    separate_experts = parallel.expert > 1 or parallel.expert_tensor != parallel.tensor
    routed = [t for t in tensors if t.sharding == Sharding.expert and separate_experts]
    dense = [t for t in tensors if t not in routed]
    replicas = (derived.data_parallel * parallel.context, derived.expert_data_parallel)
    for name, held, ranks in zip(("data", "expert data"), (dense, routed), replicas, strict=True):
        for group in _buffers(config, held):
            elements, size = _elements(config, group, ranks), _parameter_bytes(config, group)
            if ranks == 1 or not group:
                continue
            if not parallel.distributed_optimizer:
                yield Traffic(name, ALL_REDUCE, "gradients", WIDE * elements)
                continue
            yield Traffic(name, REDUCE_SCATTER, "gradients", WIDE * elements)
            # UPSTREAM(megatron-core 0.19.2): separate expert buffers have a separate optimizer, and
            # both optimizers gather all parameters. With overlap they are gathered only once.
            times = 2 if separate_experts and _has_experts(config) else 1
            times = 1 if parallel.overlap_parameter_gather else times
            yield Traffic(name, ALL_GATHER, "parameters", times * size * elements)


def _has_experts(config: Config) -> bool:
    return any(shape.kind == LayerKind.moe for shape in layers(config.model))


def _buffers(config: Config, tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors by dtype, as Megatron puts them into buffers."""
    wide = [t for t in tensors if t.name.endswith(_FLOAT32_NAMES)]
    if config.precision.parameter_dtype != Dtype.bfloat16:
        return [tensors]
    return [[t for t in tensors if t not in wide], wide]


def _parameter_bytes(config: Config, tensors: list[Tensor]) -> int:
    wide = any(t.name.endswith(_FLOAT32_NAMES) for t in tensors)
    return 2 if config.precision.parameter_dtype == Dtype.bfloat16 and not wide else WIDE


def _elements(config: Config, tensors: list[Tensor], replicas: int) -> int:
    """Elements of a buffer on one rank. The distributed optimizer aligns every parameter, and pads
    the end so that all replicas have equal shares. With several buckets the padding is larger than
    computed here, by less than 1 KiB."""
    parallel = config.parallel
    num_shards = {
        Sharding.replicated: 1,
        Sharding.tensor: parallel.tensor,
        Sharding.expert: parallel.expert * parallel.expert_tensor,
    }
    counts = [prod(t.shape) // num_shards[t.sharding] for t in tensors]
    if not parallel.distributed_optimizer:
        return sum(counts)
    multiple = lcm(replicas, _BUCKET)
    return ceil(sum(ceil(n / _ALIGNED) * _ALIGNED for n in counts) / multiple) * multiple


def _embedding(local: Local, rank: int) -> Iterator[Traffic]:
    """The gradient of the embedding, which multi-token prediction replicates on the last stage."""
    parallel, model = local.config.parallel, local.config.model
    if parallel.pipeline > 1 and model.mtp.depths > 0 and rank in (0, parallel.pipeline - 1):
        (table,) = embedding_tensors(model)
        size = WIDE * prod(table.shape) // parallel.tensor
        yield Traffic("embedding", ALL_REDUCE, "gradients of the embedding", size)
