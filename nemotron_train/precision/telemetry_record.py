"""The numbers of a telemetry record: their names, and how the sums become numbers.

Owns: the names of the measured operands, the bins of block scales, sums -> numbers. Does not own:
counting (`telemetry`), the file (`run_folder.metrics`). No torch: reports read records too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_train.config.schema import GemmFormat

FORMATS = (GemmFormat.nvfp4, GemmFormat.mxfp8)

# The two operands of each product. Those of wgrad are measured after the Hadamard transform.
OPERANDS_OF = {
    "fprop": ("fprop_activation", "fprop_weight"),
    "dgrad": ("dgrad_gradient", "dgrad_weight"),
    "wgrad": ("wgrad_gradient", "wgrad_activation"),
}
OPERANDS = tuple(name for pair in OPERANDS_OF.values() for name in pair)

# Histogram of block scales. NVFP4 (E4M3 scales): block of zeros; scale rounded to zero; subnormal
# scale; 2^-6 <= scale < 2^-5; ...; scale >= 2^8. MXFP8 (power-of-two scales): block of zeros; more
# than 15 powers of two below the tensor's largest scale; 15 below; ...; 0 below.
NUM_BINS = 18
# Number of non-zero elements, flushed to zero, saturated; sums of squares of elements, of errors.
NUM_COUNTS = 5
NUM_SUMS = NUM_COUNTS + NUM_BINS


def operand_numbers(sums: Sequence[float], amax: float) -> dict[str, float | list[int]]:
    """The record of one operand, from its NUM_SUMS sums over everything measured.

    `relative_error`: sqrt(sum of squared errors / sum of squares), 0 for an operand of zeros.
    `snr_db`: the same as a signal-to-noise ratio, 10 log10(signal / noise), infinite if nothing is
    lost. `flush_to_zero` and `saturated` are shares of the non-zero elements.
    """
    nonzero, flushed, saturated, signal, noise = sums[:NUM_COUNTS]
    noise_ratio = noise / signal if signal else 0.0
    return {
        "flush_to_zero": _rounded(flushed / max(nonzero, 1)),
        "saturated": _rounded(saturated / max(nonzero, 1)),
        "relative_error": _rounded(math.sqrt(noise_ratio)),
        "snr_db": _rounded(-10 * math.log10(noise_ratio)) if noise_ratio else math.inf,
        "amax": _rounded(amax),
        "scale_histogram": [round(count) for count in sums[NUM_COUNTS:]],
    }


def flush_rates(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`flush_to_zero/PATH/OPERAND` of every operand that training itself quantizes: the scalars of
    a record that W&B and TensorBoard plot."""
    return {
        f"flush_to_zero/{path}/{operand}": module[form][operand]["flush_to_zero"]
        for path, module in modules.items()
        for product, form in module["formats"].items()
        if form in FORMATS
        for operand in OPERANDS_OF[product]
    }


def _rounded(value: float) -> float:
    """Six significant digits: a record of a large model has ten thousand such numbers."""
    return float(f"{value:.6g}")
