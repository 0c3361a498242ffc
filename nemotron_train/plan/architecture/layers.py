"""The arithmetic of the model: pattern -> layers, tensors, linears, parameters and FLOPs.

Owns which tensors a Nemotron-3-shaped model has, their shapes, and what a token costs. Knows
nothing of torch, of precision or of how the model is built. Names follow the modules of the built
model, which are Megatron-Core's `HybridModel` and ours in its slots, except that layer numbers
are global (Megatron's start again at every pipeline stage).

What exists (arXiv 2512.20856, section 2; no bias on any linear, every MLP ungated): embedding
and untied output layer; one RMSNorm before each layer and one at the end; Mamba-2 layers with a
biased short convolution and a gated norm; grouped-query attention without positions; mixture of
experts with a full-width router and shared expert, and routed experts in the latent width. The
multi-token-prediction block exists once and is applied `mtp.depths` times. The router's expert
bias is a buffer, moved by a rule and not by the optimizer: it is no `Tensor` here and is counted
apart, because the published total of Super with MTP (123,611,033,088) includes it.

FLOPs are model FLOPs of the forward pass: two a multiply-add, masked halves not counted,
element-wise work and norms left out. Training costs three times as much; recomputation is not
counted.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import ModelConfig


class LayerKind(StrEnum):
    """What a pattern letter builds; each letter is a full pre-norm residual block."""

    mamba = "M"
    attention = "*"
    moe = "E"


class Sharding(StrEnum):
    """Over which ranks of one pipeline stage and replica a tensor is divided."""

    replicated = "replicated"
    tensor = "tensor"  # by the tensor-parallel group
    expert = "expert"  # by the expert-parallel group, and inside an expert by expert_tensor


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor of the whole, unsharded model. `active` is how many of its elements
    take part in computing one token: fewer than all only for routed experts."""

    name: str
    shape: tuple[int, ...]
    sharding: Sharding
    active: int

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Linear:
    """A linear module: `copies` matrices of out_size x in_size (experts; otherwise 1), of which
    a token goes through `active_copies`, `applications` times (multi-token-prediction depths)."""

    path: str
    in_size: int
    out_size: int
    sharding: Sharding
    applications: int = 1
    copies: int = 1
    active_copies: int = 1

    @property
    def flops(self) -> int:
        """Forward FLOPs a token."""
        return 2 * self.in_size * self.out_size * self.active_copies * self.applications

    @property
    def weight(self) -> Tensor:
        matrix = (self.out_size, self.in_size)
        return Tensor(
            name=f"{self.path}.weight",
            shape=(self.copies, *matrix) if self.copies > 1 else matrix,
            sharding=self.sharding,
            active=self.active_copies * prod(matrix),
        )


