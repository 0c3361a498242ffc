"""The precision plan against independent readings of the published recipes.

Not covered: that a built model computes in these formats (tests/precision), Transformer Engine,
Blackwell GPUs.
"""

import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config, recipes_folder, to_typed
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import AtLeast, Config, GemmFormat, PrecisionPhase
from nemotron_train.plan.architecture.layers import linears
from nemotron_train.plan.derive import derive
from nemotron_train.plan.precision.blocking import shard
from nemotron_train.plan.precision.resolve import LinearFormats, resolve_plan, share_of_flops
from nemotron_train.plan.precision.text import padding_lines, plan_text

MODELS = ("tiny", "nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b")
EXEMPTIONS = ("last_layers", "mtp", "latent", "qkv", "attention_out", "mamba_out")
PLANS = sorted(path.stem for path in (recipes_folder() / "precision").glob("*.yaml"))
RANKS = {"tiny": 1, "nano_30b_a3b": 8, "super_120b_a12b": 64, "ultra_550b_a55b": 384}
LAST_LAYERS = {"tiny": 2, "nano_30b_a3b": 8, "super_120b_a12b": 14, "ultra_550b_a55b": 16}
ORDER = ("nvfp4", "mxfp8", "bf16", "float32")


composed = lru_cache(maxsize=None)(lambda *overrides: compose_config(overrides))


def config_of(*overrides: str, ranks: int = 0) -> Config:
    """The composed configuration, checked if `ranks` is given. Tests must not change it."""
    config = composed(*overrides)
    if ranks:
        derive(config, ranks)
    return config


def published_format(path: str, num_layers: int, last: int, without: str = "") -> str:
    """Super's table (arXiv 2604.12374, Table 3) for one module, without one of its exemptions."""
    words = path.split(".")
    if words[-1] == "router":
        return "float32"
    if path == "output_layer":
        return "bf16"
    if without != "last_layers" and words[0] == "decoder" and int(words[2]) >= num_layers - last:
        return "bf16"
    if without != "mtp" and words[0] == "mtp":
        return "bf16"
    exempt = {
        "fc1_latent_proj": ("latent", "bf16"),
        "fc2_latent_proj": ("latent", "bf16"),
        "linear_qkv": ("qkv", "bf16"),
        "linear_proj": ("attention_out", "bf16"),
        "out_proj": ("mamba_out", "mxfp8"),
    }
    name, found = exempt.get(words[-1], ("", "nvfp4"))
    return "nvfp4" if name == without else found


# Ready plans --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("without", ["", *EXEMPTIONS])
def test_nemotron3_plan_is_the_published_table(model: str, without: str) -> None:
    plan = f"nvfp4_without_{without}" if without else "nvfp4_nemotron3"
    config = config_of(f"run={model}", f"precision={plan}")
    num_layers = len(config.model.pattern.replace("|", ""))
    for entry in resolve_plan(config).at(0).linears:
        wanted = published_format(entry.path, num_layers, LAST_LAYERS[model], without)
        in_nvfp4 = wanted == "nvfp4"
        options = (in_nvfp4, in_nvfp4, in_nvfp4)
        assert entry.formats == LinearFormats(wanted, wanted, wanted, *options), entry.path


@pytest.mark.parametrize("plan", ["mxfp8", "nvfp4_all"])
@pytest.mark.parametrize("model", MODELS)
def test_plans_without_exemptions(plan: str, model: str) -> None:
    for path, formats in (
        resolve_plan(config_of(f"run={model}", f"precision={plan}")).at(0).formats.items()
    ):
        special = {"output_layer": "bf16", "router": "float32"}
        wanted = special.get(path.split(".")[-1], plan.removesuffix("_all"))
        assert (formats.fprop, formats.dgrad, formats.wgrad) == (wanted,) * 3


@pytest.mark.parametrize(
    ("model", "counts"),
    [("super_120b_a12b", {"M": 6, "*": 1, "E": 7}), ("ultra_550b_a55b", {"M": 7, "*": 1, "E": 8})],
)
def test_last_layers_are_the_published_ones(model: str, counts: dict[str, int]) -> None:
    """14 of 88 and 16 of 108 (Megatron-Bridge's recipe; arXiv 2606.15007, section 2.2)."""
    config = config_of(f"run={model}", "precision=nvfp4_nemotron3")
    letters = config.model.pattern.replace("|", "")
    chosen = [
        entry.path
        for entry in resolve_plan(config).at(0).linears
        if entry.rule.startswith("last_layers")
    ]
    numbers = {int(path.split(".")[2]) for path in chosen}
    assert Counter(letters[number] for number in numbers) == counts
    assert max(numbers) == len(letters) - 1


