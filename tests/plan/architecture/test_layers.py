"""Parameters and FLOPs against published totals, Hugging Face's model and plain counting.

Not covered: that the model this project builds has these tensors (tests/model/test_hybrid.py), and
that a real kernel executes the FLOPs counted here.
"""

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.compose.compose import compose_config, recipes_folder
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import (
    AttentionConfig,
    MambaConfig,
    ModelConfig,
    MoeConfig,
    MtpConfig,
)
from nemotron_train.plan.architecture.layers import (
    LayerKind,
    LayerShape,
    Sharding,
    forward_flops,
    layers,
    linears,
    parameters,
    parse_pattern,
    tensors,
)

SIZES = ("tiny", "proxy_10m", "proxy_100m", "nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b")


def recipe(name: str) -> ModelConfig:
    return compose_config([f"model={name}"]).model


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small models of every kind: any mixture of layers, with and without latent width, shared
    expert and MTP block."""
    small = st.integers(1, 6)
    groups, experts = draw(small), draw(st.integers(1, 8))
    return ModelConfig(
        name="drawn",
        pattern=draw(st.text("M*E", min_size=1, max_size=8)),
        hidden_size=draw(st.integers(1, 64)),
        vocab_size=draw(st.integers(1, 300)),
        attention=AttentionConfig(draw(small), draw(small), draw(small)),
        mamba=MambaConfig(groups * draw(small), draw(small), draw(small), groups, draw(small)),
        moe=MoeConfig(
            experts=experts,
            experts_per_token=draw(st.integers(1, experts)),
            expert_hidden_size=draw(small),
            shared_expert_hidden_size=draw(st.integers(0, 6)),
            latent_size=draw(st.integers(0, 6)),
        ),
        mtp=MtpConfig(draw(st.integers(0, 3)), draw(st.sampled_from(["*E", "M", "E*M"]))),
        init_std=0.02,
    )


# Published totals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "active_with_head", "active_with_embeddings"),
    [
        ("nano_30b_a3b", "31.58", "3.23", "3.58"),
        ("super_120b_a12b", "120.67", "12.23", "12.77"),
        ("ultra_550b_a55b", "549.31", "54.99", "56.06"),
    ],
)
def test_published_totals(
    name: str, total: str, active_with_head: str, active_with_embeddings: str
) -> None:
    """The figures of the reports in billions. The model cards say 3.2B, 12B and 55B active."""
    counts = parameters(recipe(name))
    assert f"{counts.total / 1e9:.2f}" == total
    assert f"{counts.active_with_head_only / 1e9:.2f}" == active_with_head
    assert f"{counts.active_with_embeddings / 1e9:.2f}" == active_with_embeddings


def test_super_with_mtp_is_exactly_the_published_count() -> None:
    """The number on the card includes the expert biases of 41 routers, which are buffers here."""
    counts = parameters(recipe("super_120b_a12b"))
    assert counts.published == 123_611_033_088
    assert counts.published - counts.total_with_mtp == 41 * 512


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("nano_30b_a3b", {"M": 23, "*": 6, "E": 23}),
        ("super_120b_a12b", {"M": 40, "*": 8, "E": 40}),
        ("ultra_550b_a55b", {"M": 48, "*": 12, "E": 48}),
    ],
)
def test_published_layer_counts(name: str, letters: dict[str, int]) -> None:
    decoder = [layer for layer in layers(recipe(name)) if not layer.in_mtp]
    assert Counter(layer.kind.value for layer in decoder) == letters
    assert [layer.number for layer in decoder] == list(range(len(decoder)))


@pytest.mark.parametrize(("name", "size"), [("proxy_10m", 10e6), ("proxy_100m", 100e6)])
def test_proxies_are_the_size_their_recipe_states(name: str, size: float) -> None:
    counts = parameters(recipe(name))
    text = (recipes_folder() / "model" / f"{name}.yaml").read_text()
    assert f"{counts.total_with_mtp:,} parameters" in text
    assert f"{counts.total:,} without it" in text
    assert f"{counts.active_with_embeddings:,} active with embeddings" in text
    assert f"{counts.active_without_embeddings:,} without embedding and output layer" in text
    assert counts.total_with_mtp == pytest.approx(size, rel=0.05)


# Against Hugging Face -----------------------------------------------------------------------


def hugging_face_shapes(model: ModelConfig) -> Counter[tuple[int, ...]]:
    """Shapes of every parameter of transformers' NemotronH of the same sizes, on the meta device.
    Its query, key and value are separate; they are packed here as in Megatron."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    hf_config = modeling.NemotronHConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        hybrid_override_pattern=model.pattern,
        num_attention_heads=model.attention.heads,
        num_key_value_heads=model.attention.key_value_heads,
        head_dim=model.attention.head_dim,
        ssm_state_size=model.mamba.state_size,
        mamba_num_heads=model.mamba.heads,
        mamba_head_dim=model.mamba.head_dim,
        n_groups=model.mamba.groups,
        conv_kernel=model.mamba.conv_kernel_size,
        n_routed_experts=model.moe.experts,
        num_experts_per_tok=model.moe.experts_per_token,
        moe_intermediate_size=model.moe.expert_hidden_size,
        moe_shared_expert_intermediate_size=model.moe.shared_expert_hidden_size,
        moe_latent_size=model.moe.latent_size or None,
    )
    with torch.device("meta"):
        built = modeling.NemotronHForCausalLM(hf_config)
    shapes: Counter[tuple[int, ...]] = Counter()
    query_key_value = 0
    for name, parameter in built.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            query_key_value += parameter.shape[0]
            if name.endswith("v_proj.weight"):
                shapes[(query_key_value, model.hidden_size)] += 1
                query_key_value = 0
        elif name.endswith("conv1d.weight"):
            shapes[(parameter.shape[0], parameter.shape[2])] += 1  # one input channel per group
        else:
            shapes[tuple(parameter.shape)] += 1
    return shapes


