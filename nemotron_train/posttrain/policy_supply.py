"""What a step of reinforcement learning trains on: rollouts of the trainer's own model.

Owns: the order of a step before its forward pass, the ranks' shares, metrics. Does not own:
rollouts (`sampler`), formulas (`advantage`, `correction`, `objective`), files (`rollout_files`),
the forward pass, the update and the guard (`train.train_step`).

A step, counted from 1, has the rollouts of the step f <= step that began its round of `updates`
steps. Prompts are divided over the data-parallel ranks, all samples of a prompt on one rank. Every
draw is keyed by the number of its rollout, so neither the ranks nor a restart change the rollouts.

Shapes: B rows, S places of a row, K heads (the main head and one per MTP depth).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemotron_train.config.errors import ConfigError, TrainingFailed
from nemotron_train.config.grpo import GrpoConfig
from nemotron_train.config.grpo_knobs import CurriculumKind
from nemotron_train.data.batches import Batch
from nemotron_train.data.chat.render import ChatFormat
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import DecodingKnobs, Sampling
from nemotron_train.generate.speculative import Acceptance
from nemotron_train.posttrain.advantage import (
    Advantages,
    Outcome,
    advantage_metrics,
    compute_advantages,
)
from nemotron_train.posttrain.contract import broken, default_bound
from nemotron_train.posttrain.correction import (
    Correction,
    Gap,
    TokenPairs,
    correct,
    correction_metrics,
    largest_gap,
)
from nemotron_train.posttrain.curriculum import rate_mean
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.objective import denominator
from nemotron_train.posttrain.policy_rows import PolicyRows, pack_rollouts
from nemotron_train.posttrain.policy_tokens import TrainedTokens, log_probabilities, unknown_ids
from nemotron_train.posttrain.pool import Pool
from nemotron_train.posttrain.rollout import Rollout, outcome_of
from nemotron_train.posttrain.rollout_files import RolloutFiles
from nemotron_train.posttrain.rollout_metrics import merged, rollout_metrics
from nemotron_train.posttrain.sampler import Sampler
from nemotron_train.run_folder.progress import Progress
from nemotron_train.train.global_batch import count_targets
from nemotron_train.train.supply import StepBatch
from nemotron_train.train.trainer import Trainer


class PolicySupply:
    """The supply of a run of `posttrain grpo`. COLLECTIVE.

    Raises TrainingFailed if trainer and sampler break their contract, and ConfigError if a prompt
    does not fit or a file of an earlier step, which a resumed run needs, is missing.
    """

    def __init__(
        self, trainer: Trainer, pool: Pool, scoring: Scoring, chat: ChatFormat, end_token: int
    ) -> None:
        self._trainer = trainer
        self._knobs: GrpoConfig = trainer.config.grpo
        self._pool = pool
        self._chat = chat
        self._group = trainer.groups.dp
        if self._knobs.prompts < self._group.size():
            raise ConfigError(
                f"prompts={self._knobs.prompts}: the {self._group.size()} data-parallel ranks need "
                "one each"
            )
        self._device = trainer.platform.device
        self._length = trainer.config.train.sequence_length
        self._padding_id = end_token
        self._unknown_V = unknown_ids(
            chat.tokenizer.known_ids, trainer.config.model.vocab_size, self._device
        )
        self._bound = self._knobs.contract_bound or default_bound(trainer.derived.plan)
        model: Any = trainer.chunks[0].module
        # Ranks with other prompts decode on their own.
        engine = Engine(
            model, end_token, self._device, chat.tokenizer.known_ids, agree=lambda tokens: tokens
        )
        decoding = DecodingKnobs(
            max_new_tokens=self._knobs.max_new_tokens,
            batch=self._knobs.batch,
            speculative=self._knobs.drafts,
        )
        self._sampler = Sampler(engine, chat, scoring, decoding, self._length + 1, self._knobs)
        self._sampling = Sampling(seed=trainer.config.train.seed, coupled=self._knobs.drafts)
        self._files = RolloutFiles(trainer.run_folder, self._knobs.keep_rollouts)
        self._round: tuple[int, list[Rollout], PolicyRows] | None = None

    def __call__(self, progress: Progress) -> StepBatch:
        """The batch of the step after `progress`."""
        step, knobs = progress.step + 1, self._knobs
        first = step - (step - 1) % knobs.updates
        self._enter(progress)
        measured: dict[str, float] = {}
        if self._round is None or self._round[0] != first:
            self._round = self._begin_round(first, step, measured)
        _, rollouts, rows = self._round
        if step == first:
            started = time.perf_counter()
            previous_BS = log_probabilities(self._trainer, rows, self._unknown_V)
            measured["contract_seconds"] = time.perf_counter() - started
        else:
            previous_BS = _recorded(rollouts, rows)
        pairs = _pairs(rows, previous_BS)
        if step == first:
            self._check_contract(step, first, rollouts, pairs)
        correction = correct(pairs, knobs)
        outcomes = [outcome_of(rollout) for rollout in rollouts]
        advantages = compute_advantages(outcomes, knobs)
        if knobs.heal:  # the main head has no loss; the depths have that of all sampled tokens
            advantages = replace(advantages, weight=np.zeros_like(advantages.weight))
        if step == first:
            rollouts = _with_results(rollouts, rows, previous_BS, advantages)
            self._round = (first, rollouts, rows)
            self._files.write(first, self._gathered(rollouts))
        metrics = self._metrics(rollouts, outcomes, advantages, pairs, correction, measured, first)
        return self._batch(progress, rows, previous_BS, correction, advantages, metrics)

    def _enter(self, progress: Progress) -> None:
        """Bring the precision to the phase of the step, with scales of each token: the sampler's
        results then do not depend on what is decoded beside a sequence, and the trainer's are the
        same."""
        precision: Any = self._trainer.precision
        if hasattr(precision, "set_per_token_scales"):
            precision.enter_phase(progress.tokens)
            precision.set_per_token_scales(True)

    def _begin_round(
        self, first: int, step: int, measured: dict[str, float]
    ) -> tuple[int, list[Rollout], PolicyRows]:
        """The rollouts of the round that begins with step `first`: sampled now, or by an earlier
        step or process."""
        lag = self._knobs.lag
        # With `lag`, only the first round is sampled with the weights that it trains.
        if step > first or (lag and first > 1):
            rollouts = self._files.read(first, *self._share())
        else:
            rollouts = self._sample(first, first, measured)
        ahead = first + self._knobs.updates
        last = self._knobs.steps
        if lag and ahead <= last and not self._files.exists(ahead):
            self._sample(ahead, first, measured)
        sizes = [0] * self._group.size()
        rows = self._rows(rollouts, 0)
        dist.all_gather_object(sizes, len(rows.tokens_BS), group=self._group)
        if max(sizes) > len(rows.tokens_BS):
            rows = self._rows(rollouts, max(sizes))
        return first, rollouts, rows

    def _rows(self, rollouts: Sequence[Rollout], least: int) -> PolicyRows:
        rows = self._trainer.config.train.micro_batch_sequences
        return pack_rollouts(rollouts, self._length, rows, self._padding_id, least)

    def _place(self, first: int) -> tuple[int, int]:
        """The number of the round that begins with step `first`, from 0, and of all rounds."""
        return (first - 1) // self._knobs.updates, self._knobs.steps // self._knobs.updates

    def _share(self) -> tuple[int, int]:
        return self._group.rank(), self._group.size()

    def _sample(self, first: int, now: int, measured: dict[str, float]) -> list[Rollout]:
        """Sample this rank's rollouts of the round `first` with the weights before step `now`, and
        write those of all ranks."""
        knobs = self._knobs
        number, rounds = self._place(first)
        rank, ranks = self._share()
        state = self._files.curriculum(first - knobs.updates)
        drawn = self._pool.draw(state, number, rounds)
        started = time.perf_counter()
        acceptance = self._sampler.engine.acceptance = Acceptance()
        rollouts = self._sampler.rollouts(
            drawn[rank::ranks],
            knobs.samples,
            self._sampling,
            number * knobs.prompts * knobs.samples,
            range(len(drawn))[rank::ranks],
        )
        rollouts = [replace(rollout, policy_version=now - 1) for rollout in rollouts]
        measured["rollout_seconds"] = time.perf_counter() - started
        for depth, rate in enumerate(acceptance.rates, 1):
            measured[f"mtp_acceptance_{depth}"] = rate
        # What was cached in inference mode cannot be used in a backward pass.
        self._trainer.precision.weights_changed()
        for chunk in self._trainer.chunks:
            chunk.train()
        everything = self._gathered(rollouts)
        self._files.write(first, everything)
        outcomes = [
            (r.row.environment, r.row.id, int(r.score.reward is not None), int(r.passed))
            for r in everything
        ]
        self._files.observe(first, first - knobs.updates, outcomes)
        return rollouts

    def _gathered(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts of all ranks, in the order of their numbers."""
        if self._group.size() == 1:
            return rollouts
        parts: list[list[Rollout]] = [[] for _ in range(self._group.size())]
        dist.all_gather_object(parts, rollouts, group=self._group)
        return sorted((r for part in parts for r in part), key=lambda rollout: rollout.sequence)

    def _check_contract(
        self, step: int, first: int, rollouts: Sequence[Rollout], pairs: TokenPairs
    ) -> None:
        """Raises TrainingFailed on all ranks if the contract is broken on one. Not with `lag`: the
        trainer's weights are then others than the sampler's."""
        if self._knobs.lag and rollouts and rollouts[0].policy_version != first - 1:
            return
        worst = largest_gap(pairs)
        text = "" if worst is None else self._describe(worst, rollouts)
        gaps: list[tuple[Gap | None, str]] = [(None, "")] * self._group.size()
        dist.all_gather_object(gaps, (worst, text), group=self._group)
        if message := broken(gaps, self._bound):
            raise TrainingFailed(f"step {step}: {message}")

    def _describe(self, gap: Gap, rollouts: Sequence[Rollout]) -> str:
        rollout = rollouts[gap.sequence]
        token = self._chat.tokenizer.decode([gap.token])
        return (
            f"token {gap.position} ({token!r}) of rollout {rollout.sequence} "
            f"({rollout.row.id} #{rollout.sample})"
        )

    def _metrics(
        self,
        rollouts: Sequence[Rollout],
        outcomes: Sequence[Outcome],
        advantages: Advantages,
        pairs: TokenPairs,
        correction: Correction,
        measured: dict[str, float],
        first: int,
    ) -> dict[str, Any]:
        """Metrics of the global batch, the same on every rank."""
        own = rollout_metrics(rollouts) | advantage_metrics(outcomes, advantages)
        right = {number: rollout.passed for number, rollout in enumerate(rollouts)} | {-1: False}
        names = {number: r.row.environment for number, r in enumerate(rollouts)}
        of_tokens = correction_metrics(pairs, correction, right, names | {-1: "padding"})
        metrics = merged(own, len(rollouts), self._group)
        tokens = {name: v for name, v in of_tokens.items() if not name.endswith("/padding")}
        metrics |= merged(tokens, int(pairs.trained.sum()), self._group)
        if self._knobs.curriculum is CurriculumKind.gaussian:
            metrics["rate_mean"] = rate_mean(self._knobs, *self._place(first))
        if "rollout_seconds" in measured:
            count = self._knobs.prompts * self._knobs.samples
            metrics["rollouts_per_second"] = count / measured["rollout_seconds"]
        return metrics | measured

    def _batch(
        self,
        progress: Progress,
        rows: PolicyRows,
        previous_BS: np.ndarray,
        correction: Correction,
        advantages: Advantages,
        metrics: dict[str, Any],
    ) -> StepBatch:
        """The global batch with everything that its loss needs."""
        shape, index_BS = rows.rollout_BS.shape, rows.rollout_BS
        padded = np.append(advantages.weight, 0.0), np.append(advantages.advantage, 0.0)
        weight_BS, advantage_BS = padded[0][index_BS], padded[1][index_BS]
        counted_BS = correction.counted.reshape(shape) & (weight_BS > 0)
        tokens = TrainedTokens(
            rows,
            advantage_BS,
            correction.weight.reshape(shape) * weight_BS,
            previous_BS,
            self._knobs,
            self._unknown_V,
        )
        heads = 1 + self._trainer.config.model.mtp.depths
        counts = [float(counted_BS.sum()), float(len(np.unique(index_BS[counted_BS])))]
        counts += [float(rows.tokens_BS.size), *count_targets(rows, heads)[1:]]
        summed = torch.tensor(counts, dtype=torch.float64, device=self._device)
        if self._group.size() > 1:
            dist.all_reduce(summed, group=self._group)
        num_tokens, num_sequences, places = (int(value) for value in summed[:3].tolist())
        divisor = denominator(self._knobs, num_tokens, num_sequences)
        targets_K = torch.cat([torch.tensor([divisor]).to(summed), summed[3:]])
        metrics["trained_tokens"] = num_tokens

        def split(batch: Batch, num_rows: int, device: str) -> Any:
            return tokens.micro_batches(num_rows, device)

        return StepBatch(
            rows,
            progress.data,
            targets_K,
            places,
            split=split,
            metrics=metrics,
            measure=lambda: tokens.measures(self._group),
            is_loss=False,
        )


