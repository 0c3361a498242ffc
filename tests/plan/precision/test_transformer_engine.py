"""The plan in Megatron's terms, read by Megatron's own matcher, against a second reading of the
recipe files. The second reading shares no code with our schema, our rules or our list of linears.

Not covered: Transformer Engine, which is not installed here, and therefore any GPU. The contexts in
which Megatron quantizes are written down a second time below, from its source; test_native.py runs
Megatron's own contexts and wrappers.
"""

from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import pytest
import yaml

from nemotron_train.compose.compose import compose_config, recipes_folder
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import linears
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.plan.precision.transformer_engine import to_transformer_engine
from nemotron_train.platform import device

device.prepare()
from megatron.core.quantization.quant_config import MatchContext, RecipeConfig  # noqa: E402

RUNS = ("tiny", "nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b")
# Layers in BF16 at the end: the published 14 and 16 (arXiv 2604.12374, Table 3; arXiv 2606.15007,
# section 2.2), 8 of 52 of arXiv 2509.25149, and one pair of tiny's seven layers.
LAST_LAYERS = {"tiny": 2, "nano_30b_a3b": 8, "super_120b_a12b": 14, "ultra_550b_a55b": 16}
PLANS = sorted(path.stem for path in (recipes_folder() / "precision").glob("*.yaml"))
NOT_NATIVE = {"fp32", "nvfp4_bf16_forward", "nvfp4_then_mxfp8"}

# Megatron-Bridge's per-module file for Super: globs in order (te_quant.cfg).
PUBLISHED = {
    "*.linear_qkv": "bf16",
    "*.linear_proj": "bf16",
    "*mlp.fc[12]_latent_proj": "bf16",
    "mtp.*": "bf16",
    "*mixer.out_proj": "mxfp8",
}


def local_path(path: str, config: Config) -> str:
    """The module name within its pipeline stage: layer numbers start at 0 in every stage."""
    words = path.split(".")
    if words[0] == "decoder":
        number = int(words[2])
        for stage in config.model.pattern.split("|"):
            if number < len(stage):
                words[2] = str(number)
                break
            number -= len(stage)
    return ".".join(words)


def read_by_megatron(path: str, config: Config, native: dict) -> str:
    """The format of a linear: its context's format, unless Megatron matches a recipe that replaces
    it.

    Layers in the middle of the decoder and of the MTP block are in a quantized context. The MTP
    projection is in one only if the format is FP8.
    """
    fields, words = native["transformer_config"], path.split(".")
    context = {"fp4": "nvfp4", "fp8": "mxfp8"}.get(next(iter(fields), ""), "bf16")
    if words[-1] == "eh_proj":
        context = context if context == "mxfp8" else "bf16"
    else:
        number = int(words[words.index("layers", 3 if words[0] == "mtp" else 0) + 1])
        first = fields.get("num_layers_at_start_in_bf16", 0)
        last = fields.get("num_layers_at_end_in_bf16", 0)
        if not first <= number < len(config.model.pattern.replace("|", "")) - last:
            context = "bf16"
    recipe = RecipeConfig.from_config_dict(native)
    matched = recipe.match(MatchContext(local_path(path, config), layer_number=None))
    if matched is None:
        return context
    training = matched.config["training_recipe"]
    if context == "bf16" and not training.get("override_nonquantized_autocast", False):
        return "bf16"
    return training.get("fp4_quantization_recipe", training.get("fp8_quantization_recipe", "bf16"))


# A second reading ---------------------------------------------------------------------------


def yaml_of(group: str, name: str) -> dict[str, Any]:
    """A recipe file merged over its base, as Hydra would compose the two."""
    own = yaml.safe_load((recipes_folder() / group / f"{name}.yaml").read_text())
    bases = own.pop("defaults", [])
    if not bases:
        return own
    base = yaml_of(group, bases[0])
    rules = base.get("rules", {})
    for rule, changes in own.pop("rules", {}).items():
        rules[rule] = rules.get(rule, {}) | changes
    return base | own | {"rules": rules}


