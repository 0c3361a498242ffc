"""The spec tree: which class fills each slot of Megatron's `HybridStack`.

One switch: with Transformer Engine the parallel linears, norms and attention are its own,
otherwise Megatron's plain ones and ours; a plan with block formats takes emulated linears. The
Mamba-2 mixer and the router are ours on both sides, and so are the experts but for native plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from nemotron_train.assemble.recompute import recomputing
from nemotron_train.config.schema import Config, RecomputeMode
from nemotron_train.model.attention.block import AttentionBlock
from nemotron_train.model.attention.layer import CoreAttention, TransformerEngineAttention
from nemotron_train.model.linears import ColumnLinear, ReplicatedLinear, RowLinear
from nemotron_train.model.mamba.block import MambaBlock
from nemotron_train.model.mamba.layer import Mamba2Mixer, Mamba2MixerSubmodules
from nemotron_train.model.moe.block import MoEBlock
from nemotron_train.model.moe.experts import GroupedExperts
from nemotron_train.model.moe.layer import (
    LatentMoELayer,
    LatentMoESubmodules,
    shared_expert_submodules,
)
from nemotron_train.model.moe.native import NativeExperts
from nemotron_train.model.moe.router import SigmoidRouter
from nemotron_train.model.mtp import MtpLayer
from nemotron_train.model.norm import RMSNorm
from nemotron_train.precision.experts import EmulatedExperts
from nemotron_train.precision.linear import (
    EmulatedColumnParallelLinear,
    EmulatedReplicatedLinear,
    EmulatedRowParallelLinear,
)


@dataclass(frozen=True)
class Parts:
    """The classes that differ between a machine with Transformer Engine and one without."""

    column_parallel: type
    row_parallel: type
    replicated: type
    norm: type
    core_attention: type
    experts: type


def parts(transformer_engine: bool, emulated: bool = False, native: bool = False) -> Parts:
    """Linears that emulate a precision plan, Transformer Engine's layers (translated, not run on a
    GPU; its grouped experts too where it computes block formats), or the plain ones."""
    if emulated:
        return Parts(
            EmulatedColumnParallelLinear,
            EmulatedRowParallelLinear,
            EmulatedReplicatedLinear,
            RMSNorm,
            CoreAttention,
            EmulatedExperts,
        )
    if not transformer_engine:
        return Parts(
            ColumnLinear,
            RowLinear,
            ReplicatedLinear,
            RMSNorm,
            CoreAttention,
            GroupedExperts,
        )
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELinear,
        TENorm,
        TERowParallelLinear,
    )

    return Parts(
        TEColumnParallelLinear,
        TERowParallelLinear,
        TELinear,
        TENorm,
        TransformerEngineAttention,
        NativeExperts if native else GroupedExperts,
    )


def stack_submodules(config: Config, part: Parts, native: bool = False) -> HybridStackSubmodules:
    """The layers behind the letters M, * and E, and the multi-token-prediction block; each kind's
    recomputation is a matter of the class that fills a slot."""
    model, recompute = config.model, config.train.recompute
    full, selective = RecomputeMode.full, RecomputeMode.selective
    again = partial(_recomputing_if, native=native)
    mamba_layer = ModuleSpec(
        module=again(recompute.mamba == full, MambaBlock),
        submodules=MambaLayerSubmodules(
            norm=part.norm,
            mixer=ModuleSpec(
                module=again(recompute.mamba == selective, Mamba2Mixer, ["mix"], native=False),
                params={"mamba": model.mamba},
                submodules=Mamba2MixerSubmodules(part.column_parallel, part.row_parallel),
            ),
            mamba_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )
    attention_layer = ModuleSpec(
        module=again(recompute.attention == full, AttentionBlock),
        submodules=TransformerLayerSubmodules(
            input_layernorm=part.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=part.column_parallel,
                    core_attention=again(recompute.attention == selective, part.core_attention),
                    linear_proj=part.row_parallel,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )
    mtp_layer = ModuleSpec(
        module=MtpLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=part.norm,
            hnorm=part.norm,
            eh_proj=part.column_parallel,
            mtp_model_layer=None,  # pyright: ignore[reportArgumentType] - from the pattern
            layer_norm=part.norm,
        ),
    )
    return HybridStackSubmodules(
        mamba_layer=mamba_layer,
        attention_layer=attention_layer,
        moe_layer=_moe_layer(config, part, native),
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[mtp_layer]),
        ),
    )


def _moe_layer(config: Config, part: Parts, native: bool) -> ModuleSpec:
    model, mode = config.model, config.train.recompute.moe
    methods = ["forward", "routed"] if issubclass(part.experts, GroupedExperts) else ["forward"]
    experts = _recomputing_if(mode == RecomputeMode.selective, part.experts, methods, native)
    moe = partial(
        LatentMoELayer,
        submodules=LatentMoESubmodules(
            experts=partial(
                experts,
                input_size=model.moe.latent_size or model.hidden_size,
            ),
            shared_experts=partial(
                SharedExpertMLP,
                submodules=shared_expert_submodules(part.column_parallel, part.row_parallel),
            ),
            router=SigmoidRouter,
            latent_projection=part.replicated,
        ),
    )
    return ModuleSpec(
        module=_recomputing_if(mode == RecomputeMode.full, MoEBlock, native=native),
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=part.norm,
            mlp=moe,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )


def _recomputing_if(
    is_wanted: bool, owner: type, methods: Sequence[str] = ("forward",), native: bool = False
) -> type:
    return recomputing(owner, methods, native) if is_wanted else owner
