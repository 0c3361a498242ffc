"""The knobs of `posttrain grpo`. No torch, no logic.

A run with `grpo.steps` above 0 is one of reinforcement learning: its steps train on rollouts of its
own model, not on `data`.
"""

from dataclasses import dataclass, field

from nemotron_train.config.environments import EnvironmentConfig, ScoringConfig
from nemotron_train.config.grpo_knobs import (
    AdvantageKnobs,
    CorrectionKnobs,
    CurriculumKnobs,
    ObjectiveKnobs,
)


@dataclass
class GrpoConfig(AdvantageKnobs, CorrectionKnobs, ObjectiveKnobs, CurriculumKnobs, ScoringConfig):
    """Rollouts, and how they are trained on."""

    steps: int = 0  # optimizer steps of the run; 0: not a run of reinforcement learning
    prompts: int = 16  # tasks of a step
    samples: int = 8  # rollouts of each task
    updates: int = 1  # optimizer steps on the rollouts of one; above 1 needs ratio=clipped
    lag: int = 0  # 1: train on the rollouts of the policy of one step before
    # By name; empty: the six families with equal ratios.
    environments: dict[str, EnvironmentConfig] = field(default_factory=dict)
    pool: int = 2000  # generated tasks of each environment
    max_new_tokens: int = 160  # of a rollout, with what the environment says
    batch: int = 64  # sequences decoded together
    heal: bool = False  # train the MTP block alone, on the rollouts of a policy that stays
    drafts: bool = False  # draft with the multi-token-prediction block
    # Largest difference of the two log-probabilities of a token; 0: by the precision plan.
    contract_bound: float = 0.0
    keep_rollouts: int = 0  # files of rollouts to keep, the newest; 0: all
