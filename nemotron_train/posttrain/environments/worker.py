"""The process in which environments run: reads requests as JSON lines, writes one reply to each.

    python -m nemotron_train.posttrain.environments.worker REQUESTS REPLIES SETTINGS

REQUESTS and REPLIES are descriptors. What an environment prints goes to the standard streams and
cannot be mistaken for a reply. A reply that cannot be written is the parent's to miss: it has the
clock.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from nemotron_train.config.environments import Isolation
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.json_text import json_text
from nemotron_train.data.chat.messages import message_json
from nemotron_train.posttrain.environments import protocol
from nemotron_train.posttrain.environments.families import Settings, build_environment
from nemotron_train.posttrain.sandbox.namespaces import die_with_parent
from nemotron_train.posttrain.sandbox.verdict import Verdict


def serve(requests: int, replies: int, settings: dict[str, Any]) -> None:
    """Answer requests until the parent closes its end."""
    die_with_parent()
    if os.getppid() != settings["parent"]:
        return
    _limit_memory(settings["memory_bytes"])
    environments: dict[str, Any] = {}
    shared = Settings(Isolation(settings["sandbox"]))
    with open(requests, "rb", closefd=False) as lines:
        for line in lines:
            reply = _reply(json.loads(line), environments, shared)
            data = (json_text(reply) + "\n").encode()
            while data:
                data = data[os.write(replies, data) :]


def _reply(
    request: dict[str, Any], environments: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """{"value": …}, {"refused": one line} for a wrong configuration, or {"verdict", "message"}."""
    name = request["environment"]
    try:
        if name not in environments:
            environments[name] = build_environment(name, settings)
        return {"value": _METHODS[request["method"]](environments[name], request["item"])}
    except ConfigError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"verdict": str(Verdict.memory), "message": "MemoryError"}
    except BaseException as error:
        return {"verdict": str(Verdict.error), "message": f"{type(error).__name__}: {error}"[:300]}


def _check_row(environment: Any, item: Any) -> Any:
    return environment.check_row(protocol.row_from_json(item))


def _start(environment: Any, item: Any) -> Any:
    messages = environment.start(protocol.row_from_json(item))
    return [message_json(message) for message in messages]


def _step(environment: Any, item: Any) -> Any:
    reply = environment.step(protocol.episode_from_json(item))
    return None if reply is None else [message_json(message) for message in reply]


def _score(environment: Any, item: Any) -> Any:
    score = protocol.judge(environment, protocol.episode_from_json(item))
    return protocol.score_json(score)


def _load(environment: Any, item: Any) -> Any:
    if open_first := getattr(environment, "open", None):
        open_first()
    return environment.max_turns


_METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "load": _load,
    "check_row": _check_row,
    "start": _start,
    "step": _step,
    "score": _score,
}


def _limit_memory(memory_bytes: int) -> None:
    """A limit on what is written to, not on addresses: torch reserves many that it never uses."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    allowed = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
