"""Run folders as runs write them, with made-up numbers."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.knobs import to_plain

HOSTILE = "<script>alert(1)</script>&\"'</style>]]><!--"


def make_run(folder: Path, *overrides: str, num_steps: int = 30, **about: Any) -> Path:
    """Writes a run folder as a run leaves it. `about` sets `machine`, `starts` and `name`."""
    folder.mkdir(parents=True)
    config = to_plain(compose_config(list(overrides)))
    config["name"] = about.get("name", folder.name)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, num_steps + 1):
        row = {"step": step, "tokens": 2048 * step, "loss": 3 + 5 / step, "lr": 1e-3}
        row |= {"time": 1000.0 + 60 * step, "grad_norm": 1.0 + step % 3, "tokens_per_second": 900.0}
        row |= {"max_vio": 1.5, "max_vio/decoder.layers.1": 1.5, "mtp_loss_2": 4.0}
        row |= {"step_time/data": 0.1, "step_time/forward_backward": 2.0, "a_new_number": 7.0}
        if step % 10 == 0:
            row |= {"validation_loss": 3.1, "expert_load/decoder.layers.1": [0.25] * 4}
        lines.append(json.dumps(row))
    lines.append(json.dumps({"kind": "spike", "step": 7, "policy": "report", "reason": HOSTILE}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    start = {"time": datetime.fromtimestamp(1000, UTC).isoformat(), "from_step": 0}
    start["machine"] = about.get("machine", {"device": "cpu", "block_formats": "emulated"})
    starts = about.get("starts", [start])
    (folder / "environment.json").write_text(json.dumps({"run_id": "a", "starts": starts}))
    saved = {"step": 20, "manifest": "0" * 64, "time": 2300.0}
    (folder / "checkpoints.jsonl").write_text(json.dumps(saved) + "\n")
    return folder
