"""What a rank holds, in bytes: parameters, gradients, optimizer, activations, and the peak.

Owns what lasts from step to step and the order in which a step allocates and frees: micro-batches
in flight (1F1B, interleaved), forward passes, backward passes, recomputation. What an operator
holds is `plan.cost.activations`'; `report.plan.memory` prints. Left out: the C library's and kernel
libraries' own memory, allocator waste, batches of tokens. benchmarks/memory.py holds the prediction
against measured peaks. No torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod

from nemotron_train.config.schema import Config, Dtype, GemmFormat
from nemotron_train.plan.architecture.layers import (
    LayerKind,
    Linear,
    Sharding,
    Tensor,
    embedding_tensors,
    head_tensors,
    layers,
    linears,
    mtp_tensors,
)
from nemotron_train.plan.cost import activations
from nemotron_train.plan.cost.operators import CPU, Local, Machine, Op, Part
from nemotron_train.plan.derive import Derived
from nemotron_train.plan.precision.resolve import LinearFormats

_GRADIENT_BYTES = 4  # accumulated in FP32 whatever the parameters are
_MOMENT_BYTES = 4 + 4  # AdamW's two moments
_MASTER_BYTES = 4  # the FP32 copy of BF16 parameters; FP32 parameters are their own master
_OPERAND_BYTES = 2  # an element of an emulated block format


@dataclass(frozen=True)
class RankMemory:
    """Bytes held by pipeline rank `stage` (from 0), all of its stages together."""

    stage: int
    parameters: int  # elements
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    quantized_bytes: int  # weights that emulated block formats keep quantized
    buffer_bytes: int  # Megatron's buffer for gathered sequences
    kept_bytes: int  # activations that one micro-batch keeps for its backward pass
    in_flight: int  # most forward passes, of a stage each, whose activations are kept at once
    activation_bytes: int  # the most that activations and their gradients take in a step
    collective_bytes: int  # the most that the exchange of gradients takes, after them

    @property
    def state_bytes(self) -> int:
        """What lasts whatever the batch: parameters, gradients, optimizer."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def lasting_bytes(self) -> int:
        """What lies in memory between two steps."""
        return self.state_bytes + self.quantized_bytes + self.buffer_bytes

    @property
    def peak_bytes(self) -> int:
        return self.lasting_bytes + max(self.activation_bytes, self.collective_bytes)


def heaviest_rank(config: Config, derived: Derived, machine: Machine = CPU) -> RankMemory:
    """The memory of a rank of the pipeline rank that holds most at its peak."""
    return max(rank_memory(config, derived, machine), key=lambda memory: memory.peak_bytes)


def rank_memory(config: Config, derived: Derived, machine: Machine = CPU) -> list[RankMemory]:
    """The memory of a rank of every pipeline rank."""
    num_ranks = config.parallel.pipeline
    tensors = stage_tensors(config, derived)
    chunks = [list(range(rank, len(tensors), num_ranks)) for rank in range(num_ranks)]
    local = Local(config, derived.plan.at(0).formats, machine)
    tapes = [_stage_tape(local, derived, stage) for stage in range(len(tensors))]
    found = []
    for rank, stages in enumerate(chunks):
        held = [tensor for stage in stages for tensor in tensors[stage]]
        found.append(_rank(local, derived, rank, held, [tapes[stage] for stage in stages]))
    return found


def stage_tensors(config: Config, derived: Derived) -> list[list[Tensor]]:
    """The unsharded tensors of every pipeline stage. The first holds the embedding, the last
    what follows the decoder; with multi-token prediction a last stage of its own embeds too."""
    model = config.model
    shapes = layers(model)
    decoder = [layer for layer in shapes if not layer.in_mtp]
    stages, start = [], 0
    for count in derived.layers_per_stage:
        inside = decoder[start : start + count]
        stages.append([tensor for layer in inside for tensor in layer.tensors])
        start += count
    stages[0] += embedding_tensors(model)
    stages[-1] += head_tensors(model) + mtp_tensors(model)
    stages[-1] += [tensor for layer in shapes if layer.in_mtp for tensor in layer.tensors]
    if model.mtp.depths > 0 and len(stages) > 1:
        stages[-1] += embedding_tensors(model)
    return stages


