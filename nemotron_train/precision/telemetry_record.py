"""The numbers of a telemetry record: their names, and how they follow from what was counted.

Owns: the names under which operands are measured, the bins of block scales, sums -> numbers. Does
not own: counting (`telemetry`), the file (`run_folder.metrics`). No torch: reports read records
too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_train.config.schema import GemmFormat

FORMATS = (GemmFormat.nvfp4, GemmFormat.mxfp8)

# The two operands of each product, as it takes them: wgrad's after the Hadamard transform.
OPERANDS_OF = {
    "fprop": ("fprop_activation", "fprop_weight"),
    "dgrad": ("dgrad_gradient", "dgrad_weight"),
    "wgrad": ("wgrad_gradient", "wgrad_activation"),
}
OPERANDS = tuple(name for pair in OPERANDS_OF.values() for name in pair)

# Blocks by their scale. NVFP4, whose scales are E4M3 numbers: a block of zeros; a scale that
# rounded to zero; a subnormal scale; 2^-6 <= scale < 2^-5; ...; 2^8 and more. MXFP8, whose scales
# are powers of two: a block of zeros; more than 15 powers below the tensor's largest scale; 15;
# ...; 0.
NUM_BINS = 18
# Non-zero elements, those made zero, those clipped; squares of the elements, of their errors.
NUM_COUNTS = 5
NUM_SUMS = NUM_COUNTS + NUM_BINS


def operand_numbers(sums: Sequence[float], amax: float) -> dict[str, float | list[int]]:
    """What is recorded of one operand, from the NUM_SUMS sums over all that was measured.

    `relative_error`: sqrt(sum of squared errors / sum of squares), 0 of zeros; `snr_db` the same
    as a signal-to-noise ratio, 10 log10(signal / noise): infinite where nothing is lost. Both
    rates are shares of the elements that are not zero.
    """
    nonzero, flushed, saturated, signal, noise = sums[:NUM_COUNTS]
    share = noise / signal if signal else 0.0
    return {
        "flush_to_zero": _rounded(flushed / max(nonzero, 1)),
        "saturated": _rounded(saturated / max(nonzero, 1)),
        "relative_error": _rounded(math.sqrt(share)),
        "snr_db": _rounded(-10 * math.log10(share)) if share else math.inf,
        "amax": _rounded(amax),
        "scale_histogram": [round(count) for count in sums[NUM_COUNTS:]],
    }


def flush_rates(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`flush_to_zero/PATH/OPERAND` of every operand that training itself quantizes: the numbers of
    a record that W&B and TensorBoard can draw."""
    return {
        f"flush_to_zero/{path}/{operand}": module[form][operand]["flush_to_zero"]
        for path, module in modules.items()
        for product, form in module["formats"].items()
        if form in FORMATS
        for operand in OPERANDS_OF[product]
    }


def _rounded(value: float) -> float:
    """Six digits: a record of a large model has ten thousand of these."""
    return float(f"{value:.6g}")
