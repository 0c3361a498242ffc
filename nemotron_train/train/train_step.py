"""One optimizer step: micro-batches through Megatron's schedule, gradients, AdamW.

Every loss is a mean over the counted targets of the whole global batch. The targets are known
before any forward pass, so each head's weight is too: depth k's summed loss enters with
`weight_k / targets_k`. Megatron divides all gradients by one number of tokens at the end; the
weights passed to it are multiplied by that number first.

Shapes: B rows of a micro-batch, S tokens a row, K heads (the main one and a depth each).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from nemotron_train.config.schema import Config, ModelConfig, TrainConfig
from nemotron_train.data.batches import Batch, BatchSource, DataState
from nemotron_train.model.moe.router import SigmoidRouter
from nemotron_train.model.mtp import depth_mask
from nemotron_train.optim.build import set_learning_rate
from nemotron_train.optim.schedule import learning_rate
from nemotron_train.optim.update import apply_update, gradient_norm
from nemotron_train.plan.derive import Derived
from nemotron_train.platform.device import wait_for_device
from nemotron_train.platform.groups import sum_over
from nemotron_train.precision.attach import PrecisionControl
from nemotron_train.precision.native import NativePrecision
from nemotron_train.run_folder.progress import Progress, StepResult
from nemotron_train.train.guard.diagnose import gradients_are_finite, non_finite
from nemotron_train.train.guard.guard import Action, Findings, Guard, RollBack
from nemotron_train.train.guard.health import Health
from nemotron_train.train.guard.stragglers import Stragglers
from nemotron_train.train.step_clock import StepClock

Tensors = dict[str, torch.Tensor]


def count_targets(batch: Batch, num_heads: int) -> np.ndarray:
    """Counted targets of each head in `batch`: float64 [K]."""
    return np.array(
        [
            depth_mask(batch.loss_mask_BS, batch.document_ids_BS, depth).astype(np.float64).sum()
            for depth in range(num_heads)
        ]
    )


def micro_batches(batch: Batch, rows: int, device: str) -> Iterator[Tensors]:
    """Cut this replica's rows, whole on each of its context-parallel ranks, into micro-batches of
    tensors on `device`."""
    for start in range(0, len(batch.tokens_BS), rows):
        part = slice(start, start + rows)
        yield {
            name: torch.from_numpy(array[part]).to(device, non_blocking=True)
            for name, array in (
                ("tokens_BS", batch.tokens_BS),
                ("labels_BS", batch.labels_BS),
                ("loss_mask_BS", batch.loss_mask_BS),
                ("document_ids_BS", batch.document_ids_BS),
            )
        }


def head_weights(config: Config) -> np.ndarray:
    """Weight of each head's mean loss in the total: 1, then loss_scale / depths a depth: [K]."""
    mtp = config.model.mtp
    return np.array([1.0] + [mtp.loss_scale / max(mtp.depths, 1)] * mtp.depths)


def _forward_step(
    iterator: Iterator[Tensors], model: Any, weights_K: torch.Tensor | None = None
) -> tuple:
    batch = next(iterator)
    output = model(**batch)

    def loss(sums_K: torch.Tensor) -> tuple:
        # Megatron adds these up over the context-parallel ranks too, which share the rows.
        own_tokens = batch["tokens_BS"].numel() // model.config.context_parallel_size
        num_tokens = torch.tensor(own_tokens, dtype=torch.int)
        total = sums_K.sum() if weights_K is None else (sums_K * weights_K).sum()
        return total, num_tokens.to(sums_K.device), sums_K.detach()

    return output, loss


