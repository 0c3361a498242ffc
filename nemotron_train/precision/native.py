"""Native execution of a precision plan by Transformer Engine: Megatron's configuration, and a check
of the formats that the built modules are configured for and have run in.

Owns: the conversion of the plain dictionaries of `plan.precision.transformer_engine` to Megatron's
objects, and the comparison with the plan. Does not own: the choice to run natively
(`precision.backend`), the translation itself, the layers (`assemble.specs`).

The formats are read from the attributes that Megatron and Transformer Engine set on their modules.
The tests run Megatron's own wrappers over a stand-in for Transformer Engine. This code has never
run on a Blackwell GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.quantization.quant_config import RecipeConfig

from nemotron_train.config.schema import Config, GemmFormat
from nemotron_train.plan.precision.resolve import LinearFormats, PrecisionPlan
from nemotron_train.plan.precision.transformer_engine import to_transformer_engine
from nemotron_train.precision.attach import modules_of

# An NVFP4 option of the plan -> the field of Transformer Engine's recipe that switches it off.
_OPTION_SWITCHES = {
    "weight_2d": "disable_2d_quantization",
    "hadamard": "disable_rht",
    "stochastic_rounding": "disable_stochastic_rounding",
}


def transformer_fields(config: Config, plan: PrecisionPlan) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that the plan sets, including `quant_recipe`."""
    native = to_transformer_engine(config, plan)
    return {**native["transformer_config"], "quant_recipe": RecipeConfig.from_config_dict(native)}


def configured_format(module: Any, in_context: str) -> str:
    """The format that a Transformer Engine linear is configured to train in, read from the module.

    in_context: the format of the context in which Megatron calls it (`context_format`). The
    module's own recipe, if any, replaces it if the recipe says so for that kind of context.
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
    """The format of the context around the linear at `path`, whose decoder layers have global
    numbers. `config`: the TransformerConfig that the model holds.

    Decoder layers between the BF16 layers at both ends run in the low-precision context; so do
    layers of the MTP block, counted from 0 (fp4_utils.get_fp4_context, HybridStack.forward). The
    MTP projection runs only in FP8's context (MultiTokenPredictionLayer).
    """
    base = config.fp4_recipe if config.fp4 else config.fp8_recipe if config.fp8 else GemmFormat.bf16
    names = path.split(".")
    if names[-1] == "eh_proj":
        return base if config.fp8 else GemmFormat.bf16
    layer = int(names[len(names) - 1 - names[::-1].index("layers") + 1])  # after the last "layers"
    start = config.num_layers_at_start_in_bf16 if config.first_last_layers_bf16 else 0
    end = config.num_layers_at_end_in_bf16 if config.first_last_layers_bf16 else 0
    return base if start <= layer < config.num_layers - end else GemmFormat.bf16


def executed_format(module: Any) -> str:
    """The format of a module's last forward pass, read from what Transformer Engine stores on it
    (`TransformerEngineBaseModule.init_fp8_metadata`, 2.14 to 2.20)."""
    if not module.fp8:
        return GemmFormat.bf16
    recipe = module.fp8_meta["recipe"]
    for name in (GemmFormat.nvfp4, GemmFormat.mxfp8):
        if getattr(recipe, name)():  # recipe.nvfp4() and recipe.mxfp8() are predicates
            return name
    return type(recipe).__name__


class NativePrecision:
    """Checks that the model of this rank runs in the formats of the plan. Has the interface of
    `attach.PrecisionControl`. Raises RuntimeError if the model and the plan differ."""

    def __init__(self, chunks: Sequence[torch.nn.Module], plan: PrecisionPlan) -> None:
        self._formats = plan.at(0).formats  # the translation rejects plans with several phases
        self._model_config: Any = chunks[0].config
        present = modules_of(chunks)
        self._linears: dict[str, Any] = {
            path: present[path]
            for path in self._formats
            if path in present and hasattr(present[path], "te_quant_params")
        }
        self._compare(present, self.attached(), "is set to run in")
        self._steps_to_check = 2

    def attached(self) -> dict[str, str]:
        """Path -> configured format, for each Transformer Engine linear of this rank."""
        return {
            path: configured_format(module, context_format(path, self._model_config))
            for path, module in self._linears.items()
        }

    def before_step(self, step: int, tokens: int) -> bool:
        """Prepare optimizer step `step`. Always False: there is one phase only.

        Before the second step of a process, compares the format that every linear ran in with the
        plan. Raises RuntimeError if they differ.
        """
        if self._steps_to_check:
            self._steps_to_check -= 1
            if not self._steps_to_check:
                executed = {path: executed_format(module) for path, module in self._linears.items()}
                self._compare(self._linears, executed, "ran in")
                self._compare_options()
        return False

    def gradients_ready(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Does nothing: telemetry measures emulated products only."""

    def weights_changed(self) -> None:
        """Does nothing: Transformer Engine quantizes weights in the first micro-batch of a step."""

    def _compare(self, present: Mapping[str, object], actual: Mapping[str, str], verb: str) -> None:
        for path, formats in self._formats.items():
            if path not in present or (path not in actual and not _is_block_scaled(formats)):
                continue
            form = actual.get(path, "no Transformer Engine format")
            if form != formats.fprop:
                raise RuntimeError(
                    f"{path} {verb} {form}, the plan says {formats.fprop}: the run stops rather "
                    "than train in another precision"
                )

    def _compare_options(self) -> None:
        """Check NVFP4's options: Transformer Engine reads them from the environment at import."""
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


def _is_block_scaled(formats: LinearFormats) -> bool:
    return formats.fprop.is_block_scaled
