"""Groups of the metrics in metrics.jsonl, and which metrics are timings. No torch.

Owns: the groups, in display order. The HTML report has one section per group. W&B and TensorBoard
make a section of the text before the first slash, so they get GROUP/NAME. Does not own: the meaning
of the metrics (docs/metrics.md).
"""

import fnmatch

# Group -> title, and patterns of metric names.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "loss": ("Loss", ("loss", "mtp_loss_*", "validation_loss", "validation_mtp_loss_*")),
    "policy": (
        "Policy",
        (
            *("reward", "reward/*", "pass", "pass/*", "groups_*", "advantage_*", "entropy"),
            *("rate_mean", "trained_tokens"),
        ),
    ),
    "rollouts": (
        "Rollouts",
        (
            *("response_tokens_*", "thinking_tokens", "answer_tokens", "truncated", "malformed"),
            *(
                "invalid_calls",
                "forced_closes",
                "mtp_acceptance_*",
                "turns",
                "turns_reached",
                "timeouts",
                "errors",
            ),
        ),
    ),
    "correction": (
        "Trainer against sampler",
        (
            *("logprob_error", "logprob_gap_max", "gen_kl", "train_kl", "js", "importance_*"),
            *("effective_samples", "masked_*", "trained_correct", "trained_correct/*"),
            *("ratio_*", "clip_low", "clip_high", "kl_reference"),
        ),
    ),
    "precision": ("Precision", ("flush_to_zero/*", "zero_weight_gradients")),
    "experts": ("Experts", ("max_vio", "max_vio/*", "expert_load/*", "load_balance_loss")),
    "norms": ("Gradients and residuals", ("grad_norm", "gradient_norm/*", "residual_rms/*")),
    "speed": (
        "Speed",
        (
            *("tokens_per_second", "model_flops_utilization", "step_seconds", "step_time/*"),
            *("slowest_rank", "straggler_ratio"),
            *("rollouts_per_second", "rollout_seconds", "contract_seconds"),
        ),
    ),
    "progress": ("Progress", ("tokens", "lr", "time", "skipped_updates")),
}
OTHER = "other"

_TIMINGS = ("time", "tokens_per_second", "step_seconds", "step_time/*", "model_flops_utilization")
_TIMINGS += ("slowest_rank", "straggler_ratio", "rollouts_per_second", "rollout_seconds")
_TIMINGS += ("contract_seconds",)


def group_of(name: str) -> str:
    """Group of a metric; `other` if it matches no group."""
    for group, (_, patterns) in GROUPS.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return group
    return OTHER


def grouped(name: str) -> str:
    """GROUP/NAME, the metric's name for W&B and TensorBoard."""
    return f"{group_of(name)}/{name}"


def is_timing(name: str) -> bool:
    """Whether a metric is a timing. Timings differ between otherwise equal runs."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _TIMINGS)
