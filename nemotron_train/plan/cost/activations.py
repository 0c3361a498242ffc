"""Activation memory of a layer between its forward and backward pass, operator by operator.

Owns: the operators of every kind of layer, of the embedding and of the output, and the operators
that recomputation covers. Docstrings name the modules whose tensors the numbers describe. Does not
own: `Op` (`plan.cost.operators`), the order in which layers run, parameters (`plan.cost.memory`).
No torch.

The numbers describe our layers on a CPU with compiled kernels. A GPU's fused kernels (mamba_ssm,
Transformer Engine) save other tensors of about the same size and were not measured. Where the size
depends on data, it is assumed: rows of one long and one short document, no steep head in the scan,
experts loaded to `FULLEST_EXPERT`.
"""

from dataclasses import replace
from math import ceil

from nemotron_train.config.schema import RecomputeMode
from nemotron_train.plan.architecture.layers import LayerKind, expert_width, mamba_in_proj_size
from nemotron_train.plan.cost.operators import (
    WIDE,
    Local,
    Op,
    Part,
    column,
    linear,
    norm,
    residual,
    row,
)

FULLEST_EXPERT = 1.25  # load of the fullest expert over the mean (`max_vio` in metrics.jsonl)
_CPU_CHUNK = 64  # model.mamba.core.CPU_CHUNKS
_ATTENTION_BLOCK, _LONGEST_ROW = 64, 1024  # model.attention.core
_PADDING_FLOPS = {4: 2_000_000, 2: 12_000_000}  # model.moe.core, by bytes per element
_BLOCK_ROWS = 32  # model.moe.core and precision.experts
_SCRATCH = WIDE << 18  # bytes of the block on which cross entropy works at a time


def layer(local: Local, kind: LayerKind, path: str) -> list[Part]:
    """The operators of one layer in forward order, split into parts by `train.recompute`."""
    recompute = local.config.train.recompute
    mode, parts = {
        LayerKind.mamba: (recompute.mamba, _mamba),
        LayerKind.attention: (recompute.attention, _attention),
        LayerKind.moe: (recompute.moe, _moe),
    }[kind]
    before, inside, after, output, inputs = parts(local, path)
    if mode == RecomputeMode.selective:
        recomputed = Part(tuple(inside), True, output, inputs)
        return [Part(tuple(before)), recomputed, Part(tuple(after))]
    all_ops = tuple(before + inside + after)
    if mode == RecomputeMode.full:
        return [Part(all_ops, True, local.stream)]
    return [Part(all_ops)]


# Operators before, inside and after the part that selective recomputation covers; `output` and
# `inputs` of that part (see `Part`).
type _Layer = tuple[list[Op], list[Op], list[Op], int, int]


