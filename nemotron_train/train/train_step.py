"""One optimizer step: micro-batches through Megatron's schedule, gradient reduction, AdamW.

Loss scaling: the loss of a head is its mean over the counted targets of the whole global batch. The
number of targets is known before the forward pass, so the summed loss of head k is multiplied by
`weight_k / targets_k`. Megatron divides all gradients by the number of tokens of the global batch
at the end. The weights passed to Megatron are multiplied by that number in advance to cancel it.

Shapes: B rows per micro-batch, S tokens per row, K heads (the main head and one per MTP depth),
L MoE layers, E experts.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from nemotron_train.config.schema import Config, ModelConfig
from nemotron_train.data.batches import Batch
from nemotron_train.model.moe.router import SigmoidRouter
from nemotron_train.optim.build import set_learning_rate
from nemotron_train.optim.schedule import learning_rate
from nemotron_train.optim.update import apply_update, gradient_norm
from nemotron_train.plan.derive import Derived
from nemotron_train.platform.device import wait_for_device
from nemotron_train.platform.groups import sum_over
from nemotron_train.precision.attach import PrecisionControl
from nemotron_train.precision.native import NativePrecision
from nemotron_train.run_folder.progress import Progress, StepResult
from nemotron_train.train.global_batch import Tensors, micro_batches
from nemotron_train.train.guard.diagnose import gradients_are_finite, non_finite
from nemotron_train.train.guard.guard import Action, Findings, Guard, RollBack
from nemotron_train.train.guard.health import Health
from nemotron_train.train.guard.stragglers import Stragglers
from nemotron_train.train.step_clock import StepClock
from nemotron_train.train.supply import StepBatch, Supply


def head_weights(config: Config) -> np.ndarray:
    """Weight of each head's mean loss in the total loss: [K].

    1 for the main head, `loss_scale / depths` for each MTP depth.
    """
    mtp = config.model.mtp
    return np.array([1.0] + [mtp.loss_scale / max(mtp.depths, 1)] * mtp.depths)


def forward_step(
    iterator: Iterator[Tensors], model: Any, weights_K: torch.Tensor | None = None
) -> tuple:
    """Megatron's `forward_step_func`: run one micro-batch, return the output and a loss function.

    The model's output on the last pipeline stage is the summed loss of each head, [K].
    """
    batch = next(iterator)
    output = model(**batch)

    def loss(sums_K: torch.Tensor) -> tuple:
        """Return what Megatron expects: loss to differentiate, number of tokens, report."""
        # Megatron sums the token counts over context-parallel ranks too, and these share the rows.
        local_tokens = batch["tokens_BS"].numel() // model.config.context_parallel_size
        num_tokens = torch.full((), local_tokens, dtype=torch.int, device=sums_K.device)
        total = sums_K.sum() if weights_K is None else (sums_K * weights_K).sum()
        return total, num_tokens, sums_K.detach()

    return output, loss


def run_micro_batches(
    chunks: Sequence[DistributedDataParallel],
    forward_step: Callable[..., tuple],
    batch: Batch,
    config: Config,
    device: str,
    forward_only: bool,
    split: Callable[[Batch, int, str], Iterator[Tensors]] = micro_batches,
) -> list[torch.Tensor]:
    """Run this rank's rows through Megatron's schedule: no pipeline, 1F1B or interleaved 1F1B.

    Runs the forward pass of every micro-batch and, unless `forward_only`, the backward pass. split:
    makes micro-batches of rows. COLLECTIVE. Returns the loss sums [K] of each micro-batch on ranks
    of the last pipeline stage, and an empty list on other ranks.
    """
    length = batch.tokens_BS.shape[1]
    # With shorter rows, a micro-batch takes more of them: its number of tokens stays the same.
    rows = config.train.micro_batch_sequences * (config.train.sequence_length // length)
    iterators = [split(batch, rows, device) for _ in chunks]
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
    """Module paths of all MoE layers of the model, including layers on other ranks."""
    decoder = model.pattern.replace("|", "")
    names = [f"decoder.layers.{i}" for i, letter in enumerate(decoder) if letter == "E"]
    if model.mtp.depths:
        block = "mtp.layers.0.mtp_model_layer.layers"
        names += [f"{block}.{i}" for i, letter in enumerate(model.mtp.pattern) if letter == "E"]
    return names


def moe_layer_name(router: SigmoidRouter) -> str:
    """Name of the layer that `router` belongs to, as listed by `moe_layer_names`."""
    block = "mtp.layers.0.mtp_model_layer" if router.is_mtp_layer else "decoder"
    assert router.layer_number is not None
    return f"{block}.layers.{router.layer_number - 1}"


class TrainStep:
    """Callable that takes one optimizer step.

    Owns: the order of operations in a step, and the step's metrics. Does not own: the position in
    the run (`Progress`, passed in and returned), what is trained on (`supply`), the decision about
    the update (`guard`).

    `_finalize_gradients` runs inside `run_micro_batches`: Megatron calls it after the last backward
    pass.
    """

    def __init__(
        self,
        config: Config,
        derived: Derived,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        supply: Supply,
        groups: ProcessGroupCollection,
        device: str,
        precision: PrecisionControl | NativePrecision,
        guard: Guard,
    ) -> None:
        self.config = config
        self.derived = derived
        self.chunks = chunks
        self.optimizer = optimizer
        self.supply = supply
        self.groups = groups
        self.device = device
        self.precision = precision
        self.guard = guard
        self.weights = head_weights(config)
        self.clock = StepClock()
        self.routers = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, SigmoidRouter)
        ]
        self.bias_names = [
            f"{moe_layer_name(router)}.mlp.router.expert_bias"
            for router in self.routers
            if router.expert_bias is not None
        ]
        self.moe_layers = moe_layer_names(config.model)
        megatron_config: Any = chunks[0].config  # one object, shared by all chunks
        megatron_config.finalize_model_grads_func = self._finalize_gradients
        no_sync = [chunk.no_sync for chunk in chunks]
        megatron_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        megatron_config.grad_scale_func = optimizer.scale_loss
        self.health = Health(config, chunks, groups, device)
        straggler_every = config.guard.straggler_every
        straggler_ratio = config.guard.straggler_ratio
        self.local_gradients_are_finite = torch.tensor(True)
        self.stragglers = Stragglers(straggler_every, straggler_ratio, device)
        # UPSTREAM(megatron-core 0.19.2): this scale is a global of the process. An earlier user
        # (evaluation, another model) may leave a scale whose shape does not match ours.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's `finalize_model_grads_func`: reduce the gradients over ranks. COLLECTIVE.

        First reads what Megatron's `finalize_model_grads` overwrites: router token counts, router
        biases, and whether the gradients of this rank alone are finite.
        """
        self.clock.lap("forward_backward")
        if self.stragglers.is_due(self.step):  # before the first collective, where ranks wait
            wait_for_device()  # SYNC: this rank's forward and backward passes are done
            self.local_work_ended = time.perf_counter()
        self.routing = self._routing_metrics()
        self.biases_before = [bias.clone() for bias in self._router_biases()]
        # With overlap, the reduction has already mixed the gradients of several ranks.
        if not self.config.parallel.overlap_gradient_reduce:
            self.local_gradients_are_finite = gradients_are_finite(self.chunks)
        finalize_model_grads(*args, **kwargs)
        self.precision.gradients_ready(self.chunks)
        self.clock.lap("gradient_reduce")

    def _routing_metrics(self) -> dict[str, torch.Tensor]:
        """Load-balance metrics of the MoE layers, the same on every rank. COLLECTIVE.

        MaxVio of each layer: load of the fullest expert / mean load (Ultra report, section 2.7).
        Also the largest MaxVio and the mean load-balance loss. On health steps, also each expert's
        share of the tokens, [E] per layer.
        """
        if not self.moe_layers:
            return {}
        # Row 0: MaxVio, row 1: load-balance loss. Columns of other pipeline stages stay zero.
        stats_2L = torch.zeros(2, len(self.moe_layers), device=self.device)
        shares_LE = torch.zeros(len(self.moe_layers), self.config.model.moe.experts).to(stats_2L)
        if self.routers:
            loads = torch.stack([router.local_tokens_per_expert for router in self.routers])
            sum_over(loads, self.groups.tp_dp_cp)
            losses = torch.stack([r.load_balance_loss_sum.float().to(loads) for r in self.routers])
            sum_over(losses, self.groups.tp_dp_cp)
            local_layers = [self.moe_layers.index(moe_layer_name(r)) for r in self.routers]
            stats_2L[0, local_layers] = loads.amax(1) / loads.mean(1).clamp(min=1e-9)
            stats_2L[1, local_layers] = losses / self.step_tokens
            shares_LE[local_layers] = loads.to(stats_2L) / loads.sum(1, keepdim=True).clamp(min=1)
            for router in self.routers:
                router.load_balance_loss_sum = torch.zeros((), device=loads.device)
        sum_over(stats_2L, self.groups.pp)  # each stage fills in its own layers
        metrics = {
            f"max_vio/{name}": value
            for name, value in zip(self.moe_layers, stats_2L[0], strict=True)
        }
        metrics["max_vio"] = stats_2L[0].amax()
        metrics["load_balance_loss"] = stats_2L[1].mean()
        if self.health.is_due(self.step):
            sum_over(shares_LE, self.groups.pp)
            loads_by_name = zip(self.moe_layers, shares_LE, strict=True)
            metrics |= {f"expert_load/{name}": shares_E for name, shares_E in loads_by_name}
        return metrics

    def __call__(self, progress: Progress) -> StepResult:
        """Train on the next global batch. COLLECTIVE.

        Raises RollBack if the guard rejects the step and asks to return to a checkpoint,
        TrainingFailed if it stops the run, and ConfigError, before any change of a weight, if the
        data has changed since it was opened.
        """
        started = time.perf_counter()
        self.step = progress.step + 1
        self.clock.begin()

        # Learning rate, batch and loss weights.
        tokens = progress.tokens + self.derived.tokens_per_step
        rate = learning_rate(tokens, self.config.optim, self.config.train.total_tokens)
        set_learning_rate(self.optimizer, rate, self.config.optim.weight_decay)
        supplied = self.supply(progress)
        self.step_tokens = supplied.tokens
        weights_K = torch.from_numpy(self.weights).to(self.device)
        weights_K = weights_K / supplied.targets_K.clamp(min=1)
        self.clock.lap("data")

        # Forward and backward passes, then gradient reduction (`_finalize_gradients`).
        self.precision.before_step(progress.step, progress.tokens)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.health.is_due(self.step):
            self.health.begin()
        weighted_step = partial(forward_step, weights_K=(weights_K * supplied.tokens).float())
        reports = run_micro_batches(
            self.chunks,
            weighted_step,
            supplied.batch,
            self.config,
            self.device,
            forward_only=False,
            split=supplied.split,
        )

        # Measurements, then the weight update, if the guard allows it.
        losses_K = self._mean_losses(reports, supplied.targets_K)
        grad_norm = gradient_norm(self.optimizer)
        diagnostics = self._diagnostics(started)
        num_zeros = self._update_weights(supplied, reports, losses_K, grad_norm)

        metrics: dict[str, Any] = {"loss": losses_K[0], "lr": rate, "grad_norm": grad_norm}
        for depth, loss in enumerate(losses_K[1:], start=1):
            metrics[f"mtp_loss_{depth}"] = loss
        metrics |= supplied.metrics | supplied.measure() | self.routing | diagnostics
        metrics["zero_weight_gradients"] = num_zeros
        metrics["skipped_updates"] = self.guard.skipped
        self.clock.lap("optimizer")
        next_progress = Progress(self.step, tokens, supplied.next_data)
        return StepResult(next_progress, metrics, time.perf_counter() - started)

    def _diagnostics(self, started: float) -> dict[str, Any]:
        """Metrics that are measured only every few steps: model health, stragglers. COLLECTIVE.

        started: `time.perf_counter()` at the start of the step.
        """
        metrics: dict[str, Any] = {}
        if self.health.is_due(self.step):
            self.health.end()
            metrics |= self.health.metrics()
        if self.stragglers.is_due(self.step):
            straggler_metrics, message = self.stragglers.measure(self.local_work_ended - started)
            metrics |= straggler_metrics
            if message:
                self.guard.report("straggler", self.step, message)
        return metrics

    def _update_weights(
        self,
        supplied: StepBatch,
        reports: list[torch.Tensor],
        losses_K: torch.Tensor,
        grad_norm: float,
    ) -> float:
        """Update the weights if the guard allows it. COLLECTIVE. SYNC.

        Returns the number of gradient elements that are zero, or NaN if the update was skipped.
        Raises RollBack or TrainingFailed.
        """
        local_loss_is_finite = bool(torch.stack(reports).isfinite().all()) if reports else True
        losses_are_finite = local_loss_is_finite and bool(losses_K.isfinite().all())

        def find() -> Findings:
            gradients, weights = non_finite(self.chunks)
            return Findings(
                not local_loss_is_finite, not self.local_gradients_are_finite, gradients, weights
            )

        loss = float(losses_K[0]) if supplied.is_loss else 0.0
        action = self.guard.judge(self.step, loss, grad_norm, losses_are_finite, find)
        if action == Action.roll_back:
            raise RollBack(self.step, supplied.next_data, self.guard.events[-1]["reason"])
        is_skipped = action == Action.skip
        biases = zip(self._router_biases(), self.biases_before, self.bias_names, strict=True)
        for bias, bias_before, name in biases:  # Megatron has updated them already
            if is_skipped or any(fnmatchcase(name, p) for p in self.config.train.frozen):
                bias.copy_(bias_before)
        if is_skipped:
            return math.nan
        num_zeros = apply_update(self.optimizer, grad_norm)
        self.precision.weights_changed()
        return num_zeros

    def _router_biases(self) -> list[torch.Tensor]:
        """Load-balancing biases of this rank's routers. `finalize_model_grads` updates them."""
        return [router.expert_bias for router in self.routers if router.expert_bias is not None]

    def _mean_losses(self, reports: list[torch.Tensor], targets_K: torch.Tensor) -> torch.Tensor:
        """Mean loss of each head over the global batch, on every rank: FP64 [K]. COLLECTIVE."""
        sums_K = torch.stack(reports).double().sum(0) if reports else torch.zeros_like(targets_K)
        sum_over(sums_K, self.groups.dp_cp)
        sum_over(sums_K, self.groups.pp)  # only the last stage has reports
        return sums_K / targets_K.clamp(min=1)