@pytest.mark.parametrize("name", SIZES)
def test_tensors_are_hugging_faces(name: str) -> None:
    """Every tensor of every size except the MTP block, which transformers does not build."""
    model = recipe(name)
    expected = hugging_face_shapes(model)
    ours = Counter(tensor.shape for tensor in tensors(model) if not tensor.name.startswith("mtp."))
    assert ours == expected
    total = sum(prod(shape) * count for shape, count in expected.items())
    assert parameters(model).total == total


# Properties ---------------------------------------------------------------------------------


@given(models())
@settings(deadline=None, max_examples=60)
def test_counts_are_sums_over_distinct_tensors(model: ModelConfig) -> None:
    counts, everything = parameters(model), tensors(model)
    assert len({tensor.name for tensor in everything}) == len(everything)
    assert counts.total_with_mtp == sum(tensor.parameters for tensor in everything)
    inside = [tensor for tensor in everything if tensor.name.startswith("mtp.")]
    assert counts.mtp == sum(tensor.parameters for tensor in inside)
    outside = [tensor for tensor in everything if not tensor.name.startswith("mtp.")]
    assert counts.active_with_embeddings == sum(tensor.active for tensor in outside)
    for tensor in everything:
        routed = tensor.sharding == Sharding.expert
        assert routed == (".experts." in tensor.name)
        share = model.moe.experts_per_token / model.moe.experts if routed else 1
        assert tensor.active == pytest.approx(tensor.parameters * share)


