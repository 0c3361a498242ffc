"""Table of which of our tensors make up each tensor of Hugging Face's `NemotronH`.

Owns: the names and the layout of weights in the published checkpoints. Does not own: config.json
(`config`), reading and writing (`to_hf`, `from_hf`). No torch.

Each of their tensors is a concatenation of rows of ours. Export and import use the same table, so
they cannot disagree. Differences between the two:

    in_proj, conv1d         ours are one tensor per component (z, x, B, C, dt), theirs are joined
    conv1d.weight           theirs has a middle dimension of 1, torch's depthwise form
    q_proj, k_proj, v_proj  ours is Megatron's linear_qkv: for each key/value head, the queries that
                            share it, then the key, then the value
    experts                 ours are stacked, [experts, out, in]; theirs are one tensor per expert
    mtp.layers              ours is one block with inner layers; theirs are these layers, the first
                            with the projection and its two norms, the last with the final norm
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from nemotron_train.config.schema import ModelConfig
from nemotron_train.plan.architecture.layers import LayerKind, LayerShape, layers, tensors

# Ours -> theirs, relative to the layer's path, for tensors that are identical.
SAME: dict[LayerKind, dict[str, str]] = {
    LayerKind.mamba: {
        "norm.weight": "norm.weight",
        "mixer.dt_bias": "mixer.dt_bias",
        "mixer.A_log": "mixer.A_log",
        "mixer.D": "mixer.D",
        "mixer.norm.weight": "mixer.norm.weight",
        "mixer.out_proj.weight": "mixer.out_proj.weight",
    },
    LayerKind.attention: {
        "input_layernorm.weight": "norm.weight",
        "self_attention.linear_proj.weight": "mixer.o_proj.weight",
    },
    LayerKind.moe: {
        "pre_mlp_layernorm.weight": "norm.weight",
        "mlp.router.weight": "mixer.gate.weight",
        "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
        "mlp.fc1_latent_proj.weight": "mixer.fc1_latent_proj.weight",
        "mlp.fc2_latent_proj.weight": "mixer.fc2_latent_proj.weight",
        "mlp.shared_experts.linear_fc1.weight": "mixer.shared_experts.up_proj.weight",
        "mlp.shared_experts.linear_fc2.weight": "mixer.shared_experts.down_proj.weight",
    },
}
# Ours, stored by component -> (theirs, the components in order; t is dt).
JOINED = {
    "mixer.in_proj.weight": ("mixer.in_proj.weight", "zxBCt"),
    "mixer.conv_weight": ("mixer.conv1d.weight", "xBC"),
    "mixer.conv_bias": ("mixer.conv1d.bias", "xBC"),
}
QUERY_KEY_VALUE = "self_attention.linear_qkv.weight"
EXPERTS = {
    "mlp.experts.linear_fc1.weight": "up_proj.weight",
    "mlp.experts.linear_fc2.weight": "down_proj.weight",
}
OUTSIDE = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
}
FIRST_OF_MTP = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
LAST_OF_MTP = "final_layernorm.weight"
# Always stored in FP32: inputs of exponentials, or values updated in steps of 1e-3.
FLOAT32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")


@dataclass(frozen=True)
class Piece:
    """Rows of one of our tensors. The tensor's rows form `groups` equal blocks; the piece is rows
    [start, stop) of each block."""

    name: str
    shape: tuple[int, ...]  # of our whole tensor
    start: int
    stop: int
    groups: int = 1

    @property
    def rows(self) -> int:
        """Number of rows over all groups."""
        return self.groups * (self.stop - self.start)


@dataclass(frozen=True)
class Weight:
    """One of their tensors: our pieces concatenated along the rows and viewed as `shape`."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def keeps_float32(self) -> bool:
        """Whether the tensor is stored in FP32 for any requested dtype."""
        return self.name.endswith(FLOAT32)

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def weights(model: ModelConfig) -> list[Weight]:
    """Every tensor of the model under its Hugging Face name, ordered as in the published
    checkpoints: the decoder layer by layer, then multi-token prediction."""
    shapes = {tensor.name: tensor.shape for tensor in tensors(model)}
    embedding, norm, head = (_same(ours, theirs, shapes[ours]) for ours, theirs in OUTSIDE.items())
    table, block = [embedding], []
    for layer in layers(model):
        if layer.in_mtp:
            block += _layer(model, layer, f"mtp.layers.{layer.number}")
        else:
            table += _layer(model, layer, f"backbone.layers.{layer.number}")
    table += [norm, head, *block]
    if model.mtp.depths > 0:
        last = len(model.mtp.pattern) - 1
        for name in (*FIRST_OF_MTP, LAST_OF_MTP):
            ours = f"mtp.layers.0.{name}"
            number = last if name == LAST_OF_MTP else 0
            table.append(_same(ours, f"mtp.layers.{number}.{name}", shapes[ours]))
    return table


