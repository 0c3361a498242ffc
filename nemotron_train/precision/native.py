"""A precision plan computed by Transformer Engine: Megatron's configuration, and the formats that
the built modules carry and have run in, read back from them.

Owns what `plan.precision.transformer_engine`'s plain dictionaries become in Megatron's objects, and
the comparison with the plan. Does not own: whether to be native (`precision.backend`), the
translation itself, the layers (`assemble.specs`).

What is read back is what Megatron and Transformer Engine write on their modules; the tests run
Megatron's own wrappers over a stand-in for Transformer Engine. Never run on a Blackwell GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.quantization.quant_config import RecipeConfig

from nemotron_train.config.schema import Config, GemmFormat
from nemotron_train.plan.precision.resolve import LinearFormats, PrecisionPlan
from nemotron_train.plan.precision.transformer_engine import to_transformer_engine
from nemotron_train.precision.attach import modules_of

# A plan's NVFP4 option and the field of Transformer Engine's recipe that switches it off.
_OPTION_SWITCHES = {
    "weight_2d": "disable_2d_quantization",
    "hadamard": "disable_rht",
    "stochastic_rounding": "disable_stochastic_rounding",
}


def transformer_fields(config: Config, plan: PrecisionPlan) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for the plan, `quant_recipe` among them."""
    native = to_transformer_engine(config, plan)
    return {**native["transformer_config"], "quant_recipe": RecipeConfig.from_config_dict(native)}


def set_to_run_in(module: Any, in_context: str) -> str:
    """The format a Transformer Engine linear is set to train in, read from the module.

    in_context: the format of the context in which Megatron calls it (`context_format`). A recipe
    of the module's own replaces it, outside any context only where the recipe says so.
    """
    params = module.te_quant_params
    if params is None:
        return in_context
    recipe = params.training_recipe
    quantized = in_context != GemmFormat.bf16
    overrides = (
        recipe.override_quantized_autocast if quantized else recipe.override_nonquantized_autocast
    )
    if not overrides:
        return in_context
    return recipe.fp4_quantization_recipe or recipe.fp8_quantization_recipe or GemmFormat.bf16


def context_format(path: str, config: Any) -> str:
    """The format of the context around the linear at `path` (decoder layers in global numbers),
    from `config`, the TransformerConfig that the model holds.

    Layers of the decoder between the BF16 ones at both ends, and of the MTP block, counted from 0
    (fp4_utils.get_fp4_context, HybridStack.forward). The MTP projection lies in FP8's context
    only (MultiTokenPredictionLayer).
    """
    base = config.fp4_recipe if config.fp4 else config.fp8_recipe if config.fp8 else GemmFormat.bf16
    words = path.split(".")
    if words[-1] == "eh_proj":
        return base if config.fp8 else GemmFormat.bf16
    layer = int(words[len(words) - 1 - words[::-1].index("layers") + 1])
    start = config.num_layers_at_start_in_bf16 if config.first_last_layers_bf16 else 0
    end = config.num_layers_at_end_in_bf16 if config.first_last_layers_bf16 else 0
    return base if start <= layer < config.num_layers - end else GemmFormat.bf16


def ran_in(module: Any) -> str:
    """The format of the last forward pass, from what Transformer Engine keeps on its modules
    (`TransformerEngineBaseModule.init_fp8_metadata`, 2.14 to 2.20)."""
    if not module.fp8:
        return GemmFormat.bf16
    recipe = module.fp8_meta["recipe"]
    for name in (GemmFormat.nvfp4, GemmFormat.mxfp8):
        if getattr(recipe, name)():  # Transformer Engine names its tests as we name the formats
            return name
    return type(recipe).__name__


class NativePrecision:
    """Holds the model of this rank to the plan; the counterpart of `attach.PrecisionControl`."""

    def __init__(self, chunks: Sequence[torch.nn.Module], plan: PrecisionPlan) -> None:
        self._formats = plan.at(0).formats  # one phase: the translation refuses more
        self._model_config: Any = chunks[0].config
        present = modules_of(chunks)
        self._linears: dict[str, Any] = {
            path: present[path]
            for path in self._formats
            if path in present and hasattr(present[path], "te_quant_params")
        }
        self._compare(present, self.attached(), "is set to run in")
        self._steps_to_see = 2

    def attached(self) -> dict[str, str]:
        """Path -> the format each Transformer Engine linear of this rank is set to run in."""
        return {
            path: set_to_run_in(module, context_format(path, self._model_config))
            for path, module in self._linears.items()
        }

    def before_step(self, step: int, tokens: int) -> bool:
        """Prepare optimizer step `step`; never a new phase. Before the second step of a process,
        compares what every linear ran in with the plan."""
        if self._steps_to_see:
            self._steps_to_see -= 1
            if not self._steps_to_see:
                found = {path: ran_in(module) for path, module in self._linears.items()}
                self._compare(self._linears, found, "ran in")
                self._compare_options()
        return False

    def gradients_ready(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Telemetry looks at emulated products only."""

    def weights_changed(self) -> None:
        """Nothing kept: Transformer Engine quantizes weights at every step's first micro-batch."""

    def _compare(self, present: Mapping[str, object], found: Mapping[str, str], verb: str) -> None:
        for path, formats in self._formats.items():
            if path not in present or (path not in found and not _in_block_format(formats)):
                continue
            carried = found.get(path, "no Transformer Engine format")
            if carried != formats.fprop:
                raise RuntimeError(
                    f"{path} {verb} {carried}, the plan says {formats.fprop}: the run stops rather "
                    "than train in another precision"
                )

    def _compare_options(self) -> None:
        """NVFP4's options, which Transformer Engine takes from the environment when imported."""
        for path, module in self._linears.items():
            formats = self._formats[path]
            if formats.fprop != GemmFormat.nvfp4:
                continue
            recipe = module.fp8_meta["recipe"]
            for option, switch in _OPTION_SWITCHES.items():
                if getattr(formats, option) is getattr(recipe, switch):
                    raise RuntimeError(
                        f"{path} ran with {switch}={getattr(recipe, switch)}, the plan says "
                        f"{option}={getattr(formats, option)}"
                    )


def _in_block_format(formats: LinearFormats) -> bool:
    return formats.fprop.is_block_scaled