def _mamba(local: Local, path: str) -> _Layer:
    """model.mamba.layer with a rank's heads and groups, and the scan of
    model.mamba.chunked_scan."""
    model, parallel = local.config.model, local.config.parallel
    mamba, ranks = model.mamba, parallel.tensor
    b, tokens = local.element, local.tokens
    heads, groups = mamba.heads // ranks, max(1, mamba.groups // ranks)
    inner, state = heads * mamba.head_dim, mamba.state_size
    packed = mamba_in_proj_size(model) // ranks
    norm_groups = groups
    groups = max(groups, parallel.context)  # whole groups on each context rank, some shared
    width = inner + 2 * groups * state
    x, bc = tokens * inner * b, tokens * groups * state * b
    dt = WIDE * tokens * heads
    stream = local.stream

    length = min(mamba.chunk_size, _CPU_CHUNK, local.length)
    num_chunks = ceil(local.length / length)
    c = local.chain  # bytes per element inside the scan
    xc, bcc, xbc = x // b * c, bc // b * c, tokens * width * b
    states = WIDE * local.rows * (num_chunks + 1) * inner * state // parallel.context
    scores = tokens * length * groups * c
    small = WIDE * tokens * groups + 5 * dt + 2 * dt // length + 2 * tokens * c
    scan = 2 * xc + x + states + 2 * bcc + scores + small + 8 * tokens * length
    # The scan begins and ends with products with the states, in the scan's dtype.
    entering = states * c // WIDE
    scan_forward = scan + (xc if local.is_widened else 0)
    # dy and dx by chunks, dx; gradients: states (twice), scores, B and C.
    scan_backward = 3 * xc + states + entering + 2 * scores + 5 * bcc + 5 * dt
    if c < WIDE:
        scan_forward += entering - x
        scan_backward += entering
    if local.is_widened:
        scan_backward += xc  # dy
    widen = []
    if local.is_widened:  # FP32 copies that the scan saves; the gradient of xbc is assembled
        wide = xbc // b * c
        widen.append(Op("widen", wide, wide, stream + x + xbc + dt, wide + xbc))
    # With context parallelism, the convolution's input is a different tensor than in_proj's output.
    exchanged = (xbc + tokens * heads * b) * (parallel.context > 1)
    inside = [
        Op("split", exchanged, exchanged, stream + tokens * packed * b, tokens * packed * b),
        Op("convolution", 0 if local.is_widened else xbc, xbc, stream + x + xbc + dt, xbc),
        Op("dt", dt, 2 * dt, stream + x + xbc + dt, xbc),
        *widen,
        Op("scan", scan, scan_forward, stream + x + xc + 2 * bcc + dt, scan_backward),
        Op(
            "gated norm",
            x + WIDE * tokens * norm_groups,
            x + WIDE * tokens * norm_groups,
            stream + 2 * x,
            2 * x,
        ),
    ]
    before = [
        norm(local),
        column(local, f"{path}.mixer.in_proj", (model.hidden_size, packed), tokens * packed * b),
    ]
    after = [*row(local, f"{path}.mixer.out_proj", (inner, model.hidden_size), x)]
    return before, inside, [*after, residual(local)], x, 0


