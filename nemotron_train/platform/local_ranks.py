"""Ranks on one machine: their environment, and the file through which a rank tells its launcher why
it refused to go on. No torch."""

import json
import os
import socket
import time
from pathlib import Path

from nemotron_train.config.json_text import json_text

# torchrun's name. Its report at the end of a launch repeats the message of the first failed rank.
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


def free_port() -> int:
    """A TCP port of the loopback address that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The variables by which torch.distributed finds the other ranks, as torchrun sets them."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    values |= {"LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def leave_refusal(line: str) -> bool:
    """Write `line` where the launcher looks for the reason of a failure, so that it is shown once
    for all ranks and last. Returns whether a launcher asked for that and the file was written."""
    path = os.environ.get(ERROR_FILE_VARIABLE, "")
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    if not path:
        return False
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json_text({"message": {"message": line, "extraInfo": extra}}))
    except OSError:
        return False
    return True


def read_refusal(path: Path) -> str:
    """The line that `leave_refusal` wrote; empty if there is none."""
    try:
        line = json.loads(path.read_text())["message"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return line if isinstance(line, str) else ""
