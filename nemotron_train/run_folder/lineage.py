"""Lineage of a run: its branch point, switches of the precision plan, phases added to the data.

Owns: the syntax of `branch=RUN@STEP`, the contents of `lineage.json` in a run folder, which knobs
were in force at a step. Does not own: writing files (`folder`), loading weights
(`train.checkpoint`), the plan itself. No torch.

`lineage.json` exists only for a run with at least one of these entries:

    branched_from: run, step, tokens, run_id, checkpoint (SHA-256 of its manifest), precision before
        and after (name, digest), changed (every other knob that differs)
    switches: step, tokens, before, after (name, digest), precision (the knobs from there on)
    phases: step, tokens, phases (data.phases from there on)
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.plan.precision.record import label

LINEAGE = "lineage.json"
# What transformers takes for a Nemotron-H config.json without max_position_embeddings.
HUGGING_FACE_CONTEXT = 4096

Record = Mapping[str, Any]


def parse_branch(text: str) -> tuple[Path, int]:
    """Parse `RUN@STEP` into the run folder and the step. Raises ConfigError on any other form."""
    run, at, step = text.rpartition("@")
    if not (at and run and _is_step(step)):
        raise ConfigError(f"branch={text}: give RUN_FOLDER@STEP, such as runs/tiny@100")
    return Path(os.path.normpath(run)), int(step)


def _is_step(text: str) -> bool:
    """Whether the text is a step number. Python refuses to read one of thousands of digits."""
    return text.isdecimal() and text.isascii() and len(text) < 19


def parse_run(text: str) -> tuple[Path, int | None]:
    """The folder and the step that `RUN` or `RUN@STEP` names. A folder whose name holds an @ is
    taken as it is if it exists."""
    run, at, step = text.rpartition("@")
    if os.path.isdir(text) or not (at and run and _is_step(step)):
        return Path(text), None
    return Path(os.path.normpath(run)), int(step)


def read_lineage(folder: Path) -> dict[str, Any]:
    """Contents of the run folder's `lineage.json`; {} if there is no file.

    Raises ConfigError if it cannot be read: without it, the run would get a wrong plan unnoticed.
    """
    path = folder / LINEAGE
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        for switch in loaded.get("switches", []):
            assert isinstance(switch["step"], int) and isinstance(switch["precision"], dict)
            assert isinstance(switch["after"]["digest"], str)
        for change in loaded.get("phases", []):
            assert isinstance(change["step"], int) and isinstance(change["phases"], list)
        for name in ("branched_from", "imported_from"):
            assert isinstance(loaded.get(name, {}), dict)
    except FileNotFoundError:
        return {}
    except (
        OSError,
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        AssertionError,
        RecursionError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else "it has not the expected fields"
        raise ConfigError(f"{path} cannot be read ({reason})") from error
    return loaded


def longest_context(folder: Path, sequence_length: int) -> int:
    """The longest context in tokens that the model in a run folder is known for: the run's
    `sequence_length`, or that of an imported model if it is longer."""
    imported = read_lineage(folder).get("imported_from")
    if imported is None:
        return sequence_length
    longest = imported.get("max_position_embeddings")
    is_count = isinstance(longest, int) and not isinstance(longest, bool)
    return max(longest if is_count else HUGGING_FACE_CONTEXT, sequence_length)


def apply_recorded(config: Any, folder: Path, before_step: int | None = None) -> None:
    """Apply the changes in lineage.json to `config`, the loaded config.yaml, in place.

    These are the knobs under `precision`, and `data.phases`. before_step: apply only changes made
    before this step. Raises ConfigError if lineage.json cannot be read.
    """
    lineage = read_lineage(folder)

    def last(kind: str) -> dict[str, Any] | None:
        changes = [
            change
            for change in lineage.get(kind, [])
            if before_step is None or change["step"] < before_step
        ]
        return changes[-1] if changes else None

    switch, phases = last("switches"), last("phases")
    if switch is not None:
        config["precision"] = switch["precision"]
    if phases is not None:
        config["data"]["phases"] = phases["phases"]


def is_recorded(folder: Path, step: int, plan: Record) -> bool:
    """Whether lineage.json records a switch to `plan` at `step`.

    If so, a run that was killed before its first save under the new plan may continue under it.
    """
    return any(
        switch["step"] == step and switch["after"]["digest"] == plan["digest"]
        for switch in read_lineage(folder).get("switches", [])
    )


def refusal(trained: Path, before: Record, now: Record, run: Path, detail: str = "") -> str:
    """Error message for a precision plan that changes without `switch_precision=true`.

    trained: the checkpoint or run folder with the plan `before`.
    """
    return (
        f"{trained} was trained under precision plan {label(before)}, now {label(now)}{detail}: "
        f"give switch_precision=true to go on under the new one, or branch={run}@STEP to try it "
        "in a new run"
    )


def with_switch(
    lineage: Record, step: int, tokens: int, before: Record, after: Record, precision: Record
) -> dict[str, Any]:
    """`lineage` with a switch added. Switches at or after `step`, which runs again, are removed."""
    earlier = [switch for switch in lineage.get("switches", []) if switch["step"] < step]
    switch = {
        "step": step,
        "tokens": tokens,
        "before": brief(before),
        "after": brief(after),
        "precision": dict(precision),
    }
    return {**lineage, "switches": [*earlier, switch]}


def with_phases(
    lineage: Record, step: int, tokens: int, phases: Sequence[Record]
) -> dict[str, Any]:
    """`lineage` with a change of phases added. Changes at or after `step` are removed."""
    earlier = [change for change in lineage.get("phases", []) if change["step"] < step]
    change = {"step": step, "tokens": tokens, "phases": list(phases)}
    return {**lineage, "phases": [*earlier, change]}


def brief(record: Record) -> dict[str, str]:
    """Only the name and the digest of a plan record."""
    return {"name": record["name"], "digest": record["digest"]}