def _attention(local: Local, path: str) -> _Layer:
    """model.attention.layer and model.attention.core. Up to sequences of `_LONGEST_ROW` tokens half
    of all probabilities are saved; longer sequences use torch's fused kernel. Grouped queries are a
    copy."""
    model, parallel = local.config.model, local.config.parallel
    b, tokens, length = local.element, local.tokens, local.length
    attention = model.attention
    heads = attention.heads // parallel.tensor
    key_heads = max(1, attention.key_value_heads // parallel.tensor)
    query, packed = (heads * attention.head_dim, (heads + 2 * key_heads) * attention.head_dim)
    key = max(key_heads, parallel.context) * attention.head_dim  # whole heads on context ranks
    c = local.chain  # bytes per element inside the core
    q, qc = tokens * query * b, tokens * query * c
    if length <= _LONGEST_ROW:
        block = min(_ATTENTION_BLOCK, length)
        probabilities = tokens * heads * (length + block) // 2 * c
        # Documents are processed one by one, so the working memory is that of one document of one
        # row.
        a_block = tokens * heads * block // local.rows
        core, working = probabilities, 3 * a_block * c
        copies = qc + 2 * tokens * key * c * local.is_widened
    else:
        core = q + WIDE * tokens * heads
        working = 0
        copies = qc = q
    a_row = (qc + 2 * tokens * key * WIDE) // local.rows
    if qc > q:  # the gradient of the result is widened, that of the query is rounded
        a_row += (qc + q) // local.rows
    stream = local.stream
    before = [
        norm(local),
        column(
            local,
            f"{path}.self_attention.linear_qkv",
            (model.hidden_size, packed),
            tokens * packed * b,
        ),
        Op("queries", copies, copies, stream + tokens * packed * b, tokens * packed * b),
    ]
    inside = [
        Op(
            "core attention",
            core + q,
            core + q + qc + working,
            stream + tokens * packed * b,
            a_row + working,
        )
    ]
    after = row(local, f"{path}.self_attention.linear_proj", (query, model.hidden_size), q)
    return before, inside, [*after, residual(local)], q, 0


def routed_rows(local: Local, quantized: bool = False) -> int:
    """Rows of a rank's grouped matrix products: its (token, expert) pairs, padded to equal lengths
    if that is cheaper (model.moe.core); if quantized, padded to whole blocks per expert
    (emulation)."""
    moe, parallel = local.config.model.moe, local.config.parallel
    experts = moe.experts // parallel.expert
    pairs = local.stream_tokens * moe.experts_per_token * parallel.expert_tensor
    if quantized:
        return pairs + experts * _BLOCK_ROWS // 2
    hidden = moe.expert_hidden_size // parallel.expert_tensor
    fullest = ceil(FULLEST_EXPERT * pairs / experts / _BLOCK_ROWS) * _BLOCK_ROWS
    padding = fullest * experts - pairs
    flops = 2 * hidden * expert_width(local.config.model)
    affordable = _PADDING_FLOPS[local.element] // flops * experts
    return pairs + padding if padding <= affordable else pairs


def _moe(local: Local, path: str) -> _Layer:
    """model.moe.layer: shared expert, router, latent projections; routed experts of model.moe.core
    or precision.experts. With experts on several ranks, Megatron's dispatcher too."""
    model, parallel = local.config.model, local.config.parallel
    b, stream = local.element, local.stream
    moe, hidden = model.moe, model.hidden_size
    mlp = f"{path}.mlp"
    tokens, width = local.stream_tokens, expert_width(model)
    latent = moe.latent_size > 0
    one_rank = parallel.expert * parallel.expert_tensor * parallel.tensor * parallel.context == 1
    narrow = tokens * width * b  # tokens in latent width, or hidden size without latent experts
    sent = tokens * moe.experts_per_token * width * b * (not one_rank)
    ops = [norm(local)]
    if moe.shared_expert_hidden_size:
        shared = moe.shared_expert_hidden_size // parallel.tensor
        active = local.tokens * shared * b
        ops += [
            column(local, f"{mlp}.shared_experts.linear_fc1", (hidden, shared), 0),
            Op("relu", active, 2 * active, 2 * stream + active, active),
            Op("square", active, active, 2 * stream + active, 3 * active),
            *row(local, f"{mlp}.shared_experts.linear_fc2", (shared, hidden), stream + active),
        ]
    scores = WIDE * tokens * moe.experts
    choices = tokens * moe.experts_per_token
    routing = 2 * scores + 12 * choices if one_rank else 5 * scores + 12 * choices
    wide = tokens * hidden * WIDE
    ops.append(Op("router", routing, routing + 2 * scores + wide, 2 * stream, 2 * wide))
    if latent:
        op = linear(local, f"{mlp}.fc1_latent_proj", tokens, (hidden, width), 0, 2 * stream)
        ops.append(op)
    inside, received = _routed(local, mlp, sent)
    outer_grads = stream + latent * narrow
    after = []
    if not one_rank:
        after.append(Op("return", 0, 2 * sent, outer_grads + sent, 2 * sent))
    if latent:
        op = linear(local, f"{mlp}.fc2_latent_proj", tokens, (width, hidden), narrow, outer_grads)
        after.append(op)
    if not one_rank:
        ops.append(Op("exchange", 0, 3 * sent, outer_grads, 2 * sent))
    return ops, inside, [*after, residual(local)], 0, latent * narrow if one_rank else received


def _routed(local: Local, mlp: str, sent: int) -> tuple[list[Op], int]:
    """The operators from permutation to the second grouped product, and the bytes of the rows that
    this rank receives."""
    model, parallel = local.config.model, local.config.parallel
    b = local.element
    moe, width = model.moe, expert_width(model)
    hidden = moe.expert_hidden_size // parallel.expert_tensor
    formats = [local.formats.get(f"{mlp}.experts.linear_fc{n}") for n in (1, 2)]
    quantized = any(f is not None and f.is_quantized for f in formats)
    rows = routed_rows(local, quantized)
    x, act = rows * width * b, rows * hidden * b
    dw = moe.experts // parallel.expert * hidden * width * b
    outer_grads = local.stream + (sent or local.stream_tokens * width * b)
    received = local.stream_tokens * moe.experts_per_token * parallel.expert_tensor * width * b
    if not quantized:
        c = local.chain  # bytes per element inside
        x, act, weights = x // b * c, act // b * c, 2 * dw // b * c
        copies = weights * local.is_widened  # FP32 copies of both weights, until the backward pass
        rounded = max(2 * dw, x) * local.is_widened
        widened = 2 * dw if b == 2 and not local.is_widened else 0
        experts = Op(
            "experts",
            2 * act + copies,
            2 * act + x + copies,
            outer_grads + x,
            act + weights + max(x, widened) + rounded,
        )
        return [Op("permute", x, x, outer_grads, x), experts], received
    hadamard = b * rows * (width + hidden) * any(f is not None and f.hadamard for f in formats)
    operands = 2 * rows * (width + hidden) + hadamard + dw
    wide = rows * hidden * WIDE
    copies = local.widened(rows * width, rows * hidden) // (moe.experts // parallel.expert)
    operands += copies
    return [
        Op("permute", x, 3 * x, outer_grads, x),
        Op("experts.linear_fc1", 0, act + 2 * rows * width, outer_grads + x, x + operands),
        Op("squared relu", 2 * act, 2 * act + 2 * wide, outer_grads + act, 3 * wide),
        Op("experts.linear_fc2", 0, x + 2 * rows * hidden, outer_grads + act, act + operands),
    ], received


# Outside the layers -------------------------------------------------------------------------


def embedding(local: Local, name: str = "embedding") -> Op:
    """The lookup, sequence-first. Its gradient is as large as the whole table."""
    table = local.config.model.vocab_size // local.config.parallel.tensor
    table *= local.config.model.hidden_size * local.element
    return Op(name, local.stream, 2 * local.gathered, 0, table + local.gathered)


def head(local: Local) -> list[Op]:
    """Final norm, output layer and model.cross_entropy, whose gradient overwrites the logits."""
    model, b = local.config.model, local.element
    vocabulary = model.vocab_size // local.config.parallel.tensor
    op = linear(local, "output_layer", local.tokens, (model.hidden_size, vocabulary))
    backward = op.backward
    if local.splits_sequence:
        backward += local.stream
    logits = local.tokens * vocabulary * b
    tail = 20 * local.tokens
    return [
        norm(local, "final norm"),
        Op("output layer", logits + tail, op.forward, local.stream, backward),
        Op("cross entropy", 0, _SCRATCH * (2 if b == 2 else 1), 0, 2 * _SCRATCH),
    ]


def prediction_join(local: Local) -> list[Op]:
    """Megatron's MultiTokenPredictionLayer before its layers: the next token's embedding and the
    hidden state are normed, concatenated and projected to the hidden size."""
    model, parallel = local.config.model, local.config.parallel
    stream = local.stream
    outputs = model.hidden_size // parallel.tensor
    op = linear(
        local, "mtp.layers.0.eh_proj", local.tokens, (2 * model.hidden_size, outputs), stream
    )
    gathered = 2 * local.gathered if parallel.tensor > 1 else 0
    scales = 2 * WIDE * local.stream_tokens
    wide = local.stream_tokens * model.hidden_size * WIDE
    return [
        embedding(local, "next token's embedding"),
        Op("join", 2 * stream + scales, 4 * stream, 2 * stream, 2 * stream + 3 * wide),
        replace(
            op,
            forward=op.forward + gathered + stream,
            gradient=2 * stream + stream,
            backward=op.backward + gathered,
        ),
    ]
