"""Memory of a rank in bytes: parameters, gradients, optimizer state, activations, and the peak.

Owns: the memory that persists between steps, and the order in which a step allocates and frees:
micro-batches in flight (1F1B, interleaved), forward passes, backward passes, recomputation. Does
not own: the memory of an operator (`plan.cost.activations`), printing (`report.plan.memory`). Not
counted: memory of the C library and kernel libraries, allocator waste, batches of tokens.
benchmarks/memory.py compares the prediction with measured peaks. No torch.
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

# Bytes per element.
_GRADIENT_BYTES = 4  # accumulated in FP32 for any parameter dtype
_MOMENT_BYTES = 4 + 4  # AdamW's two moments
_MASTER_BYTES = 4  # the FP32 copy of BF16 parameters; FP32 parameters need none
_OPERAND_BYTES = 2  # an operand in an emulated block-scaled format


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank with pipeline rank `stage` (from 0), for all of its stages together."""

    stage: int
    parameters: int  # elements
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    quantized_bytes: int  # quantized copies of weights in emulated block-scaled formats
    buffer_bytes: int  # Megatron's buffer for gathered sequences
    kept_bytes: int  # activations saved by one micro-batch for its backward pass
    in_flight: int  # maximum number of forward passes (of one stage) with saved activations
    activation_bytes: int  # peak of activations and their gradients in a step
    collective_bytes: int  # peak of the gradient reduction, which follows the backward passes
    saved_bytes: int  # written by the first replica: its weights, and its part of the FP32 state

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients and optimizer state; independent of the batch."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def lasting_bytes(self) -> int:
        """Memory in use between two steps."""
        return self.state_bytes + self.quantized_bytes + self.buffer_bytes

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of a step."""
        return self.lasting_bytes + max(self.activation_bytes, self.collective_bytes)


def heaviest_rank(config: Config, derived: Derived, machine: Machine = CPU) -> RankMemory:
    """The memory of the pipeline rank with the highest peak."""
    return max(rank_memory(config, derived, machine), key=lambda memory: memory.peak_bytes)


def rank_memory(config: Config, derived: Derived, machine: Machine = CPU) -> list[RankMemory]:
    """The memory of one rank of each pipeline rank."""
    num_ranks = config.parallel.pipeline
    tensors = stage_tensors(config, derived)
    chunks = [list(range(rank, len(tensors), num_ranks)) for rank in range(num_ranks)]
    local = Local(config, derived.plan.at(0).formats, machine)
    tapes = [_stage_tape(local, derived, stage) for stage in range(len(tensors))]
    memories = []
    for rank, stages in enumerate(chunks):
        held = [tensor for stage in stages for tensor in tensors[stage]]
        memories.append(_rank(local, derived, rank, held, [tapes[stage] for stage in stages]))
    return memories


def stage_tensors(config: Config, derived: Derived) -> list[list[Tensor]]:
    """The unsharded tensors of every pipeline stage. The first stage has the embedding, the last
    has the tensors after the decoder. With multi-token prediction and several stages, the last
    stage has a copy of the embedding."""
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
    """Number of elements of a rank's shards: (without routed experts, routed experts only)."""
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
    is_bfloat16 = config.precision.parameter_dtype == Dtype.bfloat16
    collective = 0
    if sharded and dense_replicas > 1:
        collective = local.copied(_GRADIENT_BYTES * max(dense, experts))
    parallel, micro_batches = config.parallel, derived.micro_batches_per_step
    place = (parallel.pipeline, parallel.virtual_pipeline, rank, micro_batches)
    kept, activation = _activations(tapes, passes(*place))
    names = {tensor.name for tensor in tensors}
    rank_linears = [linear for linear in linears(config.model) if linear.weight.name in names]
    joins = config.model.mtp.depths > 0 and any(
        line.path == "mtp.layers.0.eh_proj" for line in rank_linears
    )
    return RankMemory(
        stage=rank,
        parameters=dense + experts,
        parameter_bytes=(dense + experts) * (2 if is_bfloat16 else 4),
        gradient_bytes=(dense + experts) * _GRADIENT_BYTES,
        optimizer_bytes=optimized * (_MOMENT_BYTES + (_MASTER_BYTES if is_bfloat16 else 0)),
        quantized_bytes=sum(_quantized(local, linear) for linear in rank_linears),
        buffer_bytes=local.gathered * (2 if joins else 1) if local.splits_sequence else 0,
        kept_bytes=kept,
        in_flight=in_flight(*place),
        activation_bytes=activation,
        collective_bytes=collective,
        saved_bytes=(dense + experts) * (2 if is_bfloat16 else 4)
        + optimized * (_MOMENT_BYTES + _MASTER_BYTES),
    )


