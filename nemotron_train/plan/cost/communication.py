"""What a rank hands to collectives in a training step, in bytes, by group and kind of collective.

Counted: the tensor of an all-reduce, what goes into a reduce-scatter or an all-to-all, what comes
out of an all-gather, a message sent to another stage. What then crosses wires depends on the
algorithm: a ring of n ranks sends (n-1)/n of it, an all-reduce twice that.

Left out: numbers of a few KiB (losses, norms, counts of routed tokens, the guard's agreement),
evaluation, checkpoints, what telemetry and tensor scales of several ranks exchange. No torch.
tests/distributed/test_communication.py holds the rest against what a step hands to torch.
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
_KEPT_WIDE = ("A_log", ".D", "dt_bias")  # FP32 whatever the parameters are (model.mamba.layer)
ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, SEND = "all-to-all", "send"


@dataclass(frozen=True)
class Traffic:
    """Bytes a step that a rank hands to one kind of collective for one purpose. `group` is an axis
    of `report.plan.ranks`, or `embedding`: the first and the last pipeline rank."""

    group: str
    collective: str
    purpose: str
    size: int


def rank_traffic(config: Config, derived: Derived) -> list[list[Traffic]]:
    """A rank's traffic in a step, for every pipeline rank; equal purposes added up. With experts
    on several ranks it is the mean over them: routing decides who gets more."""
    local = Local(config, derived.plan.at(0).formats, GPU)
    tensors, num_ranks = stage_tensors(config, derived), config.parallel.pipeline
    found = []
    for rank in range(num_ranks):
        own = range(rank, len(tensors), num_ranks)
        passes = [t for stage in own for t in _micro_batch(local, derived, stage)]
        step = [t for stage in own for t in _gradients(local, derived, tensors[stage])]
        step += _embedding(local, rank)
        again = derived.micro_batches_per_step
        found.append(_added_up([*((t, again) for t in passes), *((t, 1) for t in step)]))
    return found


def _added_up(parts: Iterable[tuple[Traffic, int]]) -> list[Traffic]:
    sums: dict[tuple[str, str, str], int] = {}
    for part, times in parts:
        key = (part.group, part.collective, part.purpose)
        sums[key] = sums.get(key, 0) + part.size * times
    return [Traffic(*key, size) for key, size in sums.items() if size > 0]


# A micro-batch -------------------------------------------------------------------------------


def _micro_batch(local: Local, derived: Derived, stage: int) -> Iterator[Traffic]:
    """Forward and backward through one pipeline stage."""
    sizes, shapes = derived.layers_per_stage, layers(local.config.model)
    decoder = [shape for shape in shapes if not shape.in_mtp]
    start, last = sum(sizes[:stage]), stage == len(sizes) - 1
    depths = local.config.model.mtp.depths
    for shape in decoder[start : start + sizes[stage]]:
        yield from _layer(local, shape)
    if stage == 0:
        yield from _row(local)  # the embedding sums like a row-parallel linear
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
            # In the middle of the layer, so that a second run of the whole layer repeats it.
            yield from _row(local, recompute.moe)
        yield from _dispatch(local, recompute.moe)


def _column(
    local: Local, path: str, width: int, recompute: RecomputeMode = RecomputeMode.off
) -> Iterator[Traffic]:
    """A column-parallel linear of `width` x hidden inputs (Megatron's tensor_parallel/layers.py).

    Under sequence parallelism it gathers its input, again for the weight's gradient (an emulated
    format keeps its operand instead, `precision.linear`), and scatters the sum of the input's
    gradients; without, it sums these on every rank."""
    size = width * local.gathered
    if local.splits_sequence:
        formats = local.formats.get(path)
        keeps = formats is not None and formats.is_quantized
        times = 1 + (not keeps) + (recompute == RecomputeMode.full)
        yield Traffic("tensor", ALL_GATHER, "activations", size * times)
        yield Traffic("tensor", REDUCE_SCATTER, "activations", size)
    elif local.config.parallel.tensor > 1:
        yield Traffic("tensor", ALL_REDUCE, "activations", size)


def _row(local: Local, recompute: RecomputeMode = RecomputeMode.off) -> Iterator[Traffic]:
    """A row-parallel linear: the other way about. At a layer's end nothing saves its sum, and
    torch's checkpoint stops a second run before it."""
    times = 1 + (recompute == RecomputeMode.full)
    if local.splits_sequence:
        yield Traffic("tensor", REDUCE_SCATTER, "activations", local.gathered * times)
        yield Traffic("tensor", ALL_GATHER, "activations", local.gathered)
    elif local.config.parallel.tensor > 1:
        yield Traffic("tensor", ALL_REDUCE, "activations", local.gathered * times)


