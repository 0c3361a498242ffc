"""The starts of a run: from where each began, how it ended, and when enough is enough. No torch.

Owns the fields `from_step`, `ended`, `end_time` and `reason` of `starts` in environment.json. A
start without `ended` was killed. Does not own: the other fields (`run_folder`), who starts a run
again (a person, Slurm, a loop in a shell).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.run_folder.folder import read_json, write_atomically
from nemotron_train.run_folder.integrity import steps_in

ENVIRONMENT = "environment.json"
STOP_FILE = "STOP"


def begin(folder: Path, crash_loop_starts: int) -> str:
    """Notes from which step this start, the last of environment.json, goes on; returns the line
    that refuses it if it would only be the next round of a crash loop, else "".

    Raises ConfigError where the folder holds a STOP file: a chain of jobs ends with it.
    """
    stop_file = folder / STOP_FILE
    record = read_json(folder / ENVIRONMENT)
    *earlier, own = record["starts"]
    own["from_step"] = max(steps_in(folder / "checkpoints"), default=0)  # sound or not
    line = crash_loop(earlier, own["from_step"], crash_loop_starts)
    if line or stop_file.exists():
        own["ended"] = "refused"
    _write(folder, record)
    if stop_file.exists():
        raise ConfigError(f"{stop_file}: the run was asked to stop; remove the file to go on")
    return f"{folder}: {line}" if line else ""


def crash_loop(starts: Sequence[Mapping[str, Any]], step: int, limit: int) -> str:
    """What to say of a run whose last `limit` starts made no progress past `step`, the newest
    checkpoint's, and all ended out of order; "" otherwise, and for limit 0.

    Starts that were refused for their configuration count neither way.
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
    """Writes how the current start ended: the body says so in the yielded `ended`, an exception
    says it for itself. folder: None on all ranks but the one that opened the run folder."""
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
            if record.get("starts"):  # not where the folder was deleted under the run
                record["starts"][-1] |= end | {"end_time": _now()}
                _write(folder, record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / ENVIRONMENT, text)
