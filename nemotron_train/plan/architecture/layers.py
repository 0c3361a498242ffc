"""Arithmetic of the model: from the pattern to layers, tensors, linears, parameters and FLOPs.

Owns: the tensors of a Nemotron-3-style model, their shapes, and the FLOPs per token. Does not own:
precision, or the construction of the model. No torch. Names follow the modules of the built model
(Megatron-Core's `HybridModel` with our modules), except that layer numbers are global: Megatron
counts from each pipeline stage.

Parts of the model (arXiv 2512.20856, section 2; linears have no bias, MLPs are ungated): embedding
and untied output layer; one RMSNorm before each layer and one at the end; Mamba-2 layers with a
biased short convolution and a gated norm; grouped-query attention without positional embedding;
mixture of experts with a full-width router and shared expert, and routed experts in the latent
width. The multi-token-prediction block exists once and is applied `mtp.depths` times. The router's
expert bias is a buffer that the load-balancing rule updates, not the optimizer. It is no `Tensor`
here and is counted separately, because the published total of Super with MTP (123,611,033,088)
includes it.

FLOPs are model FLOPs of the forward pass: two per multiply-add, without masked halves, element-wise
operations and norms. Training costs three times as much; recomputation is not counted.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import ModelConfig


class LayerKind(StrEnum):
    """The layer that a pattern letter stands for; each is a full pre-norm residual block."""

    mamba = "M"
    attention = "*"
    moe = "E"


class Sharding(StrEnum):
    """The ranks over which a tensor is sharded, within one pipeline stage and replica."""

    replicated = "replicated"
    tensor = "tensor"  # over the tensor-parallel group
    expert = "expert"  # over the expert-parallel group, and within an expert over expert_tensor


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor of the unsharded model. `active`: number of elements used for one token,
    which is less than all only for routed experts."""

    name: str
    shape: tuple[int, ...]
    sharding: Sharding
    active: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Linear:
    """A linear module with `copies` matrices of out_size x in_size (1 except for routed experts). A
    token uses `active_copies` of them, `applications` times (once per depth in the MTP block)."""

    path: str
    in_size: int
    out_size: int
    sharding: Sharding
    applications: int = 1
    copies: int = 1
    active_copies: int = 1

    @property
    def flops(self) -> int:
        """Forward FLOPs per token, all applications together."""
        return 2 * self.in_size * self.out_size * self.active_copies * self.applications

    @property
    def weight(self) -> Tensor:
        """The weight, of shape (out_size, in_size) or (copies, out_size, in_size)."""
        matrix = (self.out_size, self.in_size)
        return Tensor(
            name=f"{self.path}.weight",
            shape=(self.copies, *matrix) if self.copies > 1 else matrix,
            sharding=self.sharding,
            active=self.active_copies * prod(matrix),
        )


