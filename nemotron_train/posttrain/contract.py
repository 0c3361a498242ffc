"""The contract between trainer and sampler: their log-probabilities of a sampled token agree.

Both use one model object and differ in arithmetic alone: the chunked scan against the recurrence,
many rows in a product against a few. Its measured size is far below the bounds. A larger gap is a
fault of the program or the machine, and training on would follow a wrong gradient, so the run
stops. Peers plot the gap, or mask the tokens.

Owns: the bounds and the message. Does not own: the measure (`correction.largest_gap`). No torch.
"""

from collections.abc import Sequence

from nemotron_train.config.schema import GemmFormat
from nemotron_train.plan.precision.resolve import PrecisionPlan
from nemotron_train.posttrain.correction import Gap

# Nats. Measured: 1e-5 in FP32, 0.04 in BF16, 0.02 with NVFP4 when each token has its own scales.
_BOUNDS = {GemmFormat.float32: 1e-3, GemmFormat.bf16: 0.15}
_BLOCK_SCALED_BOUND = 0.3


def default_bound(plan: PrecisionPlan) -> float:
    """The largest gap in nats that the arithmetic of a precision plan may cause."""
    formats = {
        form
        for phase in plan.phases
        for linear in phase.formats.values()
        for form in (linear.fprop,)
    }
    return max(_BOUNDS.get(form, _BLOCK_SCALED_BOUND) for form in formats)


def broken(gaps: Sequence[tuple[Gap | None, str]], bound: float) -> str:
    """What breaks the contract, as one line; empty if nothing does.

    gaps: of each rank, the largest gap and a text for its token.
    """
    found = [(gap, text) for gap, text in gaps if gap is not None and not gap.size <= bound]
    if not found:
        return ""
    gap, text = max(found, key=lambda entry: entry[0].size)
    return (
        f"trainer and sampler disagree by {gap.size:.4g} nats on {text}; contract_bound is "
        f"{bound:g}: both read the same weights, so this is a fault of a kernel or of this program"
    )
