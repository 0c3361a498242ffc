"""Activation recomputation: a part of a layer saves its inputs and runs again in the backward pass.

Owns: the second run, and that counters (router statistics, call numbers) do not count it. Does not
own: which parts recompute (`assemble.specs` reads `train.recompute`), the memory estimate
(`plan.cost.activations`).

It uses torch's non-reentrant checkpoint (arXiv 1604.06174), which keeps the graph of the first run
and recomputes only the saved tensors. Gradients flow as without it, in the same order and dtype, so
they are equal bit for bit. Megatron-Core's checkpoint (tensor_parallel/random.py,
CheckpointFunction) runs a separate backward for every use of a weight. A multi-token-prediction
block that is used twice would then sum its BF16 gradients differently. Our layers draw no random
numbers: the random words of stochastic rounding are a function of the step and the call number, and
the second run reuses the call numbers of the first.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nemotron_train.model.moe.router import SigmoidRouter


class _SecondRun:
    """Context manager around the second run of a part of `owner`. Linears number their calls as in
    the first run, and at exit the counters of linears and routers are restored. May be entered
    several times (telemetry runs a separate backward)."""

    def __init__(self, owner: torch.nn.Module) -> None:
        # Objects of `precision.linear`, which this module must not import (a higher layer).
        self._attached: list[Any] = []
        self._routers: list[Any] = []
        for module in owner.modules():
            attached = getattr(module, "attached", None)
            if attached is not None:
                self._attached.append(attached)
            if isinstance(module, SigmoidRouter):
                self._routers.append(module)
        self._calls_at_first_run = [attached.calls for attached in self._attached]

    def __enter__(self) -> None:
        self._calls_before = [attached.calls for attached in self._attached]
        self._set_calls(self._calls_at_first_run)
        self._counts = [
            (router.local_tokens_per_expert.clone(), router.load_balance_loss_sum)
            for router in self._routers
        ]

    def __exit__(self, *exception: object) -> None:
        self._set_calls(self._calls_before)
        for router, (tokens_E, loss_sum) in zip(self._routers, self._counts, strict=True):
            router.local_tokens_per_expert.copy_(tokens_E)
            router.load_balance_loss_sum = loss_sum

    def _set_calls(self, calls: list[dict[int, int]]) -> None:
        for attached, count in zip(self._attached, calls, strict=True):
            attached.calls = count


def _contexts(owner: torch.nn.Module) -> tuple[Any, Any]:
    """The context managers of the first and of the second run; called before the first run."""
    return nullcontext(), _SecondRun(owner)


def recomputing(owner: type, methods: Sequence[str] = ("forward",), native: bool = False) -> type:
    """A subclass of `owner` whose `methods` save only their inputs and run again in the backward
    pass. Their results and all gradients stay the same, bit for bit.

    COLLECTIVE if the methods are: the backward pass repeats their communication, in the same order
    on every rank. native: use Transformer Engine's checkpoint, which restores its quantization
    contexts (written, not run on a GPU).
    """
    parts = {name: _run_again(getattr(owner, name), native) for name in methods}
    return type(f"Recomputing{owner.__name__}", (owner,), parts)


def _run_again(plain: Callable[..., Any], native: bool) -> Callable[..., Any]:
    """The method `plain` with recomputation; without gradients it just calls `plain`."""

    def method(self: torch.nn.Module, *args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(self, *args, **named)
        options: dict[str, Any] = {"use_reentrant": False, "context_fn": partial(_contexts, self)}
        if native:
            from transformer_engine.pytorch.distributed import (  # pyright: ignore
                checkpoint as engine_checkpoint,
            )

            return engine_checkpoint(partial(plain, self), *args, **options, **named)
        run = partial(plain, self)
        return checkpoint(run, *args, preserve_rng_state=False, **options, **named)

    return method
