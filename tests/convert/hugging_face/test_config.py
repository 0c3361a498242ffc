"""`config.json` against our recipes: the three published sizes, and the configurations that are
refused, with the name of the field.

Second truths: the published parameter totals; our recipes, which were written from the reports. The
published files are not available here. Their fields are assembled from known facts, without
weights: dimensions from the reports' tables, field names and the two layer-naming schemes as vLLM
and Megatron-Bridge read them. Not covered: other fields that the published files may have.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import ModelConfig
from nemotron_train.convert.hugging_face.config import model_name, read_model, recipe_text
from nemotron_train.convert.hugging_face.fields import config_fields
from nemotron_train.convert.hugging_face.mapping import weights
from nemotron_train.plan.architecture.layers import parameters

COMMON: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "torch_dtype": "bfloat16",
    "vocab_size": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "expand": 2,
    "use_conv_bias": True,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "attention_bias": False,
    "use_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "norm_eps": 1e-05,
    "layer_norm_epsilon": 1e-05,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
    "use_mamba_kernels": True,
    "mamba_ssm_cache_dtype": "float32",
    "num_logits_to_keep": 1,
    "transformers_version": "4.57.1",
}
NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA_PATTERN = "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
ULTRA_PATTERN += "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER_PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*"
SUPER_PATTERN += "EMEMEMEME"
NAMES = {"M": "mamba", "*": "attention", "E": "moe"}
MTP = {"num_nextn_predict_layers": 1, "moe_shared_expert_overlap": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "nano_30b_a3b": {
        "hidden_size": 2688,
        "hybrid_override_pattern": NANO_PATTERN,
        "num_hidden_layers": 52,
        "num_attention_heads": 32,
        "mamba_num_heads": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
        "intermediate_size": 1856,
    },
    "super_120b_a12b": {
        "hidden_size": 4096,
        "hybrid_override_pattern": SUPER_PATTERN,
        "mtp_hybrid_override_pattern": "*E",
        "num_attention_heads": 32,
        "mamba_num_heads": 128,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "routed_scaling_factor": 5.0,
        **MTP,
    },
    "ultra_550b_a55b": {
        "hidden_size": 8192,
        "layers_block_type": [NAMES[letter] for letter in ULTRA_PATTERN],
        "mtp_layers_block_type": ["attention", "moe"],
        "num_attention_heads": 64,
        "mamba_num_heads": 256,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 5120,
        "moe_shared_expert_intermediate_size": 10240,
        "moe_latent_size": 2048,
        "routed_scaling_factor": 5,
        **MTP,
    },
}
# Not in a config.json. The published 0.02 of init_std is an unchanged default.
OTHERWISE = {"name", "init_std"}


def write(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def read(folder: Path, **changes: Any) -> ModelConfig:
    fields = COMMON | PUBLISHED["super_120b_a12b"] | changes
    return read_model(write(folder, fields), "x").model


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_published_sizes_are_our_recipes(size: str, tmp_path: Path) -> None:
    built = asdict(read_model(write(tmp_path, COMMON | PUBLISHED[size]), size).model)
    ours = asdict(compose_config([f"model={size}"]).model)
    ours["mtp"]["loss_scale"] = built["mtp"]["loss_scale"]  # affects training only
    assert {k: v for k, v in built.items() if k not in OTHERWISE} == {
        k: v for k, v in ours.items() if k not in OTHERWISE
    }


@pytest.mark.parametrize(
    ("size", "total"),
    [
        ("nano_30b_a3b", 31_577_940_288),
        ("super_120b_a12b", 123_611_033_088),
    ],
)
def test_published_totals(size: str, total: int, tmp_path: Path) -> None:
    """Totals of the model cards. The reports round Nano's to 31.6 B and Ultra's to 550 B; Ultra's
    is without multi-token prediction."""
    model = read_model(write(tmp_path, COMMON | PUBLISHED[size]), size).model
    assert parameters(model).published == total
    assert sum(weight.num_elements for weight in weights(model)) == total


def test_ultras_total(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, COMMON | PUBLISHED["ultra_550b_a55b"]), "ultra").model
    assert parameters(model).total == pytest.approx(550e9, rel=2e-3)
    assert sum(weight.num_elements for weight in weights(model)) == parameters(model).published


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_the_verb_prints_a_recipe_that_plan_takes(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without weights the verb prints the summary and the recipe, and makes no run folder."""
    folder, recipe = write(tmp_path / "Published", COMMON | PUBLISHED[size]), tmp_path / "r.yaml"
    assert main(["convert", "from-hf", str(folder), "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "published: " in printed and "no weights there" in printed
    assert not (tmp_path / "run").exists()
    assert main(["convert", "from-hf", str(folder), "--recipe", str(recipe)]) == 0
    assert recipe.read_text() in printed
    assert yaml.safe_load(recipe.read_text())["name"] == "published"
    model = compose_config([f"model={recipe}"]).model
    assert model == read_model(folder, "published").model
    assert main(["convert", "from-hf", str(folder), "--recipe", str(recipe)]) == 0  # a second time
    recipe.write_text("another")
    assert main(["convert", "from-hf", str(folder), "--recipe", str(recipe)]) == 2
    assert recipe.read_text() == "another"


def test_sizes_that_do_not_fit_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = COMMON | PUBLISHED["nano_30b_a3b"] | {"num_key_value_heads": 5}
    assert main(["convert", "from-hf", str(write(tmp_path, fields))]) == 2
    assert "model.attention.heads=32" in capsys.readouterr().err


CHANGES: list[tuple[str, Any]] = [
    ("model_type", "llama"),
    ("architectures", ["LlamaForCausalLM"]),
    ("mlp_hidden_act", "silu"),
    ("mamba_hidden_act", "gelu"),
    ("hidden_act", "silu"),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("use_bias", True),
    ("mamba_proj_bias", True),
    ("use_conv_bias", False),
    ("tie_word_embeddings", True),
    ("sliding_window", 4096),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("position_embedding_type", "rope"),
    ("attention_dropout", 0.1),
    ("hidden_dropout", 0.1),
    ("residual_in_fp32", True),
    ("n_shared_experts", 2),
    ("n_group", 8),
    ("topk_group", 4),
    ("norm_topk_prob", False),
    ("quantization_config", {"quant_method": "modelopt"}),
    ("norm_eps", 1e-6),
    ("num_hidden_layers", 87),
    ("hybrid_override_pattern", "ME-ME*"),
    ("hybrid_override_pattern", "MEXE"),
    ("hybrid_override_pattern", ""),
    ("hybrid_override_pattern", None),
    ("layers_block_type", ["mamba", "mlp"]),
    ("layers_block_type", ["mamba", "linear"]),
    ("mtp_hybrid_override_pattern", "*-"),
    ("num_nextn_predict_layers", 2),
    ("time_step_limit", [0.1, 0.01]),
    ("time_step_limit", [0.0]),
    ("time_step_min", 0),
    ("hidden_size", "4096"),
    ("hidden_size", 0),
    ("hidden_size", None),
    ("head_dim", None),
    ("num_attention_heads", True),
    ("routed_scaling_factor", -1.0),
    ("nemotron_train", {"mtp.depths": 2}),
    ("mamba_rms_norm_before_gate", True),  # in no known version
]


@pytest.mark.parametrize(("field", "value"), CHANGES)
def test_what_we_cannot_represent_is_refused_by_name(
    field: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {field}=") as error:
        read(tmp_path, **{field: value})
    assert "\n" not in str(error.value)


def test_an_unknown_field_may_be_ignored_by_name(tmp_path: Path) -> None:
    fields = COMMON | PUBLISHED["super_120b_a12b"] | {"colour": "green"}
    write(tmp_path, fields)
    with pytest.raises(ConfigError, match="--ignore colour"):
        read_model(tmp_path, "x")
    assert read_model(tmp_path, "x", frozenset({"colour"})).model.hidden_size == 4096


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, (0.0, math.inf)),
        ([0.0, math.inf], (0.0, math.inf)),
        ([0.0, {"__float__": "Infinity"}], (0.0, math.inf)),  # written by transformers 5
        ([0.0, "Infinity"], (0.0, math.inf)),
        ([0.0, 1e30], (0.0, math.inf)),  # in hand-written strict JSON
        ([0.001, 0.1], (0.001, 0.1)),
    ],
)
def test_limits_of_dt(limit: Any, expected: tuple[float, float], tmp_path: Path) -> None:
    mamba = read(tmp_path, time_step_limit=limit).mamba
    assert (mamba.dt_limit_min, mamba.dt_limit_max) == expected


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"model_type": ', "[" * 100_000, '{"model_type": "nemotron_h"}']
)
def test_files_that_are_no_configuration(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model(tmp_path, "x")


@pytest.mark.parametrize("name", ["tiny", "proxy_10m", "super_120b_a12b", "nano_30b_a3b"])
def test_our_own_file_gives_our_own_model(name: str, tmp_path: Path) -> None:
    """Includes every field that only changes training, and the limits of dt."""
    words = [f"model={name}", "model.mamba.dt_min=0.002", "model.mamba.dt_limit_min=0.0001"]
    words += ["model.moe.router_bias_update_rate=0.01", "model.mtp.loss_scale=0.2"]
    config = compose_config([*words, "model.init_std=0.0123"])
    write(tmp_path, config_fields(config, "bfloat16", 7))
    again = read_model(tmp_path, name)
    assert again.dtype == "bfloat16"
    expected, got = asdict(config.model), asdict(again.model)
    if not config.model.mtp.depths:
        assert got["mtp"]["depths"] == 0
        del expected["mtp"], got["mtp"]
    assert got == expected


@pytest.mark.parametrize(
    ("words", "knob"),
    [
        (["model.moe.shared_expert_hidden_size=0"], "shared_expert_hidden_size"),
        (["model.mamba.dt_limit_max=0.1"], "dt_limit_max"),
    ],
)
def test_models_that_hugging_face_has_no_form_for(words: list[str], knob: str) -> None:
    with pytest.raises(ConfigError, match=knob):
        config_fields(compose_config(words), "float32", 0)


def test_names_of_folders_become_names_of_models(tmp_path: Path) -> None:
    assert model_name(Path("/x/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")).startswith("nvidia-nemotron")
    assert model_name(Path("/x/ä b/..")) != ""
    model = read(tmp_path)
    assert yaml.safe_load(recipe_text(model, tmp_path))["mtp"] == {"depths": 2}
