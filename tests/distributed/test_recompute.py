"""Whole runs with recomputation on two ranks, telemetry included: every number of metrics.jsonl
equals that of the same layout without it.

Second truth: the runs that keep everything. The emulated NVFP4 plan rounds stochastically. Not
covered: more than two ranks.
"""

from pathlib import Path

import pytest

from tests.distributed.test_telemetry import train

Small = tuple[Path, list[str]]
TELEMETRY = ["precision=nvfp4_all", "precision.telemetry.every=2"]
LAYOUTS = {
    "tensor": ["parallel.tensor=2", "parallel.sequence=true", *TELEMETRY],
    "pipeline": ["parallel.pipeline=2", "model.pattern=MEM|*EME", "precision=bf16"],
    "expert": ["parallel.expert=2", "precision=fp32"],
}
FULL = [f"train.recompute.{kind}=full" for kind in ("mamba", "attention", "moe")]
SELECTIVE = [knob.replace("full", "selective") for knob in FULL]


@pytest.mark.layouts
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_metrics(layout: str, small_run: Small) -> None:
    knobs = LAYOUTS[layout]
    kept = train(small_run, f"{layout}_kept", knobs, ranks=2)
    assert train(small_run, f"{layout}_full", [*knobs, *FULL], ranks=2) == kept
    if layout == "tensor":
        again = train(small_run, f"{layout}_selective", [*knobs, *SELECTIVE], ranks=2)
        assert again == kept