def test_share_of_flops_of_super() -> None:
    """From Table 1 of arXiv 2604.12374 only: multiply-adds of every linear, MTP counted twice."""
    hidden, latent, expert, shared = 4096, 1024, 2688, 5376
    in_proj = hidden * (2 * 8192 + 2 * 8 * 128 + 128)
    out_proj = 8192 * hidden
    attention = hidden * (32 + 2 * 2) * 128 + 32 * 128 * hidden
    experts = 2 * 22 * latent * expert + 2 * hidden * shared
    latents = 2 * hidden * latent
    router = hidden * 512
    mtp = 2 * (2 * hidden * hidden + attention + experts + latents)
    output = 3 * hidden * 131072
    nvfp4 = (40 - 6) * in_proj + (40 - 7) * experts
    mxfp8 = (40 - 6) * out_proj
    bf16 = 6 * (in_proj + out_proj) + 7 * experts + 8 * attention + 40 * latents + mtp + output
    together = {"nvfp4": nvfp4, "mxfp8": mxfp8, "bf16": bf16, "float32": 42 * router}
    config = config_of("run=super_120b_a12b", "precision=nvfp4_nemotron3")
    shares = share_of_flops(resolve_plan(config).at(0).linears)
    assert shares == pytest.approx({k: v / sum(together.values()) for k, v in together.items()})
    assert list(shares) == sorted(shares, key=lambda name: -shares[name])


def test_the_table_of_shares_in_the_guide_is_this_one() -> None:
    """docs/precision.md, in the last phase of each plan."""
    guide = (Path(__file__).parents[3] / "docs" / "precision.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\S+ / \S+ / .*) \|$", guide, re.MULTILINE)
    assert {plan for plan, _ in rows} == set(PLANS) - {"fp32"}
    for plan, cells in rows:
        for model, cell in zip(MODELS, cells.split(" | "), strict=True):
            config = config_of(f"run={model}", f"precision={plan}")
            shares = share_of_flops(resolve_plan(config).at(config.train.total_tokens - 1).linears)
            wanted = [f"{shares.get(name, 0):.1%}"[:-1] for name in ORDER[:3]]
            assert cell == " / ".join(wanted), (plan, model)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("model", "ranks"), RANKS.items())
def test_every_plan_is_accepted_and_printed_whole(plan: str, model: str, ranks: int) -> None:
    """With the layouts of the sizes. The text has a line for each linear in each phase."""
    config = config_of(f"run={model}", f"precision={plan}", ranks=ranks)
    assert config.precision.name == plan
    rows = [line.split() for line in plan_text(resolve_plan(config)).splitlines()]
    for tokens in resolve_plan(config).boundaries:
        for entry in resolve_plan(config).at(tokens).linears:
            formats = [entry.formats.fprop, entry.formats.dgrad, entry.formats.wgrad]
            assert [entry.path, *formats, *entry.rule.split()] in rows
    assert sum(row[:1] == ["output_layer"] for row in rows) == len(resolve_plan(config).boundaries)


def test_written_configuration_replays_to_the_same_plan() -> None:
    config = config_of("precision=nvfp4_bf16_forward", "precision.rules.qkv.dgrad=nvfp4")
    again = to_typed(Config, asdict(config), [])
    assert again.precision == config.precision
    assert plan_text(resolve_plan(again)) == plan_text(resolve_plan(config))


# Rules --------------------------------------------------------------------------------------


def rule(*fields: str, plan: str = "bf16") -> Config:
    """A plan with one more rule, checked."""
    return config_of(f"precision={plan}", f"+precision.rules.new={{{', '.join(fields)}}}", ranks=1)


def in_layers(*numbers: int) -> Callable[[str], bool]:
    return lambda path: path.startswith(tuple(f"decoder.layers.{n}." for n in numbers))


