"""Transformer Engine's fused forms, and the buffers of its overlapped exchanges.

Owns: linears that add their weight gradient to the FP32 buffer at the end of the product, the names
under which a norm inside a linear is stored, and the user buffers of tensor-parallel overlap. Does
not own: where they are used (`plan.switches`, `assemble.specs`).

Translated and tested with stand-ins for Transformer Engine; not run on a GPU.
"""

import copy
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from nemotron_train.config.schema import Config

# Stored name -> name in the module. A checkpoint has the same tensors whether the norm is a module
# of its own or part of the linear behind it.
MAMBA_NAMES: Mapping[str, str] = {"mixer.in_proj.layer_norm_": "norm."}
ATTENTION_NAMES: Mapping[str, str] = {"self_attention.linear_qkv.layer_norm_": "input_layernorm."}


def adding_gradients(linear: type) -> type:
    """A subclass of a Transformer Engine linear (or of our native experts) whose weight gradient is
    added to `weight.main_grad` by the product itself. It has the same name and the same state.

    Only these classes get the field: Megatron's output layer, with the same configuration, would
    ask for apex (tensor_parallel/layers.py).
    """

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        linear.__init__(
            self,
            *[_adding(argument) for argument in arguments],
            **{name: _adding(option) for name, option in options.items()},
        )

    return type(linear.__name__, (linear,), {"__init__": __init__, "__doc__": linear.__doc__})


def _adding(argument: Any) -> Any:
    """A copy with the field set, if the argument is Megatron's configuration."""
    if not isinstance(argument, TransformerConfig):
        return argument
    changed = copy.copy(argument)
    changed.gradient_accumulation_fusion = True
    return changed


def start_user_buffers(config: Config, quantized: bool) -> None:
    """Allocate the buffers in which Transformer Engine's products exchange activations with the
    tensor-parallel ranks. COLLECTIVE, before the model is built.

    Needs Transformer Engine 2.7 or newer. quantized: some products are block-scaled and some BF16.
    """
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    modes = te.module.base.UserBufferQuantizationMode
    rows = config.train.sequence_length * config.train.micro_batch_sequences
    te.module.base.initialize_ub(
        shape=[rows // config.parallel.context, config.model.hidden_size],
        tp_size=config.parallel.tensor,
        quantization_modes=[modes.FP8, modes.NONE] if quantized else [modes.NONE],
        bootstrap_backend="nccl",
    )
