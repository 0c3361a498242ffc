"""How the inside of the model does, every `guard.health_every` steps: the size of the residual
stream after each layer, the norm of each layer's gradient. Over the whole model and the whole
global batch, whatever the layout.

Owns: the hooks on the layers for the length of one step, the sums over ranks. Does not own: when
the numbers are written.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron_train.config.schema import Config
from nemotron_train.optim.gradients import own_squared_norm
from nemotron_train.platform.groups import sum_over
from nemotron_train.precision.attach import modules_of

_PART = re.compile(r"embedding|decoder\.layers\.\d+|decoder\.final_norm|mtp|output_layer")


class Health:
    """Measures the steps between `begin` and `metrics`."""

    def __init__(
        self,
        config: Config,
        chunks: Sequence[DistributedDataParallel],
        groups: ProcessGroupCollection,
        device: str,
    ) -> None:
        self._every, self._chunks = config.guard.health_every, chunks
        self._modules = modules_of([chunk.module for chunk in chunks])
        self._groups, self._device = groups, device
        num_layers = len(config.model.pattern.replace("|", ""))
        self._layers = [f"decoder.layers.{number}" for number in range(num_layers)]
        self._parts = ["embedding", *self._layers, "decoder.final_norm"]
        self._parts += ["mtp"] if config.model.mtp.depths else []
        self._parts += ["output_layer"]
        self._hooks: list[Any] = []

    def is_due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def begin(self) -> None:
        """From here on each layer's output is looked at: one pass over it."""
        self._sums_L2 = torch.zeros(len(self._layers), 2, dtype=torch.float64, device=self._device)
        for path, layer in self._modules.items():
            if path in self._layers:
                number = self._layers.index(path)
                self._hooks.append(layer.register_forward_hook(self._observer(number)))

    def _observer(self, number: int) -> Any:
        def observe(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            squares = torch.linalg.vector_norm(hidden.detach().float()).double().square()
            self._sums_L2[number, 0] += squares
            self._sums_L2[number, 1] += hidden.numel()

        return observe

    def end(self) -> None:
        """The passes of the step are over, or failed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def metrics(self) -> dict[str, torch.Tensor]:
        """`residual_rms/LAYER`, the root of the mean square of its output, and
        `gradient_norm/PART`, both the same on every rank. Call it between the reduction of the
        gradients and their clipping. COLLECTIVE."""
        # Ranks that hold the same numbers count them as often as they hold them: no mean changes.
        sum_over(self._sums_L2, self._groups.tp_dp_cp)
        sum_over(self._sums_L2, self._groups.pp)  # each stage has its own layers
        rms_L = (self._sums_L2[:, 0] / self._sums_L2[:, 1].clamp(min=1)).sqrt()
        squares_P = torch.zeros(len(self._parts), dtype=torch.float64, device=self._device)
        for path, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                part = _PART.match(path)
                assert part is not None, f"{path} belongs to no part of the model"
                squares_P[self._parts.index(part[0])] += own_squared_norm(
                    self._chunks, parameter, self._groups
                )
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(squares_P)
        found = {f"residual_rms/{n}": x for n, x in zip(self._layers, rms_L, strict=True)}
        norms = zip(self._parts, squares_P.sqrt(), strict=True)
        return found | {f"gradient_norm/{name}": norm for name, norm in norms}