def chosen_by_new(config: Config) -> list[str]:
    return [
        entry.path for entry in resolve_plan(config).at(0).linears if entry.rule.split()[0] == "new"
    ]


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        ("match: '*.in_proj'", lambda path: path.endswith(".in_proj")),
        ("match: '*.fc[12]_latent_proj'", lambda path: "latent" in path),
        ("match: 'decoder.layers.4.*'", lambda path: path.startswith("decoder.layers.4.")),
        ("layer_type: mamba", lambda path: ".mixer." in path),
        ("layer_type: attention", lambda path: "self_attention" in path),
        ("layer_type: moe", lambda path: ".mlp." in path),
        ("layer_type: mtp_projection", lambda path: path.endswith("eh_proj")),
        ("mtp: true", lambda path: path.startswith("mtp.")),
        ("experts: true", lambda path: ".mlp.experts." in path),
        ("experts: true, mtp: true", lambda path: path.startswith("mtp.") and ".experts." in path),
        ("first_layers: 2", in_layers(0, 1)),
        ("last_layers: 1", in_layers(6)),
        ("last_fraction: 0.3", in_layers(5, 6)),
        ("last_fraction: 1.0, layer_type: attention", in_layers(3)),
        ("first_layers: 5, last_layers: 4", in_layers(3, 4)),
    ],
)
def test_conditions(condition: str, wanted: Callable[[str], bool]) -> None:
    """On tiny: MEM*EME and an MTP block. No rule applies to routers and the output layer."""
    config = rule(condition, "format: mxfp8")
    paths = [linear.path for linear in linears(config.model)]
    free = [path for path in paths if not path.endswith(("router", "output_layer"))]
    assert chosen_by_new(config) == [path for path in free if wanted(path)]


def test_formats_of_single_products() -> None:
    """A BF16 forward with a four-bit backward, without the Hadamard transform."""
    config = rule("match: '*.in_proj'", "format: nvfp4", "fprop: bf16", "hadamard: false")
    formats = resolve_plan(config).at(0).formats["decoder.layers.0.mixer.in_proj"]
    assert formats == LinearFormats(
        GemmFormat.bf16, GemmFormat.nvfp4, GemmFormat.nvfp4, True, False, True
    )
    assert "new (*.in_proj); without hadamard" in plan_text(resolve_plan(config))
    shares = [
        share_of_flops(resolve_plan(config).at(0).linears, (role,)) for role in ("fprop", "dgrad")
    ]
    assert "nvfp4" not in shares[0] and shares[1]["nvfp4"] > 0.1