def _pairs(rows: PolicyRows, trainer_BS: np.ndarray) -> TokenPairs:
    return TokenPairs(
        trainer=trainer_BS.ravel(),
        sampler=rows.sampler_BS.ravel(),
        sequence=rows.rollout_BS.ravel(),
        trained=rows.trained_BS.ravel(),
        token=rows.labels_BS.ravel(),
    )


def _with_results(
    rollouts: Sequence[Rollout],
    rows: PolicyRows,
    trainer_BS: np.ndarray,
    advantages: Advantages,
) -> list[Rollout]:
    """The rollouts with what the trainer made of them, for their file."""
    values: list[list[float]] = [[] for _ in rollouts]
    trained_BS = rows.trained_BS
    for number, value in zip(
        rows.rollout_BS[trained_BS].tolist(), trainer_BS[trained_BS].tolist(), strict=True
    ):
        values[number].append(value)
    return [
        replace(
            rollout,
            trainer_log_probabilities=values[number],
            advantage=float(advantages.advantage[number]),
            weight=float(advantages.weight[number]),
        )
        for number, rollout in enumerate(rollouts)
    ]


def _recorded(rollouts: Sequence[Rollout], rows: PolicyRows) -> np.ndarray:
    """The trainer's log-probabilities before the first update of the round, FP64 [B,S], from the
    rollouts. A rollout's places follow each other in one row."""
    recorded_BS = np.zeros(rows.rollout_BS.shape)
    for number, rollout in enumerate(rollouts):
        places = (rows.rollout_BS == number) & rows.trained_BS
        recorded_BS[places] = rollout.trainer_log_probabilities
    return recorded_BS
