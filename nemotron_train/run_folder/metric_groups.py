"""Which group a number of metrics.jsonl belongs to, and which numbers are of the clock. No torch.

Owns: the groups, in the order a person reads them. The report's page has a section for each; W&B
and TensorBoard show a section for what stands before the first slash, so they get GROUP/NAME. Does
not own: what the numbers are (docs/metrics.md).
"""

import fnmatch

# Group -> its title, and patterns of its names.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "loss": ("Loss", ("loss", "mtp_loss_*", "validation_loss", "validation_mtp_loss_*")),
    "precision": ("Precision", ("flush_to_zero/*", "zero_weight_gradients")),
    "experts": ("Experts", ("max_vio", "max_vio/*", "expert_load/*", "load_balance_loss")),
    "norms": ("Gradients and residuals", ("grad_norm", "gradient_norm/*", "residual_rms/*")),
    "speed": (
        "Speed",
        (
            *("tokens_per_second", "model_flops_utilization", "step_seconds", "step_time/*"),
            *("slowest_rank", "straggler_ratio"),
        ),
    ),
    "progress": ("Progress", ("tokens", "lr", "time", "skipped_updates")),
}
OTHER = "other"

_TIMINGS = ("time", "tokens_per_second", "step_seconds", "step_time/*", "model_flops_utilization")
_TIMINGS += ("slowest_rank", "straggler_ratio")


def group_of(name: str) -> str:
    """The group of a number; `other` for one that is in none."""
    for group, (_, patterns) in GROUPS.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return group
    return OTHER


def grouped(name: str) -> str:
    """A number's name where groups are told by what stands before the first slash."""
    return f"{group_of(name)}/{name}"


def is_timing(name: str) -> bool:
    """Whether a number is of the clock: no two runs agree there."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _TIMINGS)
