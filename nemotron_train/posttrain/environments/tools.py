"""A small machine with a dictionary and a calculator, used over several turns. No torch.

A call is a line such as `get cat`, `add 3 4`, `mul 3 4` or `set sun 7`. A wrong call is answered by
a text that begins with `error`, and the episode goes on. Right is the last content and the state in
which the dictionary was left.
"""

import random
import re
from collections.abc import Mapping
from typing import Any

from nemotron_train.data.chat.messages import call_text
from nemotron_train.posttrain.environments.family import Problem, around, thought
from nemotron_train.posttrain.environments.protocol import (
    Episode,
    Message,
    Row,
    Score,
    failed,
    passed,
)
from nemotron_train.posttrain.environments.words import NOUNS

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,11})", re.ASCII)
_ARGUMENTS = {"get": 1, "set": 2, "add": 2, "mul": 2}


class Machine:
    """A dictionary of whole numbers and four tools. state: what the dictionary holds now."""

    def __init__(self, store: Mapping[str, int]) -> None:
        self.state = dict(store)

    def call(self, text: str) -> str:
        """Run one call and return its result or a text that begins with `error`."""
        tool, *arguments = text.split(" ")
        if tool not in _ARGUMENTS:
            return f"error: no tool {tool[:20]}"
        if len(arguments) != _ARGUMENTS[tool]:
            return f"error: {tool} takes {_ARGUMENTS[tool]}"
        if tool == "get":
            key = arguments[0]
            return str(self.state[key]) if key in self.state else f"error: no {key[:20]}"
        numbers = arguments[1:] if tool == "set" else arguments
        if not all(map(_WHOLE.fullmatch, numbers)):
            return "error: no number"
        if tool == "set":
            self.state[arguments[0]] = int(arguments[1])
            return "ok"
        first, second = map(int, numbers)
        return str(first + second if tool == "add" else first * second)


class Tools:
    """`get cat` → call `get cat` → `12`. Level 1: one call; 2: `add cat moon` or `mul cat moon`,
    three calls; 3: the result is stored as well, four calls; 4: three words, six calls.

    A row has `metadata.store`, the dictionary at the start, which the prompt does not show, and
    `metadata.end`, what it must hold at the end. One call a turn.
    """

    name = "tools"
    max_turns = 10

    def check_row(self, row: Row) -> str:
        """The answer must be a text; metadata.store and metadata.end objects of whole numbers."""
        if not isinstance(row.answer, str) or not row.answer.strip():
            return "answer: missing or no text; this environment compares with it"
        for name in ("store", "end"):
            store = row.metadata.get(name)
            if not isinstance(store, Mapping) or any(type(n) is not int for n in store.values()):
                return f"metadata.{name}: missing or no object of whole numbers"
        return ""

    def generate(self, source: random.Random, level: int) -> Problem:
        """A dictionary of six words, and a job on one to three of them."""
        store = {word: source.randint(1, 20) for word in source.sample(NOUNS, 6)}
        words = source.sample(list(store), 1 if level == 1 else 3 if level == 4 else 2)
        tool = "get" if level == 1 else source.choice(("add", "mul"))
        target = source.choice(NOUNS) if level >= 3 else ""
        result = store[words[0]]
        for word in words[1:]:
            result = result + store[word] if tool == "add" else result * store[word]
        end = {**store, target: result} if target else store
        prompt = f"{tool} {' '.join(words)}" + (f" then set {target}" if target else "")
        metadata = {"store": store, "end": end, "tool": tool, "words": words, "target": target}
        return Problem(prompt, str(result), metadata, hidden=str(sorted(store.items())))

    def start(self, row: Row) -> list[Message]:
        """The row's own messages."""
        return list(row.messages)

    def step(self, episode: Episode) -> list[Message] | None:
        """The result of a call; None after a message without one."""
        calls = episode.last.tool_calls
        if episode.last.fault or not calls:
            return None
        if len(calls) > 1:
            return [Message("tool", "error: one call")]
        return [Message("tool", self._replay(episode)[1])]

    def solution(self, row: Row) -> list[Message]:
        """Fetch the words, fold them, store the result if asked, answer."""
        metadata, machine, turns = row.metadata, Machine(row.metadata["store"]), []

        def call(text: str) -> str:
            result = machine.call(text)
            turns.append(Message("assistant", "", metadata["tool"], (text,)))
            turns.append(Message("tool", result))
            return result

        numbers = [call(f"get {word}") for word in metadata["words"]]
        result = numbers[0]
        for number in numbers[1:]:
            result = call(f"{metadata['tool']} {result} {number}")
        if metadata["target"]:
            call(f"set {metadata['target']} {result}")
        return [*turns, thought("done", result)]

    def score(self, episode: Episode) -> Score:
        """The content and the end state, with the calls played again."""
        content, row = episode.last.content, episode.row
        if episode.last.tool_calls:
            return failed("the episode ended on a call")
        state = self._replay(episode)[0].state
        if state != row.metadata["end"]:
            return failed("the dictionary was left in another state")
        return passed() if content == row.answer else failed(f"{content!r} is not {row.answer}")

    def candidates(self, row: Row) -> list[str]:
        """Numbers, with the answer in their middle."""
        return around(row.answer, [str(number) for number in range(1, 30)])

    def _replay(self, episode: Episode) -> tuple[Machine, str]:
        """The machine after all calls of the episode, and the last result."""
        machine, result = Machine(episode.row.metadata["store"]), ""
        for message in episode.turns:
            if message.role == "assistant" and len(message.tool_calls) == 1:
                result = machine.call(call_text(message.tool_calls[0]))
        return machine, result


def tool_descriptions() -> list[dict[str, Any]]:
    """The tools as a chat template lists them, for models that are told (`Row.tools`)."""
    texts = {"get": "the number of a word", "set": "store a number under a word"}
    texts |= {"add": "the sum of two numbers", "mul": "the product of two numbers"}
    return [{"name": name, "description": text} for name, text in texts.items()]
