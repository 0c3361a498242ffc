"""The fields of Hugging Face's `config.json` as tables, and the fields written for our model.

Owns: the folder's file names, the meaning of each field, the values we cannot represent. Does not
own: reading a config.json (`config`), weights (`mapping`). No torch.

UPSTREAM(transformers 5.24; pull request 48989): its mixer clamps dt to `time_step_min`, the lower
bound of the initial draw, instead of to `time_step_limit`. With the published 0.001, identical
weights give different logits there. We write the limit used in training into both fields. The lower
bound of the initial draw, which matters only before the first step, is stored under
`nemotron_train`.
"""

import math
from operator import attrgetter
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import LayerKind

CONFIG, GENERATION = "config.json", "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OURS = "nemotron_train"  # our field, for settings that Hugging Face's fields cannot express
# Above 0, because transformers takes its logarithm, but too small to change any dt.
NO_LIMIT = 1e-30

# Their field -> our knob below `model`.
SIZES = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_attention_heads": "attention.heads",
    "num_key_value_heads": "attention.key_value_heads",
    "head_dim": "attention.head_dim",
    "mamba_num_heads": "mamba.heads",
    "mamba_head_dim": "mamba.head_dim",
    "ssm_state_size": "mamba.state_size",
    "n_groups": "mamba.groups",
    "n_routed_experts": "moe.experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.expert_hidden_size",
    "moe_shared_expert_intermediate_size": "moe.shared_expert_hidden_size",
}
# Their field -> (our knob, value if the field is missing).
OPTIONAL = {
    "conv_kernel": ("mamba.conv_kernel_size", 4),
    "chunk_size": ("mamba.chunk_size", 128),
    "routed_scaling_factor": ("moe.router_scaling_factor", 1.0),
    "layer_norm_epsilon": ("norm_epsilon", 1e-5),
    "initializer_range": ("init_std", 0.02),
    "time_step_max": ("mamba.dt_max", 0.1),
    "time_step_floor": ("mamba.dt_init_floor", 1e-4),
}
# Sizes that may be missing if the model has no layers of the kind.
OF_KIND = {
    LayerKind.attention: ("num_attention_heads", "num_key_value_heads", "head_dim"),
    LayerKind.mamba: ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
    LayerKind.moe: (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
}
# Stored under OURS: knobs of the model that affect training only.
TRAINING = (
    "mamba.dt_min",
    "mamba.A_init_min",
    "mamba.A_init_max",
    "moe.router_bias_update_rate",
    "moe.load_balance_loss_coefficient",
    "mtp.depths",
    "mtp.loss_scale",
)
# Field -> the only value our model supports. Written on export; any other value is rejected.
FIXED: dict[str, Any] = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "residual_in_fp32": False,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
# Rejected unless absent, null or this value; not written.
ABSENT: dict[str, Any] = {
    "hidden_act": "relu2",
    "activation_function": "relu2",
    "rope_scaling": None,
    "position_embedding_type": "none",
    "quantization_config": None,
    "compression_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
# Fields that affect neither the function nor the weights. rope_theta and partial_rotary_factor are
# in the published files, but no implementation reads them: the attention has no positions.
WITHOUT_MEANING = {
    *("auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("max_position_embeddings", "num_logits_to_keep", "rope_theta", "partial_rotary_factor"),
    *("rope_parameters", "expand", "intermediate_size", "mamba_ssm_cache_dtype"),
    *("use_mamba_kernels", "rescale_prenorm_residual", "moe_shared_expert_overlap"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_decoder"),
    *("tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "pruned_heads"),
    *("keep_mtp_spec_in_bf16", "router_aux_loss_coef", "calculate_mtp_loss"),
}
LETTERS = {"mamba": "M", "linear_attention": "M", "moe": "E", "mlp": "-"}
LETTERS |= {"attention": "*", "full_attention": "*"}
# Fields that `config` reads individually.
READ_BY_HAND = {"hybrid_override_pattern", "layers_block_type", "layer_types", "num_hidden_layers"}
READ_BY_HAND |= {"mtp_hybrid_override_pattern", "mtp_layers_block_type", "num_nextn_predict_layers"}
READ_BY_HAND |= {"moe_latent_size", "time_step_min", "time_step_limit", "norm_eps", OURS}
READ_BY_HAND |= {"attention_head_dim"}


def config_fields(config: Config, dtype: str, end_of_document_id: int) -> dict[str, Any]:
    """The fields of config.json for a run's model. Raises ConfigError, naming the knob, for
    settings that Hugging Face's model cannot represent."""
    model = config.model
    pattern = model.pattern.replace("|", "")
    inside = model.mtp.pattern if model.mtp.depths else ""
    if "E" in pattern + inside and not model.moe.shared_expert_hidden_size:
        raise ConfigError(
            "model.moe.shared_expert_hidden_size=0: Hugging Face's mixture of experts always has a "
            "shared expert; this model cannot be exported"
        )
    limit = model.mamba.dt_limit_min, model.mamba.dt_limit_max
    if limit[1] != math.inf:
        raise ConfigError(
            f"model.mamba.dt_limit_max={limit[1]}: Hugging Face's model reads no upper limit of "
            "dt; this model cannot be exported"
        )
    fields: dict[str, Any] = dict(FIXED)
    fields |= {field: attrgetter(knob)(model) for field, knob in SIZES.items()}
    fields |= {field: attrgetter(knob)(model) for field, (knob, _) in OPTIONAL.items()}
    fields |= {
        "torch_dtype": dtype,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "norm_eps": model.norm_epsilon,
        "time_step_min": limit[0] or NO_LIMIT,
        "num_nextn_predict_layers": 1 if model.mtp.depths else 0,
        # Not used by our layers, but required or displayed by other tools.
        "expand": 2,
        "intermediate_size": model.moe.expert_hidden_size,
        "max_position_embeddings": config.train.sequence_length,
        "bos_token_id": None,
        "eos_token_id": end_of_document_id,
        "pad_token_id": end_of_document_id,
        "use_cache": True,
        OURS: {knob: attrgetter(knob)(model) for knob in TRAINING},
    }
    if limit[0]:  # JSON has no infinity: this is how transformers 5 writes it
        fields["time_step_limit"] = [limit[0], {"__float__": "Infinity"}]
    if model.moe.latent_size:
        fields["moe_latent_size"] = model.moe.latent_size
    if model.mtp.depths:
        fields["mtp_hybrid_override_pattern"] = model.mtp.pattern
    return dict(sorted(fields.items()))


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds safetensors. Raises ConfigError if it holds only pickles."""
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return True
    for name in PICKLES:
        if (folder / name).exists():
            raise ConfigError(
                f"{folder / name}: is a pickle, which may run code and is not read; convert it to "
                "safetensors, or take it away to build the recipe alone"
            )
    return False