def run_micro_batches(
    chunks: Sequence[DistributedDataParallel],
    forward_step: Callable[..., tuple],
    batch: Batch,
    config: Config,
    device: str,
    forward_only: bool,
) -> list[torch.Tensor]:
    """This rank's rows through Megatron's schedule (none, 1F1B or interleaved 1F1B), all micro-
    batches forward and, unless `forward_only`, backward; COLLECTIVE. Micro-batches have as many
    tokens whatever the length of the rows.

    Returns each micro-batch's loss sums on ranks that hold the last stage, else nothing.
    """
    length = batch.tokens_BS.shape[1]
    rows = config.train.micro_batch_sequences * (config.train.sequence_length // length)
    iterators = [micro_batches(batch, rows, device) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batch.tokens_BS) // rows,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def moe_layer_names(model: ModelConfig) -> list[str]:
    """All MoE layers of the model, whatever this rank holds, by their module paths."""
    decoder = model.pattern.replace("|", "")
    names = [f"decoder.layers.{i}" for i, letter in enumerate(decoder) if letter == "E"]
    if model.mtp.depths:
        block = "mtp.layers.0.mtp_model_layer.layers"
        names += [f"{block}.{i}" for i, letter in enumerate(model.mtp.pattern) if letter == "E"]
    return names


def moe_layer_name(router: SigmoidRouter) -> str:
    """The name in `moe_layer_names` of the layer that `router` belongs to."""
    block = "mtp.layers.0.mtp_model_layer" if router.is_mtp_layer else "decoder"
    assert router.layer_number is not None
    return f"{block}.layers.{router.layer_number - 1}"


def is_short(train: TrainConfig, step: int) -> bool:
    """Whether step `step`, counted from 1, trains on short rows: `short_share` of the steps, as
    evenly as whole steps allow. Long and short rows alternate by step, never within one, as in the
    context extension of Nemotron 3 (Ultra report: 8% of the iterations at 4k, the rest at 1M)."""
    share = Fraction(str(train.short_share))  # 0.1 means one tenth, not the nearest double
    return math.floor(step * share) > math.floor((step - 1) * share)


class TrainStep:
    """Takes optimizer steps. Holds what a step needs; the state of the run is in `Progress`."""

    def __init__(
        self,
        config: Config,
        derived: Derived,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        batches: BatchSource,
        groups: ProcessGroupCollection,
        device: str,
        precision: PrecisionControl | NativePrecision,
        guard: Guard,
    ) -> None:
        self.config, self.derived, self.precision = config, derived, precision
        self.chunks, self.optimizer, self.batches = chunks, optimizer, batches
        self.groups, self.device, self.guard = groups, device, guard
        self.weights = head_weights(config)
        self.clock = StepClock()
        rows = derived.sequences_per_step // derived.data_parallel
        self.rank_rows = (groups.dp.rank() * rows, (groups.dp.rank() + 1) * rows)
        self.routers = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, SigmoidRouter)
        ]
        self.moe_layers = moe_layer_names(config.model)
        translated: Any = chunks[0].config  # the same object in all chunks
        translated.finalize_model_grads_func = self._finalize
        no_sync = [chunk.no_sync for chunk in chunks]
        translated.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        translated.grad_scale_func = optimizer.scale_loss
        self.health = Health(config, chunks, groups, device)
        straggler_every, ratio = config.guard.straggler_every, config.guard.straggler_ratio
        self.own_gradients_are_finite = torch.tensor(True)
        self.stragglers = Stragglers(straggler_every, ratio, device)
        # UPSTREAM(megatron-core 0.19.2): the scale is the process's, and the shape of an earlier
        # user's (evaluation, another model) refuses ours.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        """Read what Megatron's own finalization overwrites, then run it: the routers' counts and
        biases, and whether this rank's own gradients are finite."""
        self.clock.lap("forward_backward")
        if self.stragglers.is_due(self.step):  # before the first collective: ranks wait in it
            wait_for_device()  # SYNC: this rank's passes are done
            self.own_work_ended = time.perf_counter()
        self.routing = self._routing_metrics()
        self.biases = [bias.clone() for bias in self._router_biases()]
        if not self.config.parallel.overlap_gradient_reduce:  # else they are mixed already
            self.own_gradients_are_finite = gradients_are_finite(self.chunks)
        finalize_model_grads(*args, **kwargs)
        self.precision.gradients_ready(self.chunks)
        self.clock.lap("gradient_reduce")

    def _routing_metrics(self) -> dict[str, torch.Tensor]:
        """MaxVio of each MoE layer, fullest expert / mean load (Ultra report, section 2.7), the
        largest of them, and the mean load-balance loss; on steps that look inside the model each
        expert's share of the tokens too. The same on every rank. COLLECTIVE."""
        if not self.moe_layers:
            return {}
        stats = torch.zeros(2, len(self.moe_layers), device=self.device)
        shares_LE = torch.zeros(len(self.moe_layers), self.config.model.moe.experts).to(stats)
        if self.routers:
            loads = torch.stack([router.local_tokens_per_expert for router in self.routers])
            sum_over(loads, self.groups.tp_dp_cp)
            losses = torch.stack([router.load_balance_loss_sum.float() for router in self.routers])
            sum_over(losses, self.groups.tp_dp_cp)
            own = [self.moe_layers.index(moe_layer_name(router)) for router in self.routers]
            stats[0, own] = loads.amax(1) / loads.mean(1).clamp(min=1e-9)
            stats[1, own] = losses / self.derived.tokens_per_step
            shares_LE[own] = loads.to(stats) / loads.sum(1, keepdim=True).clamp(min=1)
            for router in self.routers:
                router.load_balance_loss_sum = torch.zeros(())
        sum_over(stats, self.groups.pp)  # each stage fills in its own layers
        metrics = {
            f"max_vio/{name}": value for name, value in zip(self.moe_layers, stats[0], strict=True)
        }
        metrics["max_vio"] = stats[0].amax()
        metrics["load_balance_loss"] = stats[1].mean()
        if self.health.is_due(self.step):
            sum_over(shares_LE, self.groups.pp)
            loads_by_name = zip(self.moe_layers, shares_LE, strict=True)
            metrics |= {f"expert_load/{name}": shares_E for name, shares_E in loads_by_name}
        return metrics

    def __call__(self, progress: Progress) -> StepResult:
        """Train on the next global batch; COLLECTIVE."""
        started, self.step = time.perf_counter(), progress.step + 1
        self.clock.begin()
        tokens = progress.tokens + self.derived.tokens_per_step
        rate = learning_rate(tokens, self.config.optim, self.config.train.total_tokens)
        set_learning_rate(self.optimizer, rate, self.config.optim.weight_decay)
        batch, data = self.batches.take(
            progress.data, self.derived.sequences_per_step, self.rank_rows
        )
        if is_short(self.config.train, self.step):
            batch = batch.cut(self.config.train.short_sequence_length)
        targets_K = torch.from_numpy(count_targets(batch, len(self.weights))).to(self.device)
        sum_over(targets_K, self.groups.dp)
        weights_K = torch.from_numpy(self.weights).to(self.device) / targets_K.clamp(min=1)
        self.clock.lap("data")

        self.precision.before_step(progress.step, progress.tokens)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.health.is_due(self.step):
            self.health.begin()
        weighted = partial(
            _forward_step, weights_K=(weights_K * self.derived.tokens_per_step).float()
        )
        reports = run_micro_batches(
            self.chunks, weighted, batch, self.config, self.device, forward_only=False
        )
        losses_K = self._mean_losses(reports, targets_K)
        grad_norm = gradient_norm(self.optimizer)
        inside = self._look_inside(started)
        num_zeros = self._update(data, reports, losses_K, grad_norm)
        metrics: dict[str, Any] = {"loss": losses_K[0], "lr": rate, "grad_norm": grad_norm}
        for depth, loss in enumerate(losses_K[1:], start=1):
            metrics[f"mtp_loss_{depth}"] = loss
        if self.config.train.short_sequence_length:
            metrics["sequence_length"] = batch.tokens_BS.shape[1]
        metrics |= self.routing | inside
        metrics["zero_weight_gradients"] = num_zeros
        metrics["skipped_updates"] = self.guard.skipped
        self.clock.lap("optimizer")
        after = Progress(self.step, tokens, data)
        return StepResult(after, metrics, time.perf_counter() - started)

    def _look_inside(self, started: float) -> dict[str, Any]:
        """What is measured every so many steps: the model's health, slow ranks. COLLECTIVE."""
        found: dict[str, Any] = {}
        if self.health.is_due(self.step):
            self.health.end()
            found |= self.health.metrics()
        if self.stragglers.is_due(self.step):
            numbers, line = self.stragglers.measure(self.own_work_ended - started)
            found |= numbers
            if line:
                self.guard.report("straggler", self.step, line)
        return found

    def _update(
        self,
        data: DataState,
        reports: list[torch.Tensor],
        losses_K: torch.Tensor,
        grad_norm: float,
    ) -> float:
        """Let the gradients change the weights, if the guard lets them; returns how many of their
        elements are zero, NaN where the update was skipped. COLLECTIVE. SYNC."""
        own_loss_is_finite = bool(torch.stack(reports).isfinite().all()) if reports else True
        losses_are_finite = own_loss_is_finite and bool(losses_K.isfinite().all())

        def find() -> Findings:
            gradients, weights = non_finite(self.chunks)
            return Findings(
                not own_loss_is_finite, not self.own_gradients_are_finite, gradients, weights
            )

        action = self.guard.judge(self.step, float(losses_K[0]), grad_norm, losses_are_finite, find)
        if action == Action.roll_back:
            raise RollBack(self.step, data, self.guard.events[-1]["reason"])
        if action == Action.skip:
            for bias, before in zip(self._router_biases(), self.biases, strict=True):
                bias.copy_(before)
            return math.nan
        num_zeros = apply_update(self.optimizer, grad_norm)
        self.precision.weights_changed()
        return num_zeros

    def _router_biases(self) -> list[torch.Tensor]:
        """The balancing biases of this rank's routers, which Megatron's finalization moves."""
        return [r.expert_bias for r in self.routers if r.expert_bias is not None]

    def _mean_losses(self, reports: list[torch.Tensor], targets_K: torch.Tensor) -> torch.Tensor:
        """Mean loss of each head over the global batch, on every rank: FP64 [K]."""
        sums_K = torch.stack(reports).double().sum(0) if reports else torch.zeros_like(targets_K)
        sum_over(sums_K, self.groups.dp_cp)
        sum_over(sums_K, self.groups.pp)  # only the last stage has reports
        return sums_K / targets_K.clamp(min=1)