def test_first_match_wins_and_a_redundant_rule_is_no_error() -> None:
    """The attention layer of ME*E is in the last pair, so the rule for qkv changes nothing."""
    config = config_of("precision=nvfp4_nemotron3", "model.pattern=ME*E", ranks=1)
    path = "decoder.layers.2.self_attention.linear_qkv"
    assert {e.path: e.rule for e in resolve_plan(config).at(0).linears}[
        path
    ] == "last_layers (last 2 of 4 layers)"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("precision.rules.qkv.match=*.linear_qvk", "rules.qkv (*.linear_qvk) matches no linear"),
        ("model=nano_30b_a3b precision.rules.latent.optional=false", "rules.latent"),
        ("precision.rules.qkv.match=output_layer", "output layer is never quantized"),
        ("precision.rules.qkv.format=fp4", "expected one of [nvfp4, mxfp8, bf16, float32]"),
        ("precision.rules.qkv.format=float32", "precision.parameter_dtype=bfloat16"),
        ("precision.rules.qvk.enabled=false", "no such knob"),
        ("+precision.rules.a={match:'*.linear_qkv',format:mxfp8}", "rules.qkv: bf16, not mxfp8"),
        ("+precision.rules.a={format:bf16}", "precision.default has no effect"),
        ("precision.rules.last_layers.last_fraction=1.0", "rules.mamba_out has no effect"),
        ("precision.rules.last_layers.last_fraction=1.5", "last_fraction=1.5"),
        ("precision.rules.last_layers.last_fraction=-0.1", "last_fraction=-0.1"),
        ("precision.rules.last_layers.last_fraction=nan", "last_fraction=nan"),
        ("precision.rules.last_layers.last_layers=3", "exclude each other"),
        ("precision.rules.qkv.first_layers=8", "first_layers=8: the decoder has 7 layers"),
        ("precision.rules.qkv.hadamard=false", "hadamard=false has no effect"),
        ("precision.default.fprop=bf16 precision.default.dgrad=bf16 precision.default.wgrad=bf16",
         "default.format=nvfp4 has no effect"),
    ],
)  # fmt: skip
def test_rules_that_do_not_do_what_they_say(
    overrides: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 with one line."""
    assert main(["plan", "precision=nvfp4_nemotron3", *overrides.split()]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


# Phases -------------------------------------------------------------------------------------


def phases(*written: str, plan: str = "nvfp4_nemotron3") -> Config:
    """On tiny: 512,000 tokens, of which the last 102,400 are the decay."""
    return config_of(f"precision={plan}", f"precision.phases=[{', '.join(written)}]", ranks=1)


def test_forward_to_bf16_with_the_decay() -> None:
    config = config_of("precision=nvfp4_bf16_forward", ranks=1)
    start = config.train.total_tokens - config.optim.decay_tokens
    assert resolve_plan(config).boundaries == [0, start]
    before, after = (
        resolve_plan(config).at(start - 1).formats,
        resolve_plan(config).at(start).formats,
    )
    assert before == resolve_plan(config).at(0).formats
    for path, formats in after.items():
        old = before[path]
        assert formats.fprop == ("float32" if "router" in path else "bf16")
        assert (formats.dgrad, formats.wgrad) == (old.dgrad, old.wgrad)


def test_nvfp4_to_mxfp8_leaves_the_rest_alone() -> None:
    """Super's switch at 19 T of 25 T tokens."""
    config = config_of("run=super_120b_a12b", "precision=nvfp4_then_mxfp8", ranks=64)
    assert resolve_plan(config).boundaries == [0, 19_000_000_000_000]
    before, after = (
        resolve_plan(config).at(tokens).formats for tokens in resolve_plan(config).boundaries
    )
    for path, formats in after.items():
        assert formats.wgrad == {"nvfp4": "mxfp8"}.get(before[path].wgrad, before[path].wgrad)
        assert not (formats.weight_2d or formats.hadamard or formats.stochastic_rounding)


def test_bf16_first_and_a_phase_replaces_the_one_before() -> None:
    config = phases(
        "{at_least: {format: bf16}}",
        "{from_fraction: 0.1, at_least: {fprop: mxfp8}}",
        "{from_tokens: 200000}",
    )
    assert resolve_plan(config).boundaries == [0, 26_214, 200_000]
    seen = [
        resolve_plan(config).at(t).formats["decoder.layers.0.mixer.in_proj"]
        for t in (0, 60_000, 250_000)
    ]
    assert [(f.fprop, f.dgrad) for f in seen] == [
        ("bf16", "bf16"),
        ("mxfp8", "nvfp4"),
        ("nvfp4", "nvfp4"),
    ]


@given(
    bounds=st.tuples(*[st.sampled_from(list(GemmFormat)[:3])] * 3).filter(
        lambda bounds: set(bounds) != {GemmFormat.nvfp4}
    ),
    start=st.integers(1, 262_143),
    tokens=st.integers(0, 262_144),
)
@settings(max_examples=50, deadline=None)
def test_a_phase_raises_and_never_lowers(bounds: tuple, start: int, tokens: int) -> None:
    """Every product gets the higher precision of rule and phase, and only after the phase
    starts."""
    roles = dict(zip(("fprop", "dgrad", "wgrad"), bounds, strict=True))
    config = deepcopy(composed("precision=nvfp4_all"))
    phase = PrecisionPhase(from_tokens=start, at_least=AtLeast(**roles))
    config.precision.phases = [phase]
    derive(config, 1)
    without = resolve_plan(config_of("precision=nvfp4_all")).at(0).formats
    for path, formats in resolve_plan(config).at(tokens).formats.items():
        for role, bound in roles.items():
            old = ORDER.index(getattr(without[path], role))
            wanted = max(old, ORDER.index(bound)) if tokens >= start else old
            assert getattr(formats, role) == ORDER[wanted]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{from_tokens: 262144, at_least: {fprop: bf16}}", "train.total_tokens=262144"),
        ("{from_tokens: -1, at_least: {fprop: bf16}}", "from_tokens=-1"),
        ("{from_fraction: 1.0, at_least: {fprop: bf16}}", "from_fraction=1.0"),
        ("{from_tokens: 5, with_decay: true, at_least: {fprop: bf16}}", "start twice"),
        ("{from_tokens: 5, at_least: {fprop: bf16}}, {from_tokens: 5}", "phases[1] starts at 5"),
        ("{from_tokens: 5, at_least: {fprop: bf16}}, {at_least: {dgrad: bf16}}", "phases[1]"),
        ("{from_tokens: 5}", "phases[0].at_least: changes nothing"),
        ("{from_tokens: 5, at_least: {fprop: float32}}", "parameter_dtype=bfloat16"),
        (
            "{from_tokens: 5, at_least: {format: bf16, fprop: mxfp8, dgrad: mxfp8, wgrad: mxfp8}}",
            "at_least.format=bf16 has no effect",
        ),
    ],
)
def test_phases_that_are_wrong(written: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        phases(written)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_no_decay_to_start_with() -> None:
    with pytest.raises(ConfigError, match=r"optim\.decay_tokens=0"):
        config_of("precision=nvfp4_bf16_forward", "optim.decay_tokens=0", ranks=1)


# Blocks and ranks ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_shards_make_up_the_whole(model: str) -> None:
    """Also with expert tensor parallelism. The sharded dimension is checked by name only: inputs
    where a product ends a block, outputs where it begins one."""
    config = config_of(f"model={model}", "parallel.tensor=2", "parallel.expert_tensor=2")
    for linear in linears(config.model):
        part = shard(linear, config.parallel)
        cut = 2 if part.in_cut_by or part.out_cut_by else 1
        assert part.in_size * part.out_size * cut == linear.in_size * linear.out_size
        whole = linear.path.endswith(("router", "_latent_proj"))
        ends = linear.path.endswith(("out_proj", "linear_proj", "linear_fc2"))
        assert bool(part.in_cut_by) == (ends and not whole)
        assert bool(part.out_cut_by) == (not ends and not whole)


HEADS_12 = ["model.mamba.heads=12", "model.mamba.head_dim=32"]  # no whole blocks


def test_uncut_sums_are_padded_and_said() -> None:
    """in_proj has 2 x 384 + 2 x 2 x 32 + 12 = 908 rows; 7 x 9 = 63 tokens."""
    overrides = [
        *HEADS_12,
        "train.sequence_length=9",
        "train.micro_batch_sequences=7",
        "train.global_batch_tokens=63",
        "train.validation_tokens=63",
    ]
    config = config_of("precision=nvfp4_all", *overrides, ranks=1)
    lines = padding_lines(resolve_plan(config).at(0))
    assert "decoder.layers.0.mixer.in_proj: dgrad in nvfp4 sums over 908, padded to 912" in lines
    assert "decoder.layers.0.mixer.in_proj: wgrad in nvfp4 sums over 63, padded to 64" in lines
    assert lines[-1].startswith("routed experts") and "a multiple of 32" in lines[-1]
    mxfp8 = config_of("precision=mxfp8", *overrides, ranks=1)
    lines = padding_lines(resolve_plan(mxfp8).at(0))
    assert "decoder.layers.0.mixer.in_proj: dgrad in mxfp8 sums over 908, padded to 928" in lines
    plain = config_of("precision=bf16", *overrides, ranks=1)
    assert padding_lines(resolve_plan(plain).at(0)) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("precision=nvfp4_all", "decoder.layers.0.mixer.in_proj: dgrad in nvfp4 needs blocks of "
         "16, but parallel.tensor=2 leaves a rank 454 of 908"),
        ("precision=nvfp4_all precision.default.dgrad=bf16",
         "in_proj: its weight in nvfp4 (weight_2d=true) needs blocks of 16"),
        ("precision=mxfp8 model.mamba.heads=64 model.moe.expert_hidden_size=96 "
         "parallel.expert_tensor=2", "linear_fc1: dgrad in mxfp8 needs blocks of 32, but "
         "parallel.expert_tensor=2 leaves a rank 48 of 96"),
    ],
)  # fmt: skip
def test_ranks_do_not_cut_through_blocks(overrides: str, words: str) -> None:
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    with pytest.raises(ConfigError) as error:
        config_of(*HEADS_12, *overrides.split(), *layout, ranks=2)
    assert words in str(error.value)


