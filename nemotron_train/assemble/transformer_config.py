"""Translation of our configuration to Megatron-Core's `TransformerConfig`.

Megatron's field names appear only here and in the modules that subclass Megatron's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemotron_train.config.gpu import Dispatcher
from nemotron_train.config.schema import Config
from nemotron_train.model.activation import squared_relu
from nemotron_train.plan.switches import Switches
from nemotron_train.platform.device import TORCH_DTYPES, Platform


def transformer_config(
    config: Config, platform: Platform, precision_fields: Mapping[str, Any] | None = None
) -> TransformerConfig:
    """Translate model, precision and layout into the object that every Megatron module reads.

    precision_fields: additional fields of a native plan (`precision.native.transformer_fields`).
    """
    model, parallel = config.model, config.parallel
    dtype = TORCH_DTYPES[config.precision.parameter_dtype]
    num_layers = len(model.pattern.replace("|", ""))
    mtp_depths = model.mtp.depths or None
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.attention.heads,
        num_query_groups=model.attention.key_value_heads,
        kv_channels=model.attention.head_dim,
        ffn_hidden_size=model.moe.expert_hidden_size,
        is_hybrid_model=True,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        activation_func=squared_relu,
        gated_linear_unit=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        mamba_state_dim=model.mamba.state_size,
        mamba_head_dim=model.mamba.head_dim,
        mamba_num_groups=model.mamba.groups,
        mamba_num_heads=model.mamba.heads,
        num_moe_experts=model.moe.experts if "E" in model.pattern + model.mtp.pattern else None,
        moe_ffn_hidden_size=model.moe.expert_hidden_size,
        moe_latent_size=model.moe.latent_size or None,
        moe_shared_expert_intermediate_size=model.moe.shared_expert_hidden_size or None,
        moe_router_topk=model.moe.experts_per_token,
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=False,
        moe_router_topk_scaling_factor=model.moe.router_scaling_factor,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=model.moe.router_bias_update_rate,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=(
            model.moe.load_balance_loss_coefficient if config.train.load_balance_loss else 0.0
        ),
        moe_router_dtype="fp32",
        moe_grouped_gemm=False,
        mtp_num_layers=mtp_depths,
        mtp_use_repeated_layer=True,
        mtp_loss_scaling_factor=model.mtp.loss_scale,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # We initialize the weights (assemble.initialize): the same values under every layout.
        perform_initialization=False,
        use_cpu_initialization=platform.device == "cpu",
        **_switch_fields(platform.switches),
        cuda_graph_modules=[],
        batch_p2p_comm=platform.device != "cpu" and not parallel.overlap_pipeline,
        overlap_p2p_comm=parallel.overlap_pipeline,
        **(precision_fields or {}),
    )


def _switch_fields(switches: Switches) -> dict[str, Any]:
    """The fields of the performance switches. Megatron's own linears are the only ones that read
    `gradient_accumulation_fusion` from here: `assemble.fused` sets it for Transformer Engine's,
    because the output layer is Megatron's and would ask for apex."""
    uses_alltoall = switches.dispatcher == Dispatcher.alltoall
    backend = {} if uses_alltoall else {"moe_flex_dispatcher_backend": str(switches.dispatcher)}
    return {
        "gradient_accumulation_fusion": switches.apex_gradients,
        "moe_permute_fusion": switches.permute_fusion,
        "moe_shared_expert_overlap": switches.shared_expert_overlap,
        "moe_token_dispatcher_type": "alltoall" if uses_alltoall else "flex",
        "tp_comm_overlap": switches.tensor_parallel_overlap,
        **backend,
    }
