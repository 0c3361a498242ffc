"""The record of a precision plan in a checkpoint, and its digest.

Owns: the plan as plain values, and the digest that identifies a plan. Does not own: how a plan is
resolved (`resolve`), or what a run does if digests differ (`run_folder.lineage`). No torch.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from nemotron_train.config.json_text import json_text
from nemotron_train.plan.precision.resolve import LinearFormats, PrecisionPlan
from nemotron_train.plan.precision.rules import NVFP4_OPTIONS, ROLES

UNKNOWN: dict[str, Any] = {"name": "unknown", "digest": "unknown"}


def plan_record(plan: PrecisionPlan) -> dict[str, Any]:
    """The plan as JSON values: `name`, `digest`, `parameter_dtype`, and `phases`, each with
    `from_tokens` and `linears` (module path -> text of its formats).

    The digest (SHA-256) covers everything except the name. Two sets of rules that give every linear
    the same formats at the same tokens are the same plan.
    """
    resolved = {
        "parameter_dtype": plan.parameter_dtype.value,
        "phases": [
            {
                "from_tokens": phase.from_tokens,
                "linears": {path: _words(formats) for path, formats in phase.formats.items()},
            }
            for phase in plan.phases
        ],
    }
    canonical = json_text(resolved, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return {"name": plan.name, "digest": digest, **resolved}


def label(record: Mapping[str, Any]) -> str:
    """Text for a plan in messages: the name and the first 12 digits of the digest."""
    return f"{record['name']} ({record['digest'][:12]})"


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Text for a change of plans in messages; one label if the plan stays."""
    if before["digest"] == after["digest"]:
        return f"{label(after)}, unchanged"
    return f"{label(before)} -> {label(after)}"


def _words(formats: LinearFormats) -> str:
    products = [f"{role}={getattr(formats, role)}" for role in ROLES]
    return " ".join([*products, *(option for option in NVFP4_OPTIONS if getattr(formats, option))])