def _gathered_join(local: Local) -> Iterator[Traffic]:
    """eh_proj's output, whole on every rank and then each one's tokens of it
    (Megatron's transformer/multi_token_prediction.py)."""
    if local.config.parallel.tensor > 1:
        times = 1 + local.splits_sequence
        yield Traffic("tensor", ALL_GATHER, "activations", local.gathered * times)


def _cross_entropy(local: Local) -> Iterator[Traffic]:
    """model.cross_entropy: a largest logit, then two sums a token."""
    if local.config.parallel.tensor > 1:
        yield Traffic("tensor", ALL_REDUCE, "logits' sums", 3 * WIDE * local.tokens)


# Heads and experts ----------------------------------------------------------------------------


def _exchange(local: Local, parts: Iterable[tuple[int, int]]) -> int:
    """model.context: packed heads (count, channels) of a tensor-parallel rank, a run of them to
    every context-parallel rank; the fewer are sent to several."""
    ranks = local.config.parallel.context
    own = sum(max(1, count // ranks) * width for count, width in parts)
    return ranks * local.tokens * own * local.element


def _mamba_heads(local: Local, recompute: RecomputeMode) -> Iterator[Traffic]:
    mamba, tensor = local.config.model.mamba, local.config.parallel.tensor
    heads, states = mamba.heads // tensor, (mamba.groups // tensor, mamba.state_size)
    there = _exchange(local, [(heads, mamba.head_dim), states, states, (heads, 1)])
    back = _exchange(local, [(heads, mamba.head_dim)])
    times = 2 + (recompute != RecomputeMode.off)
    if local.config.parallel.context > 1:
        yield Traffic("context", ALL_TO_ALL, "Mamba-2 heads", times * (there + back))


def _attention_heads(local: Local, recompute: RecomputeMode) -> Iterator[Traffic]:
    """Selective recomputation ends with what attention saves, before the way back."""
    attention, tensor = local.config.model.attention, local.config.parallel.tensor
    query = (attention.heads // tensor, attention.head_dim)
    key = (max(1, attention.key_value_heads // tensor), attention.head_dim)
    there = _exchange(local, [query, key, key]) * (2 + (recompute != RecomputeMode.off))
    back = _exchange(local, [query]) * (2 + (recompute == RecomputeMode.full))
    if local.config.parallel.context > 1:
        yield Traffic("context", ALL_TO_ALL, "attention heads", there + back)


def _dispatch(local: Local, recompute: RecomputeMode) -> Iterator[Traffic]:
    """Megatron's transformer/moe/token_dispatcher.py: tokens to their experts in latent width with
    their FP32 probabilities, results back; backward the same. Experts that are cut gather the
    tokens of their group and scatter the sums of their outputs."""
    moe, parallel = local.config.model.moe, local.config.parallel
    copies = local.stream_tokens * moe.experts_per_token
    tokens = copies * expert_width(local.config.model) * local.element
    full = recompute == RecomputeMode.full
    # What comes back is saved by the second latent projection, else by nothing.
    there, back = 2 + full, 2 + (full and moe.latent_size > 0)
    if parallel.expert > 1:
        yield Traffic("expert", ALL_TO_ALL, "dispatch", (tokens + WIDE * copies) * there)
        yield Traffic("expert", ALL_TO_ALL, "combine", tokens * back)
    if parallel.expert_tensor > 1:
        gathered = tokens * there + WIDE * copies * (there - 1)
        scattered = tokens * back + WIDE * copies
        ranks = parallel.expert_tensor
        yield Traffic("expert tensor", ALL_GATHER, "tokens", ranks * gathered)
        yield Traffic("expert tensor", REDUCE_SCATTER, "tokens", ranks * scattered)


# Gradients and parameters ---------------------------------------------------------------------


def _gradients(local: Local, derived: Derived, tensors: list[Tensor]) -> Iterator[Traffic]:
    """Once a step: Megatron's distributed/param_and_grad_buffer.py and finalize_model_grads.py.

    Gradients are FP32, parameters in their own dtype. Experts have buffers of their own where
    their ranks differ from the dense layers'."""
    config, parallel = local.config, local.config.parallel
    if local.splits_sequence:
        whole = sum(prod(t.shape) for t in tensors if t.sharding == Sharding.replicated)
        yield Traffic("tensor", ALL_REDUCE, "gradients of what is not cut", WIDE * whole)
    apart = parallel.expert > 1 or parallel.expert_tensor != parallel.tensor
    routed = [t for t in tensors if t.sharding == Sharding.expert and apart]
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
            # UPSTREAM(megatron-core 0.19.2): experts apart have an optimizer apart, and each of
            # the two gathers all parameters. Gathering ahead of the forward pass does it once.
            times = 2 if apart and _has_experts(config) else 1
            times = 1 if parallel.overlap_parameter_gather else times
            yield Traffic(name, ALL_GATHER, "parameters", times * size * elements)


def _has_experts(config: Config) -> bool:
    return any(shape.kind == LayerKind.moe for shape in layers(config.model))


def _buffers(config: Config, tensors: list[Tensor]) -> list[list[Tensor]]:
    """One a dtype."""
    wide = [t for t in tensors if t.name.endswith(_KEPT_WIDE)]
    if config.precision.parameter_dtype != Dtype.bfloat16:
        return [tensors]
    return [[t for t in tensors if t not in wide], wide]


def _parameter_bytes(config: Config, tensors: list[Tensor]) -> int:
    wide = any(t.name.endswith(_KEPT_WIDE) for t in tensors)
    return 2 if config.precision.parameter_dtype == Dtype.bfloat16 and not wide else WIDE


def _elements(config: Config, tensors: list[Tensor], replicas: int) -> int:
    """Elements of a buffer on one rank; the distributed optimizer aligns every parameter, and the
    end to a whole share for each replica. Several buckets pad more than this, by under 1 KiB."""
    parallel = config.parallel
    cut = {
        Sharding.replicated: 1,
        Sharding.tensor: parallel.tensor,
        Sharding.expert: parallel.expert * parallel.expert_tensor,
    }
    counts = [prod(t.shape) // cut[t.sharding] for t in tensors]
    if not parallel.distributed_optimizer:
        return sum(counts)
    whole = lcm(replicas, _BUCKET)
    return ceil(sum(ceil(n / _ALIGNED) * _ALIGNED for n in counts) / whole) * whole


def _embedding(local: Local, rank: int) -> Iterator[Traffic]:
    """The gradient of an embedding that the last stage holds too, for multi-token prediction."""
    parallel, model = local.config.parallel, local.config.model
    if parallel.pipeline > 1 and model.mtp.depths > 0 and rank in (0, parallel.pipeline - 1):
        (table,) = embedding_tensors(model)
        size = WIDE * prod(table.shape) // parallel.tensor
        yield Traffic("embedding", ALL_REDUCE, "gradients of the embedding", size)
