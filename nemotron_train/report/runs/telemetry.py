"""Telemetry records of a run, and the kinds of linear they are grouped by. No torch.

Owns: finding the records among the lines of metrics.jsonl, a short name for each kind of linear.
Does not own: the numbers in them (`precision.telemetry_record`).
"""

import re
from dataclasses import dataclass
from typing import Any

from nemotron_train.report.runs.read import Run

# Ends of module paths -> kinds, in the order of a forward pass.
KINDS = {
    "mixer.in_proj": "mamba_in",
    "mixer.out_proj": "mamba_out",
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "attention_out",
    "mlp.fc1_latent_proj": "latent_in",
    "mlp.experts.linear_fc1": "experts_fc1",
    "mlp.experts.linear_fc2": "experts_fc2",
    "mlp.fc2_latent_proj": "latent_out",
    "mlp.shared_experts.linear_fc1": "shared_fc1",
    "mlp.shared_experts.linear_fc2": "shared_fc2",
    "eh_proj": "mtp_projection",
}


@dataclass(frozen=True)
class TelemetryRecord:
    """One measured step. modules: path -> `formats`, `zero_weight_gradients` and, under each
    format's name, operand -> numbers (docs/metrics.md)."""

    step: int
    tokens: int
    modules: dict[str, dict[str, Any]]

    def number(self, path: str, form: str, operand: str, name: str) -> float | None:
        """One number; None where it was not measured, or is not finite."""
        return self.modules.get(path, {}).get(form, {}).get(operand, {}).get(name)


def telemetry_records(run: Run) -> list[TelemetryRecord]:
    """By ascending step; empty where telemetry was off, or found nothing quantized."""
    return [
        TelemetryRecord(event["step"], event.get("tokens", 0), event["precision_telemetry"])
        for event in sorted(run.events, key=lambda event: event["step"])
        if event.get("precision_telemetry")
    ]


def kind_of(path: str) -> str:
    """`mamba_out` for decoder.layers.0.mixer.out_proj, whatever its layer; the same in the
    multi-token-prediction block."""
    return next(kind for end, kind in KINDS.items() if path.endswith(end))


def layer_of(path: str) -> str:
    """The layer's number in the decoder and its letter, `0 M`; with `mtp` before it for one of that
    block, and `mtp` alone for the projection."""
    found = re.search(r"layers\.(\d+)\.(mixer|self_attention|mlp)\.", path)
    prefix = "mtp " if path.startswith("mtp.") else ""
    letters = {"mixer": "M", "self_attention": "*", "mlp": "E"}
    return f"{prefix}{found[1]} {letters[found[2]]}" if found else prefix.strip()
