"""What a checkpoint remembers of the precision plan it was trained under, and its digest.

Owns: the plan as plain values, the digest that tells two plans apart. Does not own: how a plan is
resolved (`plan`), nor what a run does when the digests differ (`run_folder.lineage`). No torch.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nemotron_train.plan.precision.resolve import LinearFormats, PrecisionPlan
from nemotron_train.plan.precision.rules import NVFP4_OPTIONS, ROLES

UNKNOWN: dict[str, Any] = {"name": "unknown", "digest": "unknown"}


def plan_record(plan: PrecisionPlan) -> dict[str, Any]:
    """The plan as JSON values: `name`, `digest`, `parameter_dtype`, and for each phase
    `from_tokens` and `linears`, module path -> formats in words.

    The digest covers all but the name: two files of rules that give every linear the same formats
    at the same tokens are one plan.
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
    canonical = json.dumps(resolved, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return {"name": plan.name, "digest": digest, **resolved}


def label(record: Mapping[str, Any]) -> str:
    """A plan in a message: its name and the first digits of its digest."""
    return f"{record['name']} ({record['digest'][:12]})"


def _words(formats: LinearFormats) -> str:
    products = [f"{role}={getattr(formats, role)}" for role in ROLES]
    return " ".join([*products, *(option for option in NVFP4_OPTIONS if getattr(formats, option))])
