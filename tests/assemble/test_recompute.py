"""Activation recomputation on one rank. For every kind and mode, losses, gradients and token counts
are bit-identical to those of a model without recomputation, and fewer bytes stay alive.

Second truth: the same model without recomputation. Live bytes are read from the C library's heap.
Not covered: several ranks and telemetry (tests/distributed/test_recompute.py), Transformer Engine.
"""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from nemotron_train.assemble.build import build_model, wrap_data_parallel
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import Config
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device
from nemotron_train.precision.attach import PrecisionControl
from tests.conftest import SMALL_RUN

KINDS = ("mamba", "attention", "moe")
MODES = ("selective", "full")
ROWS, LENGTH, VOCABULARY = 2, 64, 512


def configure(overrides: list[str]) -> Config:
    small = [knob for knob in SMALL_RUN if not knob.startswith("data")]
    return compose_config([*small, "model.pattern=ME*E", "model.mtp.depths=2", *overrides])


def built(config: Config, groups: object) -> torch.nn.Module:
    core = build_model(config, resolve_plan(config), device.prepare(), groups)  # pyright: ignore[reportArgumentType]
    model = wrap_data_parallel(core, config, groups)  # pyright: ignore[reportArgumentType]
    control = PrecisionControl([core], config, resolve_plan(config), groups)  # pyright: ignore[reportArgumentType]
    control.before_step(3, 0)
    model.zero_grad_buffer()
    return model


def losses(model: torch.nn.Module, seed: int, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(0, VOCABULARY, (ROWS, length), generator=generator)
    return model(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, 1),
        loss_mask_BS=torch.ones(ROWS, length),
        document_ids_BS=(torch.arange(length) // 24).expand(ROWS, length),
    )


def outcome(config: Config, groups: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The results of two micro-batches: losses, FP32 gradients and the routers' counts. The second
    forward pass runs before the first backward pass, as in a pipeline."""
    model = built(config, groups)
    first, second = losses(model, 1), losses(model, 2)
    first.sum().backward()
    second.sum().backward()
    yield "losses", torch.stack([first, second]).detach()
    for name, parameter in model.named_parameters():
        yield name, parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in model.named_modules():
        if hasattr(module, "load_balance_loss_sum"):
            yield f"{name} tokens", module.local_tokens_per_expert
            yield f"{name} loss", module.load_balance_loss_sum


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nvfp4_all"])
def test_nothing_changes_in_any_bit(precision: str, groups: object) -> None:
    kept = dict(outcome(configure([f"precision={precision}"]), groups))
    assert all(tensor.any() for tensor in kept.values())
    for kind in KINDS:
        for mode in MODES:
            knobs = [f"precision={precision}", f"train.recompute.{kind}={mode}"]
            again = dict(outcome(configure(knobs), groups))
            changed = [
                name for name, tensor in kept.items() if not torch.equal(tensor, again[name])
            ]
            assert again.keys() == kept.keys() and not changed, (kind, mode, changed)


_HEAP_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Heap(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in _HEAP_FIELDS.split()]


def bytes_in_use() -> int:
    """Bytes in use on the C library's heap, where torch allocates its CPU tensors."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("the C library has no mallinfo2 (glibc before 2.33, musl)")
    mallinfo2.restype = _Heap
    heap = mallinfo2()
    return heap.uordblks + heap.hblkhd


def kept_for_backward(config: Config, groups: object, length: int) -> int:
    """Bytes that a forward pass keeps alive for the backward pass."""
    model = built(config, groups)
    losses(model, 1, length).sum().backward()  # allocates what persists, e.g. quantized weights
    before = bytes_in_use()
    loss = losses(model, 1, length)
    kept = bytes_in_use() - before
    loss.sum().backward()
    return kept


@pytest.mark.parametrize(("kind", "pattern"), [("mamba", "MM"), ("attention", "**"), ("moe", "EE")])
def test_less_is_kept(kind: str, pattern: str, groups: object) -> None:
    """Selective recomputation keeps less than none. Full recomputation keeps less than selective:
    only the input of each layer."""
    length = 512
    common = [f"model.pattern={pattern}", "model.mtp.depths=0", "precision=fp32"]
    common += ["model.moe.experts_per_token=4", f"train.sequence_length={length}"]
    common += ["train.global_batch_tokens=1024"]
    off, selective, full = (
        kept_for_backward(configure([*common, f"train.recompute.{kind}={mode}"]), groups, length)
        for mode in ("off", *MODES)
    )
    assert full < selective < off
    tokens, hidden = ROWS * length, 64
    outside = 4 * tokens * (VOCABULARY + 3 * hidden)  # logits, embedding, final norm
    inputs = 4 * tokens * 2 * hidden
    assert full < 1.5 * (outside + inputs), (full, outside, inputs)