def test_pieces_of_a_sequence_do_not_cut_through_blocks() -> None:
    """A micro-batch of 3 rows of 16 tokens has 48 tokens. Half of it is one and a half blocks."""
    rows = ["train.sequence_length=16", "train.micro_batch_sequences=3"]
    rows += ["train.global_batch_tokens=1536", "train.validation_tokens=1536"]
    config_of("precision=nvfp4_all", *rows, ranks=1)
    config_of("precision=nvfp4_all", "precision.default.wgrad=bf16", *rows, ranks=1)
    with pytest.raises(ConfigError) as error:
        config_of("precision=nvfp4_all", *rows, "parallel.context=2", ranks=2)
    assert (
        "wgrad in nvfp4 needs blocks of 16, but parallel.context=2 leaves a rank 24 of 48"
        in str(error.value)
    )


def test_a_forward_only_format_does_not_mind_cut_outputs() -> None:
    """Only fprop in NVFP4, weights in 1x16 blocks: no product sums over in_proj's 454 rows per
    rank."""
    forward_only = ["dgrad=bf16", "wgrad=bf16", "weight_2d=false"]
    config_of(
        "precision=nvfp4_all",
        *(f"precision.default.{knob}" for knob in forward_only),
        "parallel.tensor=2",
        "parallel.sequence=true",
        ranks=2,
    )