def _quantized(local: Local, linear: Linear) -> int:
    """Bytes of the quantized weights (precision.linear's `weight_operand`): one operand if 16 x 16
    blocks serve both fprop and dgrad, else one for each of the two in a block-scaled format."""
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
    """The passes of a step on a pipeline rank, in order: +1 forward or -1 backward, and the chunk.

    1F1B (arXiv 2104.04473, section 2.2) after a warm-up of one forward pass per later pipeline
    rank. Interleaved: micro-batches go through the chunks in groups of `pipeline`, after Megatron's
    warm-up of two forward passes per later rank and one group per additional chunk."""
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
    """Maximum number of forward passes on a rank whose backward pass has not yet run."""
    signs = (sign for sign, _ in passes(pipeline, virtual, rank, micro_batches))
    return max(accumulate(signs))


def _activations(tapes: list[list[Part]], order: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(bytes that one micro-batch saves on all stages of a rank, peak bytes of a step). During a
    pass, the peak of its stage adds to the activations of the other passes in flight."""
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
    """Simulate the forward and the backward pass through `tape`. Returns (bytes saved between the
    two, peak bytes)."""
    live = peak = 0
    for part in tape:
        after, most = _forward(part.ops, live)
        peak = max(peak, most)
        live = live + part.output + part.inputs if part.recompute else after
    kept, gradient = live, 0
    for part in reversed(tape):
        if part.recompute:
            after, most = _forward(part.ops, live + gradient)
            peak, live = max(peak, most), after - gradient - part.output
        for op in reversed(part.ops):
            peak = max(peak, live + gradient + op.backward)
            live, gradient = live - op.keeps, op.gradient
        live += part.pending_gradients - part.inputs
        peak = max(peak, live)
    return kept, peak


def _forward(ops: Sequence[Op], live: int) -> tuple[int, int]:
    """(live bytes after the operators, peak bytes while they run), from `live` bytes before."""
    peak = live
    for op in ops:
        peak = max(peak, live + op.forward)
        live += op.keeps
    return live, peak


def _stage_tape(local: Local, derived: Derived, stage: int) -> list[Part]:
    """All parts that a micro-batch runs on a pipeline stage, in forward order."""
    config = local.config
    sizes = derived.layers_per_stage
    start, last = sum(sizes[:stage]), stage == len(sizes) - 1
    decoder = [shape for shape in layers(config.model) if not shape.in_mtp]
    table = _weight_bytes(local, embedding_tensors(config.model))
    embeds_again = last and config.model.mtp.depths > 0
    if stage == 0:
        released = -table if embeds_again else 0
        first = Part((activations.embedding(local),), pending_gradients=released)
    else:
        first = Part((Op("received", local.stream, local.stream, local.stream),))
    tape = [first]
    for shape in decoder[start : start + sizes[stage]]:
        tape += activations.layer(local, LayerKind(shape.kind), shape.path)
    return tape + (_end(local, shares_embedding=stage == 0) if last else [])


def _end(local: Local, shares_embedding: bool) -> list[Part]:
    """Output layer and multi-token prediction. The gradient of a weight that several depths share
    accumulates from the deepest depth on. In BF16, the output layer's gradient is added to its FP32
    buffer immediately."""
    model = local.config.model
    depths = model.mtp.depths
    output = _weight_bytes(local, head_tensors(model)) if local.element == 4 and depths else 0
    table = _weight_bytes(local, embedding_tensors(model))
    block = [tensor for shape in layers(model) if shape.in_mtp for tensor in shape.tensors]
    shared = _weight_bytes(local, [*block, *mtp_tensors(model)]) if depths > 1 else 0
    tape = [Part(tuple(activations.head(local)), pending_gradients=-output)]
    for depth in range(1, depths + 1):
        pending = shared if depth == depths else 0
        pending += table if depth == depths and (shares_embedding or depths > 1) else 0
        if depth == 1:
            pending -= shared + (0 if shares_embedding or depths == 1 else table)
        tape.append(Part(tuple(activations.prediction_join(local)), pending_gradients=pending))
        for shape in layers(model):
            if shape.in_mtp:
                tape += activations.layer(local, LayerKind(shape.kind), shape.path)
        pending = output if depth == depths else 0
        tape.append(Part(tuple(activations.head(local)), pending_gradients=pending))
    return tape


def _weight_bytes(local: Local, tensors: Iterable[Tensor]) -> int:
    """Bytes of the gradients of these weights in the weights' dtype, before they are added to the
    FP32 gradients."""
    return sum(_held(local.config, tensors)) * local.element