@dataclass(frozen=True)
class LayerShape:
    """One layer. `number` counts from 0 over the whole decoder (or inside the MTP block), as in
    `path`. A layer of the MTP block has one set of weights and runs `applications` times."""

    number: int
    kind: LayerKind
    path: str
    in_mtp: bool
    applications: int
    tensors: tuple[Tensor, ...]
    linears: tuple[Linear, ...]
    fixed_mixing_flops: int  # per token, for any sequence length: convolution and SSD
    mixing_flops_per_position: int  # per token and per token of sequence length: attention

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """Number of parameters used for one token."""
        return sum(tensor.active for tensor in self.tensors)

    def forward_flops(self, sequence_length: int) -> int:
        """Forward FLOPs per token, averaged over a causal sequence of `sequence_length` tokens."""
        mixing = self.fixed_mixing_flops + self.mixing_flops_per_position * sequence_length
        return sum(linear.flops for linear in self.linears) + mixing * self.applications


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. Fields without `mtp` in their name exclude the MTP block."""

    total: int
    total_with_mtp: int
    mtp: int
    active_with_embeddings: int  # used for one token, with embedding and output layer
    active_with_head_only: int  # the same without the embedding, which is a lookup
    active_without_embeddings: int  # without embedding and output layer
    embedding: int
    expert_bias: int  # router buffers, with the MTP block; not part of the counts above

    @property
    def published(self) -> int:
        """The count in the model cards: all parameters of a checkpoint and the expert biases."""
        return self.total_with_mtp + self.expert_bias


def parse_pattern(
    pattern: str, knob: str = "model.pattern", stages_allowed: bool = True
) -> list[list[LayerKind]]:
    """The layers of the pattern, one list per pipeline stage (stages are separated by `|`).

    Raises ConfigError with `knob`, the invalid letter and its position, counted from 1.
    """
    stages: list[list[LayerKind]] = [[]]
    for position, letter in enumerate(pattern, start=1):
        if letter == "|" and stages_allowed:
            if not stages[-1]:
                raise ConfigError(
                    f"{knob}={pattern}: the pipeline stage that ends at position {position} "
                    "is empty; put at least one layer between two |"
                )
            stages.append([])
            continue
        try:
            stages[-1].append(LayerKind(letter))
        except ValueError:
            raise ConfigError(
                f"{knob}={pattern}: {letter!r} at position {position} is no layer; "
                "use M (Mamba-2), * (attention), E (mixture of experts)"
                + (" and | (pipeline stage)" if stages_allowed else "")
                + ("; multi-token prediction goes into model.mtp" if letter == "/" else "")
            ) from None
    if not stages[-1]:
        raise ConfigError(
            f"{knob}={pattern or repr('')}: "
            + ("the last pipeline stage is empty" if len(stages) > 1 else "no layer")
            + "; use M (Mamba-2), * (attention) and E (mixture of experts)"
        )
    return stages


def layers(model: ModelConfig) -> list[LayerShape]:
    """Every layer of the decoder in order, then the layers of the MTP block (once).

    Raises ConfigError on a bad `model.pattern` or, with depths > 0, `model.mtp.pattern`.
    """
    decoder = [kind for stage in parse_pattern(model.pattern) for kind in stage]
    shapes = [
        _layer(model, kind, number, f"decoder.layers.{number}", 1)
        for number, kind in enumerate(decoder)
    ]
    if model.mtp.depths > 0:
        inside = parse_pattern(model.mtp.pattern, "model.mtp.pattern", stages_allowed=False)[0]
        shapes += [
            _layer(
                model,
                kind,
                number,
                f"mtp.layers.0.mtp_model_layer.layers.{number}",
                model.mtp.depths,
            )
            for number, kind in enumerate(inside)
        ]
    return shapes


def embedding_tensors(model: ModelConfig) -> list[Tensor]:
    """Tensors before the layers: the embedding, vocabulary x hidden."""
    shape = (model.vocab_size, model.hidden_size)
    return [_tensor("embedding.word_embeddings.weight", shape, Sharding.tensor)]


def head_tensors(model: ModelConfig) -> list[Tensor]:
    """Tensors after the layers: the final norm and the untied output layer."""
    norm = _tensor("decoder.final_norm.weight", (model.hidden_size,))
    return [norm, _output_layer(model).weight]


def mtp_tensors(model: ModelConfig) -> list[Tensor]:
    """Tensors of the MTP block outside its layers: two norms (of the shifted embedding and of the
    hidden state), the projection of both to one hidden size, and the block's final norm."""
    if model.mtp.depths == 0:
        return []
    norms = [
        _tensor(f"mtp.layers.0.{name}.weight", (model.hidden_size,))
        for name in ("enorm", "hnorm", "final_layernorm")
    ]
    return [*norms, _mtp_projection(model).weight]


def tensors(model: ModelConfig) -> list[Tensor]:
    """Every parameter tensor of the unsharded model, with its full name."""
    outer_tensors = embedding_tensors(model) + head_tensors(model) + mtp_tensors(model)
    return outer_tensors + [tensor for layer in layers(model) for tensor in layer.tensors]


