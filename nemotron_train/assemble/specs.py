"""The spec tree: which class fills each slot of Megatron's `HybridStack`.

There are three sets of classes (`parts`). With Transformer Engine: its parallel linears, norms and
attention. Without it: our subclasses of Megatron's linears, and our norm and attention. A precision
plan with emulated block-scaled formats: emulating linears and experts. The Mamba-2 mixer and the
router are always ours; the experts are ours except under a native plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from nemotron_train.assemble.fused import ATTENTION_NAMES, MAMBA_NAMES, adding_gradients
from nemotron_train.assemble.recompute import recomputing
from nemotron_train.config.schema import Config, RecomputeMode
from nemotron_train.model.attention.block import AttentionBlock
from nemotron_train.model.attention.layer import (
    CoreAttention,
    TransformerEngineAttention,
    VariableLengthAttention,
)
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
from nemotron_train.plan.switches import ALL_OFF, Switches
from nemotron_train.precision.experts import EmulatedExperts
from nemotron_train.precision.linear import (
    EmulatedColumnParallelLinear,
    EmulatedReplicatedLinear,
    EmulatedRowParallelLinear,
)


@dataclass(frozen=True)
class Parts:
    """The classes that depend on Transformer Engine, its switches and the precision plan.

    norm_column_parallel: a norm and a column-parallel linear in one module, for in_proj and
    linear_qkv; None if the norm is a module of its own. The norm before a mixture of experts always
    is: the router and the latent projection read it, too.
    """

    column_parallel: type
    row_parallel: type
    replicated: type
    norm: type
    core_attention: type
    experts: type
    norm_column_parallel: type | None = None


def parts(
    transformer_engine: bool,
    emulated: bool = False,
    native: bool = False,
    switches: Switches = ALL_OFF,
) -> Parts:
    """The classes for this machine and plan: emulating ones if `emulated`, else Transformer
    Engine's if it is installed (written, not run on a GPU), else the plain ones. With `native`,
    Transformer Engine computes the block-scaled formats and the experts use its grouped linears."""
    attention = VariableLengthAttention if switches.variable_length_attention else CoreAttention
    if emulated:
        return Parts(
            EmulatedColumnParallelLinear,
            EmulatedRowParallelLinear,
            EmulatedReplicatedLinear,
            RMSNorm,
            attention,
            EmulatedExperts,
        )
    if not transformer_engine:
        return Parts(
            ColumnLinear,
            RowLinear,
            ReplicatedLinear,
            RMSNorm,
            attention,
            GroupedExperts,
        )
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TELinear,
        TENorm,
        TERowParallelLinear,
    )

    maybe_adding = adding_gradients if switches.transformer_engine_gradients else _unchanged
    norm_linear = maybe_adding(TELayerNormColumnParallelLinear)
    return Parts(
        maybe_adding(TEColumnParallelLinear),
        maybe_adding(TERowParallelLinear),
        maybe_adding(TELinear),
        TENorm,
        TransformerEngineAttention,
        maybe_adding(NativeExperts) if native else GroupedExperts,
        norm_linear if switches.fused_norm_linear else None,
    )


def _unchanged(owner: type) -> type:
    return owner


def stack_submodules(config: Config, part: Parts, native: bool = False) -> HybridStackSubmodules:
    """The layers for the pattern letters M, * and E, and the multi-token-prediction block. A layer
    kind with recomputation gets a recomputing subclass in its slot."""
    model, recompute = config.model, config.train.recompute
    full, selective = RecomputeMode.full, RecomputeMode.selective
    maybe_recomputing = partial(_recomputing_if, native=native)
    # Transformer Engine computes nothing inside `mix`: plain checkpoint, native=False.
    mixer_class = maybe_recomputing(
        recompute.mamba == selective, Mamba2Mixer, ["mix"], native=False
    )
    # A norm inside the linear behind it leaves its own slot empty.
    norm = part.norm if part.norm_column_parallel is None else IdentityOp
    after_norm = part.norm_column_parallel or part.column_parallel
    is_fused = part.norm_column_parallel is not None
    mamba_layer = ModuleSpec(
        module=maybe_recomputing(recompute.mamba == full, MambaBlock),
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=ModuleSpec(
                module=mixer_class,
                params={"mamba": model.mamba},
                submodules=Mamba2MixerSubmodules(after_norm, part.row_parallel),
            ),
            mamba_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=dict(MAMBA_NAMES) if is_fused else {},
        ),
    )
    attention_layer = ModuleSpec(
        module=maybe_recomputing(recompute.attention == full, AttentionBlock),
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=after_norm,
                    core_attention=maybe_recomputing(
                        recompute.attention == selective, part.core_attention
                    ),
                    linear_proj=part.row_parallel,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            sharded_state_dict_keys_map=dict(ATTENTION_NAMES) if is_fused else {},
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
    # Selective recomputation covers both entry points of `GroupedExperts`.
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
    condition: bool, owner: type, methods: Sequence[str] = ("forward",), native: bool = False
) -> type:
    return recomputing(owner, methods, native) if condition else owner
