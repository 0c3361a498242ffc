"""Activation recomputation: a part of a layer keeps its inputs and runs again for its gradient.

Owns: the running again, and that nothing counts it twice. Does not own: which parts do so
(`assemble.specs` reads `train.recompute`), what it saves (`plan.cost.activations`).

torch's own checkpoint (arXiv 1604.06174) in its form that keeps the graph of the first run and
replaces what it saved. Gradients then flow as without it, in the same order and dtype, so they are
equal bit for bit; Megatron-Core's form (tensor_parallel/random.py, CheckpointFunction) backwards
every use of a weight apart, and a multi-token-prediction block that is used twice adds up its BF16
gradients otherwise. Our layers draw no random numbers: stochastic rounding's words are a function
of the step and of the number of the call, which the second run gets from the first.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nemotron_train.model.moe.router import SigmoidRouter


class _SecondRun:
    """Around a second run of a part of `owner`: linears number their calls as in the first one,
    and routers and linears forget it. May be entered again (telemetry differentiates apart)."""

    def __init__(self, owner: torch.nn.Module) -> None:
        self._attached: list[Any] = []  # of `precision.linear`, which lies above this module
        self._routers: list[Any] = []
        for module in owner.modules():
            attached = getattr(module, "attached", None)
            if attached is not None:
                self._attached.append(attached)
            if isinstance(module, SigmoidRouter):
                self._routers.append(module)
        self._calls_then = [attached.calls for attached in self._attached]

    def __enter__(self) -> None:
        self._calls_now = [attached.calls for attached in self._attached]
        self._set_calls(self._calls_then)
        self._counts = [
            (router.local_tokens_per_expert.clone(), router.load_balance_loss_sum)
            for router in self._routers
        ]

    def __exit__(self, *exception: object) -> None:
        self._set_calls(self._calls_now)
        for router, (tokens_E, loss_sum) in zip(self._routers, self._counts, strict=True):
            router.local_tokens_per_expert.copy_(tokens_E)
            router.load_balance_loss_sum = loss_sum

    def _set_calls(self, calls: list[dict[int, int]]) -> None:
        for attached, count in zip(self._attached, calls, strict=True):
            attached.calls = count


def _contexts(owner: torch.nn.Module) -> tuple[Any, Any]:
    """What surrounds the first and the second run."""
    return nullcontext(), _SecondRun(owner)


def recomputing(owner: type, methods: Sequence[str] = ("forward",), native: bool = False) -> type:
    """`owner`, whose `methods` keep their inputs and outputs only, and run again in the backward
    pass. What they return does not change, nor does any gradient in any bit.

    COLLECTIVE where the methods are: the backward pass repeats their exchanges, on every rank at
    the same place. native: Transformer Engine's checkpoint, which brings its quantization contexts
    back (translated, not run on a GPU).
    """
    parts = {name: _run_again(getattr(owner, name), native) for name in methods}
    return type(f"Recomputing{owner.__name__}", (owner,), parts)


def _run_again(plain: Callable[..., Any], native: bool) -> Callable[..., Any]:
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