def linears(model: ModelConfig) -> list[Linear]:
    """Every linear module in forward order: decoder, MTP block, output layer.

    Excludes the embedding (a lookup) and the short convolution (not a matrix product).
    """
    shapes = layers(model)
    result = [linear for layer in shapes if not layer.in_mtp for linear in layer.linears]
    if model.mtp.depths > 0:
        result.append(_mtp_projection(model))
        result += [linear for layer in shapes if layer.in_mtp for linear in layer.linears]
    return [*result, _output_layer(model)]


def parameters(model: ModelConfig) -> Parameters:
    """Total and active parameter counts (see `Parameters`)."""
    shapes = layers(model)
    decoder = [layer for layer in shapes if not layer.in_mtp]
    outer_tensors = embedding_tensors(model) + head_tensors(model)
    embedding = sum(tensor.parameters for tensor in embedding_tensors(model))
    total = sum(tensor.parameters for tensor in outer_tensors)
    active = total + sum(layer.active_parameters for layer in decoder)
    total += sum(layer.parameters for layer in decoder)
    mtp = sum(tensor.parameters for tensor in mtp_tensors(model))
    mtp += sum(layer.parameters for layer in shapes if layer.in_mtp)
    return Parameters(
        total=total,
        total_with_mtp=total + mtp,
        mtp=mtp,
        active_with_embeddings=active,
        active_with_head_only=active - embedding,
        active_without_embeddings=active - embedding - _output_layer(model).weight.parameters,
        embedding=embedding,
        expert_bias=model.moe.experts * sum(layer.kind == LayerKind.moe for layer in shapes),
    )


def forward_flops(model: ModelConfig, sequence_length: int) -> int:
    """Forward FLOPs per token of the whole model, with every MTP depth and its logits."""
    layer_flops = sum(layer.forward_flops(sequence_length) for layer in layers(model))
    projection = _mtp_projection(model).flops if model.mtp.depths > 0 else 0
    return layer_flops + projection + _output_layer(model).flops


def training_flops(model: ModelConfig, sequence_length: int) -> int:
    """FLOPs per trained token: the backward pass costs twice the forward pass."""
    return 3 * forward_flops(model, sequence_length)


def mamba_in_proj_size(model: ModelConfig) -> int:
    """Rows of a Mamba-2 in_proj: gate and x (heads x head_dim each), B and C (groups x state
    each), dt (heads)."""
    mamba = model.mamba
    return 2 * mamba.heads * mamba.head_dim + 2 * mamba.groups * mamba.state_size + mamba.heads


def expert_width(model: ModelConfig) -> int:
    """The input and output width of routed experts, in which tokens are dispatched."""
    return model.moe.latent_size or model.hidden_size


def _output_layer(model: ModelConfig) -> Linear:
    """The output layer, which every MTP depth applies once more."""
    applications = 1 + model.mtp.depths
    return Linear(
        "output_layer", model.hidden_size, model.vocab_size, Sharding.tensor, applications
    )


def _mtp_projection(model: ModelConfig) -> Linear:
    hidden = model.hidden_size
    return Linear("mtp.layers.0.eh_proj", 2 * hidden, hidden, Sharding.tensor, model.mtp.depths)


def _layer(
    model: ModelConfig, kind: LayerKind, number: int, path: str, applications: int
) -> LayerShape:
    build = {LayerKind.mamba: _mamba, LayerKind.attention: _attention, LayerKind.moe: _moe}[kind]
    other_tensors, layer_linears, fixed, per_position = build(model, path, applications)
    return LayerShape(
        number=number,
        kind=kind,
        path=path,
        in_mtp=path.startswith("mtp."),
        applications=applications,
        tensors=(*other_tensors, *(linear.weight for linear in layer_linears)),
        linears=tuple(layer_linears),
        fixed_mixing_flops=fixed,
        mixing_flops_per_position=per_position,
    )


# Tensors that are not weights of linears; linears; the two mixing FLOPs of LayerShape.
type _Parts = tuple[list[Tensor], list[Linear], int, int]


