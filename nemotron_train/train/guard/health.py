"""Model health, every `guard.health_every` steps: residual RMS and gradient norm of each layer.

The numbers cover the whole model and the whole global batch, for any parallel layout.

Owns: the forward hooks on the layers during one step, the sums over ranks. Does not own: when the
numbers are written.

Shapes: L layers of the decoder, P parts (embedding, layers, final norm, MTP, output layer).
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron_train.config.schema import Config
from nemotron_train.optim.gradients import local_squared_norm
from nemotron_train.platform.groups import sum_over
from nemotron_train.precision.attach import modules_of

_PART = re.compile(r"embedding|decoder\.layers\.\d+|decoder\.final_norm|mtp|output_layer")


class Health:
    """Measures one step: call `begin` before the forward pass, then `end`, then `metrics`."""

    def __init__(
        self,
        config: Config,
        chunks: Sequence[DistributedDataParallel],
        groups: ProcessGroupCollection,
        device: str,
    ) -> None:
        self._every = config.guard.health_every
        self._chunks = chunks
        self._modules = modules_of([chunk.module for chunk in chunks])
        self._groups = groups
        self._device = device
        num_layers = len(config.model.pattern.replace("|", ""))
        self._layers = [f"decoder.layers.{number}" for number in range(num_layers)]
        self._parts = ["embedding", *self._layers, "decoder.final_norm"]
        self._parts += ["mtp"] if config.model.mtp.depths else []
        self._parts += ["output_layer"]
        self._hooks: list[Any] = []

    def is_due(self, step: int) -> bool:
        """Whether step `step` is measured."""
        return self._every > 0 and step % self._every == 0

    def begin(self) -> None:
        """Hook all layers of this rank. Each layer's output is then read once per micro-batch."""
        # [L, 2]: sum of squares and number of elements of each layer's output.
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
        """Remove the hooks, after the step's forward and backward passes."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def metrics(self) -> dict[str, torch.Tensor]:
        """Metrics of the measured step, the same on every rank. COLLECTIVE.

        `residual_rms/LAYER`: root mean square of the layer's output. `gradient_norm/PART`: norm of
        the part's gradient. Call it between the reduction of the gradients and their clipping.
        """
        # Ranks with equal copies add to the sum and to the count alike, so the mean is unchanged.
        sum_over(self._sums_L2, self._groups.tp_dp_cp)
        sum_over(self._sums_L2, self._groups.pp)  # each stage has its own layers
        rms_L = (self._sums_L2[:, 0] / self._sums_L2[:, 1].clamp(min=1)).sqrt()
        squares_P = torch.zeros(len(self._parts), dtype=torch.float64, device=self._device)
        for path, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                part = _PART.match(path)
                assert part is not None, f"{path} belongs to no part of the model"
                squares_P[self._parts.index(part[0])] += local_squared_norm(
                    self._chunks, parameter, self._groups
                )
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(squares_P)
        residuals = {f"residual_rms/{n}": x for n, x in zip(self._layers, rms_L, strict=True)}
        norms = zip(self._parts, squares_P.sqrt(), strict=True)
        return residuals | {f"gradient_norm/{name}": norm for name, norm in norms}