@given(models(), st.integers(1, 500))
@settings(deadline=None, max_examples=60)
def test_linear_flops_are_two_a_used_weight(model: ModelConfig, length: int) -> None:
    """A forward pass costs two FLOPs per active matrix element, once for each use. The mixing of
    positions is added to that; only attention's grows with the length."""
    applied = {"mtp": model.mtp.depths, "decoder": 1, "output_layer": 1 + model.mtp.depths}
    weights = {tensor.name: tensor for tensor in tensors(model)}
    expected = sum(
        2 * weights[f"{linear.path}.weight"].active * applied[linear.path.split(".")[0]]
        for linear in linears(model)
    )
    assert sum(linear.flops for linear in linears(model)) == expected
    growth = forward_flops(model, length + 1) - forward_flops(model, length)
    attention = model.pattern.count("*") + model.mtp.depths * model.mtp.pattern.count("*")
    assert growth == attention * 2 * model.attention.heads * model.attention.head_dim
    assert forward_flops(model, length) > expected or set(model.pattern) == {"E"}


def mixing_flops(layer: LayerShape, length: int) -> int:
    return layer.forward_flops(length) - sum(linear.flops for linear in layer.linears)


def test_causal_attention_counted_pair_by_pair() -> None:
    """Two products over every visible pair. The closed form leaves out half the diagonal."""
    model = replace(recipe("tiny"), pattern="*", mtp=MtpConfig())
    (layer,) = layers(model)
    length = 512
    pairs = sum(1 for query in range(length) for key in range(length) if key <= query)
    per_pair = 2 * 2 * model.attention.heads * model.attention.head_dim
    assert mixing_flops(layer, length) == pytest.approx(pairs * per_pair / length, rel=2 / length)


def test_ssd_counted_chunk_by_chunk() -> None:
    """The chunked algorithm's products, counted over one sequence. Half the diagonal is left out
    too."""
    model = replace(recipe("proxy_10m"), pattern="M", mtp=MtpConfig())
    (layer,) = layers(model)
    mamba, length = model.mamba, 1024
    inner, chunk, state = mamba.heads * mamba.head_dim, mamba.chunk_size, mamba.state_size
    count = 2 * length * mamba.conv_kernel_size * (inner + 2 * mamba.groups * state)
    for _ in range(length // chunk):
        visible = sum(1 for read in range(chunk) for write in range(chunk) if write <= read)
        count += 2 * visible * mamba.groups * state  # C B^T
        count += 2 * visible * inner  # (L o C B^T) x
        count += 2 * chunk * inner * state  # the chunk's own state
        count += 2 * chunk * inner * state  # the incoming state, read at every token
        count += 2 * inner * state  # the state carried to the next chunk
    assert mixing_flops(layer, length) == pytest.approx(count / length, rel=1 / chunk)


def test_mtp_is_held_once_and_applied_per_depth() -> None:
    model = recipe("tiny")
    once, thrice = (replace(model, mtp=replace(model.mtp, depths=n)) for n in (1, 3))
    assert parameters(once) == parameters(thrice)
    none = forward_flops(replace(model, mtp=MtpConfig()), 256)
    assert forward_flops(thrice, 256) - none == 3 * (forward_flops(once, 256) - none)


# Patterns -----------------------------------------------------------------------------------


def test_stages() -> None:
    stages = parse_pattern("ME|*E")
    assert stages == [[LayerKind.mamba, LayerKind.moe], [LayerKind.attention, LayerKind.moe]]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("MEX*", "'X' at position 3"),
        ("m", "'m' at position 1"),
        ("M|-", "'-' at position 3"),
        ("M*E/*E", "model.mtp"),
        ("", "no layer"),
        ("|M", "position 1 is empty"),
        ("M||E", "position 3 is empty"),
        ("M|", "the last pipeline stage is empty"),
    ],
)
def test_bad_pattern(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pattern(pattern)
    message = str(caught.value)
    assert message.startswith("model.pattern=") and said in message and "\n" not in message


def test_no_stages_inside_mtp() -> None:
    model = recipe("tiny")
    with pytest.raises(ConfigError, match=r"^model\.mtp\.pattern=\*\|E: '\|' at position 2"):
        layers(replace(model, mtp=replace(model.mtp, pattern="*|E")))
