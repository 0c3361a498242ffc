"""What one operator leaves in memory, and the sizes of a micro-batch on one rank.

Owns `Op`, what a layer is made of, and the operators that several kinds of layers share: norms and
linears, plain or emulated, with the exchanges of tensor and sequence parallelism. Each number
follows from what the operator saves and allocates, none is fitted. No torch.

Letters: b bytes an element of activations, x and y inputs and outputs, d their gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nemotron_train.config.schema import Config, Dtype
from nemotron_train.plan.precision.resolve import LinearFormats

WIDE = 4  # bytes of FP32


@dataclass(frozen=True)
class Op:
    """Bytes of one operator. `forward` and `backward`: the most it allocates on top of what is
    live when it starts, results included. `gradient`: what is in flight towards the operators
    before it once its backward is done, the residual stream's included."""

    name: str
    keeps: int = 0
    forward: int = 0
    gradient: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Part:
    """Operators in forward order. With `again` they run once more before their backward pass, and
    until then keep only `output` bytes, that they would have kept as a result, and `inputs` bytes,
    that nothing else keeps. `waits`: gradients of weights in use elsewhere too, that wait from this
    part's backward pass for the others; negative where they join them."""

    ops: tuple[Op, ...]
    again: bool = False
    output: int = 0
    inputs: int = 0
    waits: int = 0


@dataclass(frozen=True)
class Machine:
    """wide_products: BF16 products go through FP32 copies of operands and result, as on a CPU
    without BF16 instructions (platform.bfloat16_products). collective_copies: a collective copies
    what it sends (gloo)."""

    wide_products: bool
    collective_copies: bool


CPU, GPU = Machine(True, True), Machine(False, False)


@dataclass(frozen=True)
class Local:
    """Sizes of one micro-batch on one rank. formats: of every linear by its path."""

    config: Config
    formats: Mapping[str, LinearFormats]
    machine: Machine

    @property
    def rows(self) -> int:
        return self.config.train.micro_batch_sequences

    @property
    def length(self) -> int:
        return self.config.train.sequence_length

    @property
    def tokens(self) -> int:
        return self.rows * self.length // self.config.parallel.context

    @property
    def stream_tokens(self) -> int:
        parallel = self.config.parallel
        return self.tokens // (parallel.tensor if parallel.sequence else 1)

    @property
    def splits_sequence(self) -> bool:
        return self.config.parallel.sequence and self.config.parallel.tensor > 1

    @property
    def element(self) -> int:
        return 2 if self.config.precision.parameter_dtype == Dtype.bfloat16 else 4

    @property
    def stream(self) -> int:
        """The residual stream, or its gradient."""
        return self.stream_tokens * self.config.model.hidden_size * self.element

    @property
    def gathered(self) -> int:
        """The same of all tokens that the tensor-parallel ranks mix together."""
        return self.tokens * self.config.model.hidden_size * self.element

    def widened(self, *elements: int) -> int:
        """FP32 copies of a BF16 product's operands and result."""
        return WIDE * sum(elements) if self.machine.wide_products and self.element == 2 else 0

    @property
    def chain(self) -> int:
        """Bytes an element inside chains of products that are widened once, at their beginning:
        the scan, attention, experts that are not quantized (platform.bfloat16_products)."""
        return WIDE if self.machine.wide_products else self.element

    @property
    def is_widened(self) -> bool:
        return self.chain != self.element

    def copied(self, size: int) -> int:
        """What a collective copies of `size` bytes."""
        return size if self.machine.collective_copies else 0


def norm(local: Local, name: str = "norm") -> Op:
    """model.norm: result and a scale a token."""
    kept = local.stream + WIDE * local.stream_tokens
    return Op(name, kept, kept, local.stream, local.stream)


def linear(
    local: Local, path: str, tokens: int, sizes: tuple[int, int], keeps: int = 0, gradient: int = 0
) -> Op:
    """Megatron's parallel linears, or `precision.linear`: the result and, backward, the input's
    and the weight's gradient. The input is kept by what made it.

    A BF16 weight gradient is widened when it is added to the FP32 one. Block formats make operands
    of 2 bytes an element of both tensors, and transformed copies of them for wgrad."""
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
    """A column-parallel linear behind a norm; under sequence parallelism its input's gradient is
    summed into pieces (a copy for gloo)."""
    op = linear(local, path, local.tokens, sizes, keeps, 2 * local.stream)
    if not local.splits_sequence:
        return op
    return replace(op, backward=op.backward + local.stream + local.copied(local.gathered))


def row(local: Local, path: str, sizes: tuple[int, int], branch: int) -> list[Op]:
    """A row-parallel linear whose result joins the residual stream; `branch`: bytes of its input's
    gradient."""
    op = linear(local, path, local.tokens, sizes, 0, local.stream + branch)
    ops = [op]
    if local.splits_sequence:
        copied = local.copied(local.gathered)
        forward, backward = local.gathered + local.stream + copied, local.gathered + copied
        ops.append(Op("scatter", 0, forward, local.stream + local.gathered, backward))
    return ops


def residual(local: Local) -> Op:
    return Op("residual", local.stream, 2 * local.stream, local.stream)