def _held(config: Config, tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Elements of a rank's shards: all but routed experts, and routed experts."""
    parallel = config.parallel
    ranks_of = {
        Sharding.replicated: 1,
        Sharding.tensor: parallel.tensor,
        Sharding.expert: parallel.expert * parallel.expert_tensor,
    }
    held = dict.fromkeys(Sharding, 0)
    for tensor in tensors:
        held[tensor.sharding] += prod(tensor.shape) // ranks_of[tensor.sharding]
    return held[Sharding.replicated] + held[Sharding.tensor], held[Sharding.expert]


def _rank(
    local: Local,
    derived: Derived,
    rank: int,
    tensors: list[Tensor],
    tapes: list[list[Part]],
) -> RankMemory:
    config = local.config
    dense, experts = _held(config, tensors)
    optimized = dense + experts
    sharded = config.parallel.distributed_optimizer
    dense_replicas = derived.data_parallel * config.parallel.context
    if sharded:
        optimized = ceil(dense / dense_replicas) + ceil(experts / derived.expert_data_parallel)
    reduced = config.precision.parameter_dtype == Dtype.bfloat16
    exchanged = 0
    if sharded and dense_replicas > 1:
        exchanged = local.copied(_GRADIENT_BYTES * max(dense, experts))
    parallel, micro_batches = config.parallel, derived.micro_batches_per_step
    place = (parallel.pipeline, parallel.virtual_pipeline, rank, micro_batches)
    kept, activation = _activations(tapes, passes(*place))
    names = {tensor.name for tensor in tensors}
    own = [linear for linear in linears(config.model) if linear.weight.name in names]
    joins = config.model.mtp.depths > 0 and any(line.path == "mtp.layers.0.eh_proj" for line in own)
    return RankMemory(
        stage=rank,
        parameters=dense + experts,
        parameter_bytes=(dense + experts) * (2 if reduced else 4),
        gradient_bytes=(dense + experts) * _GRADIENT_BYTES,
        optimizer_bytes=optimized * (_MOMENT_BYTES + (_MASTER_BYTES if reduced else 0)),
        quantized_bytes=sum(_quantized(local, linear) for linear in own),
        buffer_bytes=local.gathered * (2 if joins else 1) if local.splits_sequence else 0,
        kept_bytes=kept,
        in_flight=in_flight(*place),
        activation_bytes=activation,
        collective_bytes=exchanged,
    )


def _quantized(local: Local, linear: Linear) -> int:
    """precision.linear's `weight_operand`: one operand where 16 x 16 blocks serve fprop and dgrad,
    else one for each of them in a block format."""
    formats = local.formats.get(linear.path)
    if formats is None:
        return 0
    dense, experts = _held(local.config, [linear.weight])
    return (dense + experts) * _OPERAND_BYTES * _operands(formats)


def _operands(formats: LinearFormats) -> int:
    if formats.fprop == formats.dgrad == GemmFormat.nvfp4 and formats.weight_2d:
        return 1
    return formats.fprop.is_block_scaled + formats.dgrad.is_block_scaled


# The order of a step ------------------------------------------------------------------------


def passes(pipeline: int, virtual: int, rank: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """A step's passes on a pipeline rank in order: +1 forward or -1 backward, and the chunk.

    1F1B (arXiv 2104.04473, section 2.2) after a warm-up of one forward pass for each rank behind.
    Interleaved, micro-batches go through the chunks in groups of `pipeline`, after Megatron's
    warm-up of two for each rank behind and a group for each further chunk."""
    total = micro_batches * virtual
    warm_up = pipeline - rank - 1
    if virtual > 1:
        warm_up = 2 * warm_up + (virtual - 1) * pipeline
    warm_up = min(warm_up, total)
    chunks = [number // pipeline % virtual for number in range(total)]
    for number in range(warm_up):
        yield 1, chunks[number]
    for number in range(total):
        if warm_up + number < total:
            yield 1, chunks[warm_up + number]
        yield -1, virtual - 1 - chunks[number]


def in_flight(pipeline: int, virtual: int, rank: int, micro_batches: int) -> int:
    """Most forward passes of a rank's stages that wait for their backward pass."""
    signs = (sign for sign, _ in passes(pipeline, virtual, rank, micro_batches))
    return max(accumulate(signs))


def _activations(tapes: list[list[Part]], order: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Bytes that one micro-batch keeps on all of a rank's stages, and the most in a step. A pass
    may reach its stage's own peak on top of what the others keep."""
    walks = [walk(tape) for tape in tapes]
    held = peak = 0
    for sign, chunk in order:
        kept, most = walks[chunk]
        if sign > 0:
            held += kept
        peak = max(peak, held + most - kept)
        if sign < 0:
            held -= kept
    return sum(kept for kept, _ in walks), peak


def walk(tape: Sequence[Part]) -> tuple[int, int]:
    """Forward, then backward through `tape`: bytes kept between the two, and the most at once."""
    live = peak = 0
    for part in tape:
        after, most = _forward(part.ops, live)
        peak = max(peak, most)
        live = live + part.output + part.inputs if part.again else after
    kept, gradient = live, 0
    for part in reversed(tape):
        if part.again:
            again, most = _forward(part.ops, live + gradient)
            peak, live = max(peak, most), again - gradient - part.output
        for op in reversed(part.ops):
            peak = max(peak, live + gradient + op.backward)
            live, gradient = live - op.keeps, op.gradient
        live += part.waits - part.inputs
        peak = max(peak, live)
    return kept, peak


def _forward(ops: Sequence[Op], live: int) -> tuple[int, int]:
    """Live bytes after the operators, and the most while they run."""
    peak = live
    for op in ops:
        peak = max(peak, live + op.forward)
        live += op.keeps
    return live, peak


def _stage_tape(local: Local, derived: Derived, stage: int) -> list[Part]:
    """All that a micro-batch passes on a pipeline stage, in forward order."""
    config = local.config
    sizes = derived.layers_per_stage
    start, last = sum(sizes[:stage]), stage == len(sizes) - 1
    decoder = [shape for shape in layers(config.model) if not shape.in_mtp]
    table = _weight_bytes(local, embedding_tensors(config.model))
    embeds_again = last and config.model.mtp.depths > 0
    if stage == 0:
        first = Part((activations.embedding(local),), waits=-table if embeds_again else 0)
    else:
        first = Part((Op("received", local.stream, local.stream, local.stream),))
    tape = [first]
    for shape in decoder[start : start + sizes[stage]]:
        tape += activations.layer(local, LayerKind(shape.kind), shape.path)
    return tape + (_end(local, shares_embedding=stage == 0) if last else [])


def _end(local: Local, shares_embedding: bool) -> list[Part]:
    """Output layer and multi-token prediction. A weight in use at several depths gathers its
    gradient from the deepest on; the output layer's goes to its FP32 buffer at once if BF16."""
    model = local.config.model
    depths = model.mtp.depths
    output = _weight_bytes(local, head_tensors(model)) if local.element == 4 and depths else 0
    table = _weight_bytes(local, embedding_tensors(model))
    block = [tensor for shape in layers(model) if shape.in_mtp for tensor in shape.tensors]
    shared = _weight_bytes(local, [*block, *mtp_tensors(model)]) if depths > 1 else 0
    tape = [Part(tuple(activations.head(local)), waits=-output)]
    for depth in range(1, depths + 1):
        waits = shared if depth == depths else 0
        waits += table if depth == depths and (shares_embedding or depths > 1) else 0
        if depth == 1:
            waits -= shared + (0 if shares_embedding or depths == 1 else table)
        tape.append(Part(tuple(activations.prediction_join(local)), waits=waits))
        for shape in layers(model):
            if shape.in_mtp:
                tape += activations.layer(local, LayerKind(shape.kind), shape.path)
        tape.append(Part(tuple(activations.head(local)), waits=output if depth == depths else 0))
    return tape


def _weight_bytes(local: Local, tensors: Iterable[Tensor]) -> int:
    """Gradients of weights, in the weights' dtype, before they are added to the FP32 ones."""
    return sum(_held(local.config, tensors)) * local.element