def our_shapes(table: list[Weight]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each of our tensors as stored in a checkpoint, in the table's order."""
    return {piece.name: piece.shape for weight in table for piece in weight.pieces}


def _layer(model: ModelConfig, layer: LayerShape, theirs: str) -> Iterator[Weight]:
    below = {t.name.removeprefix(f"{layer.path}."): t.shape for t in layer.tensors}
    if layer.kind == LayerKind.moe:
        below["mlp.router.expert_bias"] = (model.moe.experts,)
    for name, their_name in SAME[layer.kind].items():
        if name in below:  # latent projections and shared expert are optional
            yield _same(f"{layer.path}.{name}", f"{theirs}.{their_name}", below[name])
    if layer.kind == LayerKind.mamba:
        yield from _joined(model, layer.path, theirs, below)
    elif layer.kind == LayerKind.attention:
        yield from _query_key_value(model, layer.path, theirs)
    else:
        yield from _experts(model, layer.path, theirs, below)


def _same(ours: str, theirs: str, shape: tuple[int, ...]) -> Weight:
    return Weight(theirs, shape, (Piece(ours, shape, 0, shape[0]),))


def _joined(
    model: ModelConfig, ours: str, theirs: str, below: Mapping[str, tuple[int, ...]]
) -> Iterator[Weight]:
    mamba = model.mamba
    inner, state = mamba.heads * mamba.head_dim, mamba.groups * mamba.state_size
    rows = {"z": inner, "x": inner, "B": state, "C": state, "t": mamba.heads}
    for name, (their_name, components) in JOINED.items():
        shape = below[name]
        pieces = tuple(
            Piece(f"{ours}.{name}.{letter}", (rows[letter], *shape[1:]), 0, rows[letter])
            for letter in components
        )
        is_convolution = their_name.endswith("conv1d.weight")
        their_shape = (shape[0], 1, *shape[1:]) if is_convolution else shape
        yield Weight(f"{theirs}.{their_name}", their_shape, pieces)


def _query_key_value(model: ModelConfig, ours: str, theirs: str) -> Iterator[Weight]:
    attention, hidden = model.attention, model.hidden_size
    groups, width = attention.key_value_heads, attention.head_dim
    queries = attention.heads // groups * width
    shape = (groups * (queries + 2 * width), hidden)
    cuts = {"q": (0, queries), "k": (queries, queries + width)}
    cuts["v"] = (queries + width, queries + 2 * width)
    for letter, (start, stop) in cuts.items():
        piece = Piece(f"{ours}.{QUERY_KEY_VALUE}", shape, start, stop, groups)
        yield Weight(f"{theirs}.mixer.{letter}_proj.weight", (piece.rows, hidden), (piece,))


def _experts(
    model: ModelConfig, ours: str, theirs: str, below: Mapping[str, tuple[int, ...]]
) -> Iterator[Weight]:
    for name, their_name in EXPERTS.items():
        matrix = below[name][-2:]
        shape = (model.moe.experts, *matrix)
        for expert in range(model.moe.experts):
            piece = Piece(f"{ours}.{name}", shape, expert, expert + 1)
            yield Weight(f"{theirs}.mixer.experts.{expert}.{their_name}", matrix, (piece,))