def _mamba(model: ModelConfig, path: str, applications: int) -> _Parts:
    """Mamba-2 (arXiv 2405.21060, section 6, the chunked algorithm). In a chunk of Q tokens: half of
    each of the two masked products C B^T and (L o C B^T) x; all of the products B x (the chunk's
    state) and C h (its readout). Per chunk and state element: one multiply-add to pass the state to
    the next chunk."""
    mamba, split = model.mamba, Sharding.tensor
    inner, state, chunk = mamba.heads * mamba.head_dim, mamba.state_size, mamba.chunk_size
    convolved = inner + 2 * mamba.groups * state
    mixer = f"{path}.mixer"
    other_tensors = [
        _tensor(f"{path}.norm.weight", (model.hidden_size,)),
        _tensor(f"{mixer}.conv_weight", (convolved, mamba.conv_kernel_size), split),
        _tensor(f"{mixer}.conv_bias", (convolved,), split),
        _tensor(f"{mixer}.dt_bias", (mamba.heads,), split),
        _tensor(f"{mixer}.A_log", (mamba.heads,), split),
        _tensor(f"{mixer}.D", (mamba.heads,), split),
        _tensor(f"{mixer}.norm.weight", (inner,), split),
    ]
    layer_linears = [
        Linear(
            f"{mixer}.in_proj", model.hidden_size, mamba_in_proj_size(model), split, applications
        ),
        Linear(f"{mixer}.out_proj", inner, model.hidden_size, split, applications),
    ]
    convolution = 2 * mamba.conv_kernel_size * convolved
    inside_chunk = chunk * (mamba.groups * state + inner)
    states = 4 * inner * state + 2 * inner * state // chunk
    return other_tensors, layer_linears, convolution + inside_chunk + states, 0


def _attention(model: ModelConfig, path: str, applications: int) -> _Parts:
    """Grouped-query attention; the causal half of the two products over the sequence."""
    attention, hidden, split = model.attention, model.hidden_size, Sharding.tensor
    query = attention.heads * attention.head_dim
    query_key_value = query + 2 * attention.key_value_heads * attention.head_dim
    mixer = f"{path}.self_attention"
    layer_linears = [
        Linear(f"{mixer}.linear_qkv", hidden, query_key_value, split, applications),
        Linear(f"{mixer}.linear_proj", query, hidden, split, applications),
    ]
    return [_tensor(f"{path}.input_layernorm.weight", (hidden,))], layer_linears, 0, 2 * query


def _moe(model: ModelConfig, path: str, applications: int) -> _Parts:
    """LatentMoE (arXiv 2601.18089, eq. 1 and 2), or a standard MoE if latent_size is 0."""
    moe = model.moe
    hidden, width = model.hidden_size, expert_width(model)
    size, shared = moe.expert_hidden_size, moe.shared_expert_hidden_size
    mlp = f"{path}.mlp"
    replicated, split = Sharding.replicated, Sharding.tensor
    routed = (Sharding.expert, applications, moe.experts, moe.experts_per_token)
    layer_linears = [
        Linear(f"{mlp}.router", hidden, moe.experts, replicated, applications),
        Linear(f"{mlp}.experts.linear_fc1", width, size, *routed),
        Linear(f"{mlp}.experts.linear_fc2", size, width, *routed),
    ]
    if moe.latent_size > 0:
        layer_linears.insert(
            1, Linear(f"{mlp}.fc1_latent_proj", hidden, width, replicated, applications)
        )
        layer_linears.append(
            Linear(f"{mlp}.fc2_latent_proj", width, hidden, replicated, applications)
        )
    if shared > 0:
        layer_linears += [
            Linear(f"{mlp}.shared_experts.linear_fc1", hidden, shared, split, applications),
            Linear(f"{mlp}.shared_experts.linear_fc2", shared, hidden, split, applications),
        ]
    return [_tensor(f"{path}.pre_mlp_layernorm.weight", (hidden,))], layer_linears, 0, 0


def _tensor(name: str, shape: tuple[int, ...], sharding: Sharding = Sharding.replicated) -> Tensor:
    return Tensor(name, shape, sharding, prod(shape))
