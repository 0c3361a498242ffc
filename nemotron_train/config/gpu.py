"""The knobs of `gpu`: Megatron-Core's performance switches and the optional packages. No torch, no
logic; `plan.switches` decides what follows from them on one machine."""

from dataclasses import dataclass
from enum import StrEnum


class Switch(StrEnum):
    """Use of something that not every machine has. YAML reads bare `on` and `off` as booleans, so a
    recipe must quote them."""

    auto = "auto"  # where it works
    on = "on"  # an error where it does not work
    off = "off"


class Dispatcher(StrEnum):
    """How tokens reach the experts of other ranks."""

    alltoall = "alltoall"  # NCCL's all-to-all
    deepep = "deepep"  # Megatron's flex dispatcher over DeepEP
    hybridep = "hybridep"  # the same over DeepEP's hybrid-ep branch


@dataclass
class GpuConfig:
    """Packages and performance switches on a GPU. On a CPU they have no effect, and `on` is an
    error. Names are Megatron-Core's where it has one. Results change by rounding only."""

    transformer_engine: Switch = Switch.auto  # its linears, norms, attention and optimizer
    mamba_ssm: Switch = Switch.auto  # its chunked scan
    causal_conv1d: Switch = Switch.auto  # its convolution
    gradient_accumulation_fusion: Switch = Switch.auto  # add weight gradients in the product's end
    moe_permute_fusion: Switch = Switch.auto  # Transformer Engine's permutation of routed tokens
    moe_shared_expert_overlap: Switch = Switch.auto  # shared expert during the token exchange
    fused_norm_linear: Switch = Switch.auto  # norm in one module with in_proj and linear_qkv
    fused_adamw: Switch = Switch.auto  # one AdamW kernel where torch computes it
    variable_length_attention: Switch = Switch.auto  # torch's one kernel for all packed documents
    moe_token_dispatcher: Dispatcher = Dispatcher.alltoall
    tp_comm_overlap: bool = False  # tensor-parallel exchange during the products
