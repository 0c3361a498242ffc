"""The peer's half of the step benchmark: Hugging Face NemotronHForCausalLM on random weights.

Configured as its users would, and in its favour: its fastest experts on a CPU (grouped products,
its default), torch's fused AdamW on its parameters (BF16 parameters mean BF16 optimizer state), no
gradient clipping, no metrics. Its fused Mamba kernels need a GPU; on a CPU it runs its torch
implementation, which `build_peer` checks.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.our_step import NUM_ROWS, NUM_TOKENS, configuration
from nemotron_train.config.schema import ModelConfig

LAYER_TYPES = {"M": "linear_attention", "*": "full_attention", "E": "moe"}


def peer_config(model: ModelConfig, sequence_length: int) -> Any:
    """`NemotronHConfig` with the same dimensions; its Mamba chunk size keeps the default, 128."""
    from transformers.models.nemotron_h import NemotronHConfig  # pyright: ignore[reportMissingImports]

    return NemotronHConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers_block_type=[LAYER_TYPES[letter] for letter in model.pattern],
        num_attention_heads=model.attention.heads,
        num_key_value_heads=model.attention.key_value_heads,
        head_dim=model.attention.head_dim,
        mamba_num_heads=model.mamba.heads,
        mamba_head_dim=model.mamba.head_dim,
        ssm_state_size=model.mamba.state_size,
        n_groups=model.mamba.groups,
        conv_kernel=model.mamba.conv_kernel_size,
        n_routed_experts=model.moe.experts,
        num_experts_per_tok=model.moe.experts_per_token,
        moe_intermediate_size=model.moe.expert_hidden_size,
        moe_shared_expert_intermediate_size=model.moe.shared_expert_hidden_size,
        moe_latent_size=model.moe.latent_size or None,
        routed_scaling_factor=model.moe.router_scaling_factor,
        layer_norm_epsilon=model.norm_epsilon,
        max_position_embeddings=sequence_length,
        use_cache=False,
    )


def build_peer(dtype: str) -> torch.nn.Module:
    """The peer on the CPU with random weights, all cast to `dtype`."""
    from transformers.models.nemotron_h import NemotronHForCausalLM, modeling_nemotron_h  # pyright: ignore[reportMissingImports]

    model = NemotronHForCausalLM(peer_config(configuration(dtype).model, NUM_TOKENS))
    # None means that no fused kernel is installed and the model runs its torch implementation.
    fused = modeling_nemotron_h.mamba2_split_conv1d_scan_combined(*[None] * 7)
    assert fused is None, "the peer found a fused Mamba kernel: not the comparison meant here"
    return model.to(getattr(torch, dtype)).train()


def peer_step(dtype: str, num_threads: int = 2) -> Callable[[], float]:
    """Builds the peer; returns a function that takes one step and returns its loss."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    model = build_peer(dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    vocab_size = configuration(dtype).model.vocab_size

    def step() -> float:
        tokens = torch.randint(0, vocab_size, (NUM_ROWS, NUM_TOKENS))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
