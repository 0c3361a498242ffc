"""Precision telemetry records of a run, and the kinds of linear that group them. No torch.

Owns: finding the records in metrics.jsonl, a short name for each kind of linear. Does not own: the
numbers in them (`precision.telemetry_record`).
"""

import re
from dataclasses import dataclass
from typing import Any

from nemotron_train.report.runs.read import Run

# Suffix of a module path -> kind, in the order of the forward pass.
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
    """One measured step. modules: module path -> `formats`, `zero_weight_gradients` and, under the
    name of each format, operand -> numbers (docs/metrics.md)."""

    step: int
    tokens: int
    modules: dict[str, dict[str, Any]]

    def number(self, path: str, form: str, operand: str, name: str) -> float | None:
        """One number; None if it was not measured or is not finite. `form`: a format's name."""
        return self.modules.get(path, {}).get(form, {}).get(operand, {}).get(name)


def telemetry_records(run: Run) -> list[TelemetryRecord]:
    """The records by ascending step; empty if telemetry was off or no linear is quantized."""
    return [
        TelemetryRecord(event["step"], event.get("tokens", 0), event["precision_telemetry"])
        for event in sorted(run.events, key=lambda event: event["step"])
        if event.get("precision_telemetry")
    ]


def kind_of(path: str) -> str:
    """The kind of a linear: `mamba_out` for decoder.layers.0.mixer.out_proj, in any layer and also
    in the multi-token-prediction block."""
    return next(kind for suffix, kind in KINDS.items() if path.endswith(suffix))


def layer_of(path: str) -> str:
    """The layer's number and letter, such as `0 M`; `mtp 0 M` in the multi-token-prediction block,
    and `mtp` for that block's projection."""
    match = re.search(r"layers\.(\d+)\.(mixer|self_attention|mlp)\.", path)
    prefix = "mtp " if path.startswith("mtp.") else ""
    letters = {"mixer": "M", "self_attention": "*", "mlp": "E"}
    return f"{prefix}{match[1]} {letters[match[2]]}" if match else prefix.strip()