def module_paths(model: dict[str, Any]) -> list[tuple[str, int]]:
    """(path, decoder layer or -1) of every linear, from the letters of the pattern."""

    def inside(letter: str) -> list[str]:
        if letter == "M":
            return ["mixer.in_proj", "mixer.out_proj"]
        if letter == "*":
            return ["self_attention.linear_qkv", "self_attention.linear_proj"]
        latent = ["mlp.fc1_latent_proj", "mlp.fc2_latent_proj"]
        latent = latent if model["moe"]["latent_size"] else []
        pairs = [f"mlp.{e}.linear_fc{n}" for e in ("experts", "shared_experts") for n in (1, 2)]
        return ["mlp.router", *latent, *pairs]

    found = [
        (f"decoder.layers.{number}.{name}", number)
        for number, letter in enumerate(model["pattern"])
        for name in inside(letter)
    ]
    if model["mtp"]["depths"]:
        found.append(("mtp.layers.0.eh_proj", -1))
        block = "mtp.layers.0.mtp_model_layer.layers"
        found += [
            (f"{block}.{number}.{name}", -1)
            for number, letter in enumerate(model["mtp"]["pattern"])
            for name in inside(letter)
        ]
    return [*found, ("output_layer", -1)]


@cache
def second_reading(plan: str, run: str) -> dict[str, str]:
    """Path -> format of every linear, before any phase."""
    recipe, model = yaml_of("precision", plan), yaml_of("model", run)
    first_of_last = len(model["pattern"]) - LAST_LAYERS[run]
    found = {}
    for path, layer in module_paths(model):
        chosen = recipe["default"]["format"]
        if path == "output_layer":
            chosen = {"bfloat16": "bf16", "float32": "float32"}[recipe["parameter_dtype"]]
        elif path.endswith("router"):
            chosen = "float32"
        else:
            for rule in recipe.get("rules", {}).values():
                known = {"match", "mtp", "last_fraction", "format", "optional", "enabled"}
                assert set(rule) <= known, "this reader knows no such condition"
                meets = [rule.get("enabled", True), fnmatchcase(path, rule.get("match", "*"))]
                meets.append("mtp" not in rule or path.startswith("mtp."))
                meets.append("last_fraction" not in rule or layer >= first_of_last)
                if all(meets):
                    chosen = rule["format"]
                    break
        found[path] = chosen
    return found


@cache
def native_config(plan: str, run: str) -> Config:
    """The composed configuration. Tests must not change it."""
    return compose_config([f"run={run}", f"precision={plan}"])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("run", RUNS)
def test_the_plan_is_the_second_reading(plan: str, run: str) -> None:
    """All three products, and with phases the formats under the last phase's bound."""
    config = native_config(plan, run)
    wanted = second_reading(plan, run)
    assert sorted(wanted) == sorted(linear.path for linear in linears(config.model))
    last = resolve_plan(config).at(config.train.total_tokens - 1).formats
    for path, formats in resolve_plan(config).at(0).formats.items():
        assert {formats.fprop, formats.dgrad, formats.wgrad} == {wanted[path]}, path
        low = wanted[path] == "nvfp4"
        fprop = "bf16" if plan == "nvfp4_bf16_forward" and wanted[path] != "float32" else None
        other = "mxfp8" if plan == "nvfp4_then_mxfp8" and low else None
        assert last[path].fprop == (fprop or other or wanted[path]), path
        assert last[path].wgrad == (other or wanted[path]), path


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan not in NOT_NATIVE])
@pytest.mark.parametrize("run", RUNS)
def test_megatron_reads_the_plan(plan: str, run: str) -> None:
    config = native_config(plan, run)
    native = to_transformer_engine(config, resolve_plan(config))
    wanted = second_reading(plan, run)
    for path in wanted:
        if not path.endswith(("router", "output_layer")):
            assert read_by_megatron(path, config, native) == wanted[path], path
    experts = {form for path, form in wanted.items() if ".experts." in path}
    padded = native["transformer_config"].get("moe_router_padding_for_quantization", False)
    assert padded == (experts != {"bf16"})


