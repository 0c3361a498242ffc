"""Memory of one operator, and the sizes of a micro-batch on one rank.

Owns: `Op`, the unit of which layers consist, and the operators that several kinds of layers share:
norms and linears, plain or emulated, with the collectives of tensor and sequence parallelism. Every
number is computed from the tensors that the operator saves and allocates; none is fitted. No torch.

Letters: b is bytes per element of activations, x and y are inputs and outputs, d marks gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nemotron_train.config.schema import Config, Dtype
from nemotron_train.plan.precision.resolve import LinearFormats

WIDE = 4  # bytes of FP32


@dataclass(frozen=True)
class Op:
    """Bytes of one operator. keeps: saved for the backward pass; forward and backward: the most
    that it allocates in addition to the memory in use when it starts, including results; gradient:
    all gradients that exist after its backward pass for the operators before it, including the
    residual stream's."""

    name: str
    keeps: int = 0
    forward: int = 0
    gradient: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Part:
    """Operators in forward order. recompute: they run once more before their backward pass, and
    until then save only `output` bytes (their result, which they would have saved anyway) and
    `inputs` bytes (inputs that no other operator saves). pending_gradients: bytes of gradients of
    shared weights that stay allocated after this part's backward pass until the other uses have
    theirs; negative where they are added up and released."""

    ops: tuple[Op, ...]
    recompute: bool = False
    output: int = 0
    inputs: int = 0
    pending_gradients: int = 0


@dataclass(frozen=True)
class Machine:
    """Memory properties of a kind of machine. wide_products: BF16 products use FP32 copies of
    operands and result, as on a CPU without BF16 instructions (platform.bfloat16_products).
    collective_copies: a collective copies the data that it sends (gloo)."""

    wide_products: bool
    collective_copies: bool


CPU, GPU = Machine(True, True), Machine(False, False)


@dataclass(frozen=True)
class Local:
    """Sizes of one micro-batch on one rank. formats: module path -> formats of the linear."""

    config: Config
    formats: Mapping[str, LinearFormats]
    machine: Machine

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.train.micro_batch_sequences

    @property
    def length(self) -> int:
        """Tokens of a sequence, over all context-parallel ranks."""
        return self.config.train.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens on this context-parallel rank."""
        return self.rows * self.length // self.config.parallel.context

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream on this rank: under sequence parallelism, its share."""
        parallel = self.config.parallel
        return self.tokens // (parallel.tensor if parallel.sequence else 1)

    @property
    def splits_sequence(self) -> bool:
        """Whether sequence parallelism is on, over more than one rank."""
        return self.config.parallel.sequence and self.config.parallel.tensor > 1

    @property
    def element(self) -> int:
        """Bytes per element of activations."""
        return 2 if self.config.precision.parameter_dtype == Dtype.bfloat16 else 4

    @property
    def stream(self) -> int:
        """Bytes of the residual stream on this rank, or of its gradient."""
        return self.stream_tokens * self.config.model.hidden_size * self.element

    @property
    def gathered(self) -> int:
        """Bytes of the residual stream gathered over the tensor-parallel ranks."""
        return self.tokens * self.config.model.hidden_size * self.element

    def widened(self, *elements: int) -> int:
        """Bytes of the FP32 copies of a BF16 product's operands and result, given the number of
        elements of each; 0 without `wide_products`."""
        return WIDE * sum(elements) if self.machine.wide_products and self.element == 2 else 0

    @property
    def chain(self) -> int:
        """Bytes per element inside chains of products that are widened once, at their start: the
        scan, attention, unquantized experts (platform.bfloat16_products)."""
        return WIDE if self.machine.wide_products else self.element

    @property
    def is_widened(self) -> bool:
        """Whether such chains compute in FP32 on BF16 activations."""
        return self.chain != self.element

    def copied(self, size: int) -> int:
        """Bytes that a collective on `size` bytes copies: all on a CPU (gloo), none on a GPU."""
        return size if self.machine.collective_copies else 0


def norm(local: Local, name: str = "norm") -> Op:
    """model.norm: the result, and one scale per token."""
    saved = local.stream + WIDE * local.stream_tokens
    return Op(name, saved, saved, local.stream, local.stream)


def linear(
    local: Local, path: str, tokens: int, sizes: tuple[int, int], keeps: int = 0, gradient: int = 0
) -> Op:
    """Megatron's parallel linears, or `precision.linear`. Forward allocates the result, backward
    the gradients of input and weight. The operator that computed the input saves it.

    sizes: (input, output) features; keeps, gradient: see `Op`. A BF16 weight gradient is widened
    when it is added to the FP32 gradient. Block-scaled formats create operands of 2 bytes per
    element of both tensors, and transformed copies of them for wgrad."""
    inputs, outputs = sizes
    b, weights = local.element, inputs * outputs
    result, dx, dw = tokens * outputs * b, tokens * inputs * b, weights * b
    wide = local.widened(tokens * inputs, weights, tokens * outputs)
    forward = result + wide
    backward = dx + dw + max(wide, 2 * dw * (b == 2))
    formats = local.formats.get(path)
    if formats is not None and formats.is_quantized:
        operands = 2 * tokens * (inputs + outputs)
        transformed = b * tokens * (inputs + outputs) * formats.hadamard
        forward += 2 * tokens * inputs
        backward = dx + 2 * tokens * outputs + operands + transformed + dw + wide
    return Op(path.rsplit(".", 1)[-1], keeps, forward, gradient, backward)


def column(local: Local, path: str, sizes: tuple[int, int], keeps: int) -> Op:
    """A column-parallel linear after a norm. Under sequence parallelism, its input's gradient is
    reduce-scattered (with a copy for gloo)."""
    op = linear(local, path, local.tokens, sizes, keeps, 2 * local.stream)
    if not local.splits_sequence:
        return op
    return replace(op, backward=op.backward + local.stream + local.copied(local.gathered))


def row(local: Local, path: str, sizes: tuple[int, int], branch: int) -> list[Op]:
    """A row-parallel linear whose result is added to the residual stream. Under sequence
    parallelism, a reduce-scatter follows. branch: bytes of its input's gradient."""
    op = linear(local, path, local.tokens, sizes, 0, local.stream + branch)
    ops = [op]
    if local.splits_sequence:
        copied = local.copied(local.gathered)
        forward, backward = local.gathered + local.stream + copied, local.gathered + copied
        ops.append(Op("scatter", 0, forward, local.stream + local.gathered, backward))
    return ops


def residual(local: Local) -> Op:
    """The addition to the residual stream."""
    return Op("residual", local.stream, 2 * local.stream, local.stream)