@dataclass(frozen=True)
class LayerShape:
    """One layer. `number` counts from 0 over the whole decoder (or inside the MTP block), as
    its `path` does. A layer of the MTP block is held once and costs `applications` forwards."""

    number: int
    kind: LayerKind
    path: str
    in_mtp: bool
    applications: int
    tensors: tuple[Tensor, ...]
    linears: tuple[Linear, ...]
    fixed_mixing_flops: int  # a token, whatever the sequence length: convolution and SSD
    mixing_flops_per_position: int  # a token and a token of sequence length: attention

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        return sum(tensor.active for tensor in self.tensors)

    def forward_flops(self, sequence_length: int) -> int:
        """Forward FLOPs a token, averaged over a causal sequence of `sequence_length`."""
        mixing = self.fixed_mixing_flops + self.mixing_flops_per_position * sequence_length
        return sum(linear.flops for linear in self.linears) + mixing * self.applications


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. The names without `mtp` leave the multi-token-prediction block out."""

    total: int
    total_with_mtp: int
    mtp: int
    active_with_embeddings: int  # a token's share of experts, plus embedding and output layer
    active_with_head_only: int  # the same without the embedding, which is looked up
    active_without_embeddings: int  # neither embedding nor output layer
    embedding: int
    expert_bias: int  # buffers of the routers, MTP block included; in none of the counts above

    @property
    def published(self) -> int:
        """Everything a checkpoint of the whole model holds, expert biases included: what the
        model cards count."""
        return self.total_with_mtp + self.expert_bias


def parse_pattern(
    pattern: str, knob: str = "model.pattern", stages_allowed: bool = True
) -> list[list[LayerKind]]:
    """The pattern's layers, one list a pipeline stage (stages are separated by `|`).

    Raises ConfigError naming `knob`, the offending letter and its position, counted from 1.
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
    """Every layer of the decoder in order, then those of the one physical MTP block.

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
    """What precedes the layers: the embedding, vocabulary x hidden."""
    shape = (model.vocab_size, model.hidden_size)
    return [_tensor("embedding.word_embeddings.weight", shape, Sharding.tensor)]


def head_tensors(model: ModelConfig) -> list[Tensor]:
    """What follows the layers: the final norm and the untied output layer."""
    norm = _tensor("decoder.final_norm.weight", (model.hidden_size,))
    return [norm, _output_layer(model).weight]


def mtp_tensors(model: ModelConfig) -> list[Tensor]:
    """What the MTP block has around its layers: two norms (of the shifted embedding and of the
    hidden state), the projection of both to one width, and its own final norm."""
    if model.mtp.depths == 0:
        return []
    norms = [
        _tensor(f"mtp.layers.0.{name}.weight", (model.hidden_size,))
        for name in ("enorm", "hnorm", "final_layernorm")
    ]
    return [*norms, _mtp_projection(model).weight]


def tensors(model: ModelConfig) -> list[Tensor]:
    """Every parameter tensor of the unsharded model under its full name."""
    everything = embedding_tensors(model) + head_tensors(model) + mtp_tensors(model)
    return everything + [tensor for layer in layers(model) for tensor in layer.tensors]


def linears(model: ModelConfig) -> list[Linear]:
    """Every linear module in forward order: the decoder's, the MTP block's, the output layer.

    The embedding is a lookup and the short convolution no matrix product: neither is listed.
    """
    shapes = layers(model)
    found = [linear for layer in shapes if not layer.in_mtp for linear in layer.linears]
    if model.mtp.depths > 0:
        found.append(_mtp_projection(model))
        found += [linear for layer in shapes if layer.in_mtp for linear in layer.linears]
    return [*found, _output_layer(model)]


def parameters(model: ModelConfig) -> Parameters:
    """Total and active parameter counts (see `Parameters`)."""
    shapes = layers(model)
    decoder = [layer for layer in shapes if not layer.in_mtp]
    outside = embedding_tensors(model) + head_tensors(model)
    embedding = sum(tensor.parameters for tensor in embedding_tensors(model))
    total = sum(tensor.parameters for tensor in outside)
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
    """Forward FLOPs a token of the whole model, every MTP depth and its logits included."""
    whole_layers = sum(layer.forward_flops(sequence_length) for layer in layers(model))
    projection = _mtp_projection(model).flops if model.mtp.depths > 0 else 0
    return whole_layers + projection + _output_layer(model).flops


def training_flops(model: ModelConfig, sequence_length: int) -> int:
    """FLOPs a trained token: the backward pass costs twice the forward."""
    return 3 * forward_flops(model, sequence_length)


def mamba_in_proj_size(model: ModelConfig) -> int:
    """Rows of a Mamba-2 in_proj: gate and x (heads x head_dim each), B and C (groups x state
    each), dt (heads)."""
    mamba = model.mamba
    return 2 * mamba.heads * mamba.head_dim + 2 * mamba.groups * mamba.state_size + mamba.heads


def expert_width(model: ModelConfig) -> int:
    """The width in which tokens are dispatched and routed experts work."""
    return model.moe.latent_size or model.hidden_size


def _output_layer(model: ModelConfig) -> Linear:
    """Shared: each MTP depth predicts through it once more."""
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
    parts = {LayerKind.mamba: _mamba, LayerKind.attention: _attention, LayerKind.moe: _moe}[kind]
    own_tensors, own_linears, fixed, per_position = parts(model, path, applications)
    return LayerShape(
        number=number,
        kind=kind,
        path=path,
        in_mtp=path.startswith("mtp."),
        applications=applications,
        tensors=(*own_tensors, *(linear.weight for linear in own_linears)),
        linears=tuple(own_linears),
        fixed_mixing_flops=fixed,
        mixing_flops_per_position=per_position,
    )


# Tensors that are no linear's weight, linears, and the two mixing counts of LayerShape.
type _Parts = tuple[list[Tensor], list[Linear], int, int]


def _mamba(model: ModelConfig, path: str, applications: int) -> _Parts:
    """Mamba-2 (arXiv 2405.21060, section 6, the chunked algorithm): inside a chunk of Q tokens
    the two masked products C B^T and (L o C B^T) x, half of each; the chunk's state B x and its
    reading C h in full; one multiply-add a state element and chunk to carry the state on."""
    mamba, split = model.mamba, Sharding.tensor
    inner, state, chunk = mamba.heads * mamba.head_dim, mamba.state_size, mamba.chunk_size
    convolved = inner + 2 * mamba.groups * state
    mixer = f"{path}.mixer"
    own = [
        _tensor(f"{path}.norm.weight", (model.hidden_size,)),
        _tensor(f"{mixer}.conv_weight", (convolved, mamba.conv_kernel_size), split),
        _tensor(f"{mixer}.conv_bias", (convolved,), split),
        _tensor(f"{mixer}.dt_bias", (mamba.heads,), split),
        _tensor(f"{mixer}.A_log", (mamba.heads,), split),
        _tensor(f"{mixer}.D", (mamba.heads,), split),
        _tensor(f"{mixer}.norm.weight", (inner,), split),
    ]
    found = [
        Linear(
            f"{mixer}.in_proj", model.hidden_size, mamba_in_proj_size(model), split, applications
        ),
        Linear(f"{mixer}.out_proj", inner, model.hidden_size, split, applications),
    ]
    convolution = 2 * mamba.conv_kernel_size * convolved
    inside_chunk = chunk * (mamba.groups * state + inner)
    states = 4 * inner * state + 2 * inner * state // chunk
    return own, found, convolution + inside_chunk + states, 0


def _attention(model: ModelConfig, path: str, applications: int) -> _Parts:
    """Grouped-query attention; of the two products over the sequence the causal half."""
    attention, hidden, split = model.attention, model.hidden_size, Sharding.tensor
    query = attention.heads * attention.head_dim
    query_key_value = query + 2 * attention.key_value_heads * attention.head_dim
    mixer = f"{path}.self_attention"
    found = [
        Linear(f"{mixer}.linear_qkv", hidden, query_key_value, split, applications),
        Linear(f"{mixer}.linear_proj", query, hidden, split, applications),
    ]
    return [_tensor(f"{path}.input_layernorm.weight", (hidden,))], found, 0, 2 * query


def _moe(model: ModelConfig, path: str, applications: int) -> _Parts:
    """LatentMoE (arXiv 2601.18089, eq. 1 and 2), or the standard one when latent_size is 0."""
    moe, hidden, width = model.moe, model.hidden_size, expert_width(model)
    size, shared = moe.expert_hidden_size, moe.shared_expert_hidden_size
    mlp, whole, split = f"{path}.mlp", Sharding.replicated, Sharding.tensor
    routed = (Sharding.expert, applications, moe.experts, moe.experts_per_token)
    found = [
        Linear(f"{mlp}.router", hidden, moe.experts, whole, applications),
        Linear(f"{mlp}.experts.linear_fc1", width, size, *routed),
        Linear(f"{mlp}.experts.linear_fc2", size, width, *routed),
    ]
    if moe.latent_size > 0:
        found.insert(1, Linear(f"{mlp}.fc1_latent_proj", hidden, width, whole, applications))
        found.append(Linear(f"{mlp}.fc2_latent_proj", width, hidden, whole, applications))
    if shared > 0:
        found += [
            Linear(f"{mlp}.shared_experts.linear_fc1", hidden, shared, split, applications),
            Linear(f"{mlp}.shared_experts.linear_fc2", shared, hidden, split, applications),
        ]
    return [_tensor(f"{path}.pre_mlp_layernorm.weight", (hidden,))], found, 0, 0


def _tensor(name: str, shape: tuple[int, ...], sharding: Sharding = Sharding.replicated) -> Tensor:
    return Tensor(name, shape, sharding, prod(shape))