def test_super_is_the_published_table() -> None:
    """arXiv 2604.12374, Table 3: NVFP4 except for the last 14 layers, latent projections, MTP and
    attention in BF16, and the Mamba output projection in MXFP8."""
    config = native_config("nvfp4_nemotron3", "super_120b_a12b")
    native = to_transformer_engine(config, resolve_plan(config))
    for linear in linears(config.model):
        words = linear.path.split(".")
        if words[-1] in ("router", "output_layer"):
            continue
        wanted = {"out_proj": "mxfp8", "linear_qkv": "bf16", "linear_proj": "bf16"}
        wanted |= {"fc1_latent_proj": "bf16", "fc2_latent_proj": "bf16"}
        published = wanted.get(words[-1], "nvfp4")
        if words[0] == "mtp" or int(words[2]) >= 74:
            published = "bf16"
        assert read_by_megatron(linear.path, config, native) == published, linear.path


def test_what_can_be_native_as_the_documentation_says() -> None:
    """Every included run. The extensions, which start from another run, with their usual model."""
    usual = {"context_extension": "model=proxy_10m", "super_long_context": "model=super_120b_a12b"}
    for path in (recipes_folder() / "run").glob("*.yaml"):
        words = [f"run={path.stem}", "precision=nvfp4_nemotron3"]
        config = compose_config([*words, usual.get(path.stem, f"model={path.stem}")])
        to_transformer_engine(config, resolve_plan(config))


def test_padding_of_experts_is_what_the_plan_says() -> None:
    from nemotron_train.plan.precision import blocking
    from nemotron_train.precision import experts

    assert experts.ROW_MULTIPLE == blocking.EXPERT_ROWS
    assert all(experts.ROW_MULTIPLE % block == 0 for block in blocking.BLOCK.values())


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    """2 x 12 x 32 + 2 x 2 x 32 + 12 = 908 rows of the Mamba input projection."""
    shape = ["model.mamba.heads=12", "model.mamba.head_dim=32"]
    config = compose_config(["run=tiny", "precision=nvfp4_nemotron3", *shape])
    with pytest.raises(ConfigError, match=r"mixer\.in_proj in nvfp4: 908 output features"):
        to_transformer_engine(config, resolve_plan(config))


def test_super_is_the_published_file() -> None:
    """Every linear has the same format as in Megatron-Bridge's globs; the surrounding fields are
    equal too."""
    config = compose_config(["run=super_120b_a12b", "precision=nvfp4_nemotron3"])
    native = to_transformer_engine(config, resolve_plan(config))
    assert native["transformer_config"] == {
        "fp4": "e2m1",
        "fp4_recipe": "nvfp4",
        "fp4_param": False,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 14,
        "moe_router_padding_for_quantization": True,
    }
    assert native["environment"] == {}
    kind = {"transformer_engine_config_type": "TEQuantizationParams"}
    assert native["configs"] == {
        "bf16": kind | {"training_recipe": {}},
        "mxfp8": kind | {"training_recipe": {"fp8_quantization_recipe": "mxfp8"}},
    }
    recipe = RecipeConfig.from_config_dict(native)
    for linear in linears(config.model):
        chosen = recipe.match_to_config_key(MatchContext(linear.path, layer_number=None))
        published = [key for glob, key in PUBLISHED.items() if fnmatchcase(linear.path, glob)]
        assert chosen == (published[0] if published else None), linear.path


def test_options_hold_for_the_process() -> None:
    config = compose_config(
        ["run=super_120b_a12b", "precision=nvfp4_all", "precision.default.hadamard=false"]
    )
    assert to_transformer_engine(config, resolve_plan(config))["environment"] == {
        "NVTE_NVFP4_DISABLE_RHT": "1"
    }


