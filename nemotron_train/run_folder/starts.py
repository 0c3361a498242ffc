"""The starts of a run: where each began, how it ended, and the detection of crash loops. No torch.

Owns: the fields `from_step`, `ended`, `end_time` and `reason` of `starts` in environment.json. A
start without `ended` was killed. Does not own: the other fields (`run_folder.folder`), the restart
of a run (by a person, Slurm or a shell loop).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.platform.files import write_atomically
from nemotron_train.run_folder.folder import read_json
from nemotron_train.run_folder.integrity import steps_in

ENVIRONMENT = "environment.json"
STOP_FILE = "STOP"


def begin(folder: Path, crash_loop_starts: int) -> str:
    """Record the step from which this start, the last in environment.json, continues.

    Returns a line that refuses the start if the run is in a crash loop, else "". Raises ConfigError
    if the folder has a STOP file, which ends a chain of jobs.
    """
    stop_file = folder / STOP_FILE
    record = read_json(folder / ENVIRONMENT)
    *earlier_starts, this_start = record["starts"]
    # The newest checkpoint, even if it is damaged.
    this_start["from_step"] = max(steps_in(folder / "checkpoints"), default=0)
    refusal = crash_loop(earlier_starts, this_start["from_step"], crash_loop_starts)
    if refusal or stop_file.exists():
        this_start["ended"] = "refused"
    _write(folder, record)
    if stop_file.exists():
        raise ConfigError(f"{stop_file}: the run was asked to stop; remove the file to go on")
    return f"{folder}: {refusal}" if refusal else ""


def crash_loop(starts: Sequence[Mapping[str, Any]], step: int, limit: int) -> str:
    """The error line if the run is in a crash loop, else "".

    A crash loop: the last `limit` starts all crashed, and all continued from `step`, the step of
    the newest checkpoint. limit 0: no check. Starts that were refused are ignored.
    """
    crashed: list[Mapping[str, Any]] = []
    for start in reversed(starts):
        if start.get("ended") == "refused":
            continue
        if start.get("ended") in ("done", "stopped") or start.get("from_step") != step:
            break
        crashed.append(start)
    if not 0 < limit <= len(crashed):
        return ""
    reason = crashed[0].get("reason") or "killed"
    return (
        f"the last {len(crashed)} starts went on from step {step} and ended out of order before "
        f"the next checkpoint (the latest: {reason}); once the cause is gone, start with "
        "guard.crash_loop_starts=0"
    )


@contextmanager
def recorded(folder: Path | None) -> Iterator[dict[str, str]]:
    """Context manager that records in environment.json how the current start ended.

    The body sets `ended` in the yielded dict; after an exception, it is "refused" or "failed".
    folder: None on all ranks except the one that opened the run folder.
    """
    end = {"ended": "failed"}
    try:
        yield end
    except ConfigError:
        end["ended"] = "refused"
        raise
    except BaseException as error:
        end["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        raise
    finally:
        if folder is not None:
            record = read_json(folder / ENVIRONMENT)
            if record.get("starts"):  # missing if the folder was deleted during the run
                record["starts"][-1] |= end | {"end_time": _now()}
                _write(folder, record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    text = json_text(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / ENVIRONMENT, text)
