"""Runs one rank of a check whose trainer has one layout fault: `faulty.py FAULT TASK.json`.

Each fault has occurred in Megatron-Core or in a port of it: a gradient that is not summed over a
group, a part that every rank adds whole, a missing factor.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

from nemotron_train.check import worker
from nemotron_train.platform import device


def _modules(trainer: Any, path: str) -> list[Any]:
    """This rank's modules at a global path; empty if the rank does not hold the path."""
    from nemotron_train.precision.attach import global_modules

    found = [global_modules(chunk.module).get(path) for chunk in trainer.chunks]
    return [module for module in found if module is not None]


def norm_not_summed(trainer: Any) -> None:
    """A norm's gradient is not summed under sequence parallelism, where each rank has only the
    share of its own tokens."""
    for module in _modules(trainer, "decoder.layers.1.pre_mlp_layernorm"):
        module.weight.sequence_parallel = False


def router_not_summed(trainer: Any) -> None:
    """A router's gradient is not summed under sequence parallelism."""
    for module in _modules(trainer, "decoder.layers.1.mlp.router"):
        module.weight.sequence_parallel = False


def shared_expert_added_twice(trainer: Any) -> None:
    """Every tensor-parallel rank adds the whole output of the shared expert."""
    for module in _modules(trainer, "decoder.layers.1.mlp.shared_experts"):
        _scale_output(module, 2.0)


def experts_gradient_halved(trainer: Any) -> None:
    """The experts' gradients are divided by the number of ranks that hold the experts."""
    for module in _modules(trainer, "decoder.layers.1.mlp.experts.linear_fc2"):
        module.weight.register_hook(lambda gradient: gradient / 2)


def moments_lost(trainer: Any) -> None:
    """The AdamW moments of the checkpoint are not loaded."""
    after_resume(trainer, lambda progress: _clear_moments(trainer, progress))


def cursor_lost(trainer: Any) -> None:
    """The resumed run reads its data from the beginning."""
    start = trainer.train_data.state_at_start()
    after_resume(trainer, lambda progress: dataclasses.replace(progress, data=start))


def after_resume(trainer: Any, change: Callable[[Any], Any]) -> None:
    """Applies `change` to the progress that a checkpoint is resumed with."""
    resume = trainer.resume

    def resume_wrongly() -> Any:
        progress = resume()
        return change(progress) if progress.step else progress

    trainer.resume = resume_wrongly


def _clear_moments(trainer: Any, progress: Any) -> Any:
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    for state in (state for part in parts for state in part.optimizer.state.values()):
        state["exp_avg"].zero_()
    return progress


def _scale_output(module: Any, factor: float) -> None:
    def scale(module: Any, inputs: Any, output: Any) -> Any:
        return output * factor

    module.register_forward_hook(scale)


FAULTS: dict[str, Callable[[Any], None]] = {
    function.__name__: function
    for function in (
        norm_not_summed,
        router_not_summed,
        shared_expert_added_twice,
        experts_gradient_halved,
        moments_lost,
        cursor_lost,
    )
}


if __name__ == "__main__":
    device.prepare(1)
    from nemotron_train.train.trainer import Trainer

    build = Trainer.__init__

    def build_with_fault(self: Any, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        fault = FAULTS[sys.argv[1]]
        if int(os.environ["WORLD_SIZE"]) > 1 or fault in (moments_lost, cursor_lost):
            fault(self)

    Trainer.__init__ = build_with_fault  # type: ignore[method-assign]
    worker.main(sys.argv[-1])