def test_a_rule_with_several_conditions_becomes_its_modules() -> None:
    rule = "{experts: true, match: 'decoder.*', layer_type: moe, format: mxfp8}"
    config = compose_config(
        ["run=super_120b_a12b", "precision=nvfp4_all", f"+precision.rules.new={rule}"]
    )
    patterns = [
        m["pattern"]
        for m in to_transformer_engine(config, resolve_plan(config))["matchers"].values()
    ]
    names = [f"decoder.layers.*.mlp.experts.linear_fc{n}" for n in (1, 2)]
    assert patterns == ["mtp.layers.0.eh_proj", *names]


def test_a_quantized_rule_over_an_unquantized_default() -> None:
    rule = "{match: '*.in_proj', format: mxfp8}"
    config = compose_config(
        ["run=super_120b_a12b", "precision=bf16", f"+precision.rules.new={rule}"]
    )
    native = to_transformer_engine(config, resolve_plan(config))
    assert native["transformer_config"] == {}
    (recipe,) = native["configs"].values()
    assert recipe["training_recipe"] == {
        "fp8_quantization_recipe": "mxfp8",
        "override_nonquantized_autocast": True,
    }


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("precision=nvfp4_bf16_forward", "precision.phases has 1 phase(s)"),
        ("precision=fp32", "parameter_dtype=float32"),
        ("precision=nvfp4_all precision.default.fprop=bf16", "default: fprop=bf16, dgrad=nvfp4"),
        ("precision=nvfp4_nemotron3 precision.rules.qkv.format=nvfp4 "
         "precision.rules.qkv.hadamard=false", "hadamard is true for default and false for qkv"),
        ("precision=nvfp4_nemotron3 precision.rules.last_layers.format=mxfp8", "rules.last_layers"),
        ("precision=nvfp4_nemotron3 precision.rules.last_layers.layer_type=moe", "last_layers"),
        ("precision=bf16 +precision.rules.new={experts:true,format:mxfp8}", "routed experts"),
        ("precision=nvfp4_all +precision.rules.new={match:'decoder.layers.80.*',format:bf16} "
         "model.pattern=${stages} parallel.pipeline=2",
         "decoder.layers.80.mixer.in_proj: new (decoder.layers.80.*) asks for bf16"),
        ("precision=nvfp4_all +precision.rules.new={match:'*.out_proj',format:mxfp8} "
         "+precision.rules.end={last_layers:4,format:bf16}", "new (*.out_proj) asks for mxfp8"),
        ("precision=nvfp4_all model.mamba.heads=136 model.mamba.groups=8",
         "19592 output features on a rank"),
        ("precision=nvfp4_all train.sequence_length=1000", "1000 tokens on a rank"),
        ("precision=nvfp4_all train.sequence_length=8160",
         "routed experts: 8160 tokens of a micro-batch on a rank are no multiple of 128"),
    ],
)  # fmt: skip
def test_what_megatron_cannot_say(overrides: str, words: str) -> None:
    whole = compose_config(["model=super_120b_a12b"]).model.pattern
    stages = f"'{whole[:44]}|{whole[44:]}'"
    words_given = overrides.replace("${stages}", stages).split()
    config = compose_config(
        ["run=super_120b_a12b", "parallel.tensor=1", "parallel.sequence=false", *words_given]
    )
    with pytest.raises(ConfigError) as error:
        to_transformer_engine(config, resolve_plan(config))
    assert words in str(error.value)


def test_a_layer_number_is_fine_without_pipeline_stages() -> None:
    rule = "{match: 'decoder.layers.80.*', format: bf16}"
    config = compose_config(
        ["run=super_120b_a12b", "precision=nvfp4_all", f"+precision.rules.new={rule}"]
    )
    patterns = [
        m["pattern"]
        for m in to_transformer_engine(config, resolve_plan(config))["matchers"].values()
    ]
    assert "decoder.layers.80.*" in patterns
