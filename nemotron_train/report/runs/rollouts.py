"""A sample of a run's rollouts, and their texts in pieces by who wrote them. No torch.

Owns: which rollouts are taken; robustness against files left by a crash or another version, as
everywhere in `report.runs`. Does not own: writing such files (`posttrain.rollout`, which has the
meaning of the fields), their display.

A rollout's text is what a model made up under training. It is data, and never more.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.data.tokenize import LoadedTokenizer, load_tokenizer

READ_BYTES = 16 << 20  # of a file, unpacked: the rollouts of a large run are hundreds of megabytes
MAX_PIECES = 300  # of a text; each costs a decoding of what is before it
SAMPLED, FORCED, ENVIRONMENT, UNKNOWN = "sampled", "forced", "environment", "unknown"
_KINDS = {"s": SAMPLED, "f": FORCED, "e": ENVIRONMENT}
_NAME = re.compile(r"step_(\d+)\.jsonl\.gz")


@dataclass(frozen=True)
class Piece:
    """A part of a text. kind: who wrote it, SAMPLED (by the policy), FORCED (by a budget),
    ENVIRONMENT (also the prompt), or UNKNOWN; special: a special token."""

    text: str
    kind: str
    special: bool = False


@dataclass(frozen=True)
class Rollout:
    """What is shown of a rollout. step: whose update it was trained in. counts: tokens by kind."""

    step: int
    environment: str
    row: str
    sample: int
    verdict: str
    reward: float
    advantage: float
    message: str
    counts: dict[str, int]
    prompt: tuple[Piece, ...]
    text: tuple[Piece, ...]

    @property
    def passed(self) -> bool:
        """Whether the environment's verdict is that the answer is right."""
        return self.verdict == "passed"


def sample_rollouts(run_folder: Path, last_step: float, tokenizer: Path | None) -> list[Rollout]:
    """Of the first, the middle and the last step that has a file, and is none after `last_step`:
    the first rollout of each environment that passed, and the first that did not. By step and
    environment. tokenizer: the folder of the run's own; without it, or if it gives another text,
    all pieces are UNKNOWN. [] if there are no files."""
    folder = run_folder / "rollouts"
    files = {int(m[1]): p for p in _files(folder) if (m := _NAME.fullmatch(p.name)) is not None}
    steps = sorted(step for step in files if step <= last_step)
    if not steps:
        return []
    loaded = _tokenizer(tokenizer)
    picked = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    return [rollout for step in picked for rollout in _of_step(step, files[step], loaded)]


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _tokenizer(folder: Path | None) -> LoadedTokenizer | None:
    try:
        return load_tokenizer(folder) if folder is not None else None
    except (ConfigError, OSError):
        return None


def _of_step(step: int, path: Path, tokenizer: LoadedTokenizer | None) -> list[Rollout]:
    found: dict[tuple[str, bool], Rollout] = {}
    for value in _objects(path):
        try:
            key = (str(value["environment"]), value["score"]["verdict"] != "passed")
            if key not in found:
                found[key] = _rollout(step, value, tokenizer)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            continue
    return [found[key] for key in sorted(found)]


def _objects(path: Path) -> Iterator[Any]:
    """The values of the lines, up to READ_BYTES. Torn lines are skipped; a torn file ends early."""
    left = READ_BYTES
    try:
        with gzip.open(path, "rb") as file:
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    continue
    except (OSError, EOFError, zlib.error):
        return


def _rollout(step: int, value: Any, tokenizer: LoadedTokenizer | None) -> Rollout:
    """Raises KeyError, TypeError, ValueError, AttributeError or OverflowError if it is none."""
    score = value["score"]
    reward = 0.0 if score["reward"] is None else float(score["reward"])
    kinds = [(_KINDS[kind], int(count)) for kind, count in value["kinds"]]
    messages = value["episode"]["prompt"]
    said = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    counts = {k: sum(count for kind, count in kinds if kind == k) for k in _KINDS.values()}
    ids, prompt_ids = value["ids"], value["prompt_ids"]
    kinds_of_ids = list(islice((k for k, count in kinds for _ in range(count)), len(ids) + 1))
    return Rollout(
        step=step,
        environment=str(value["environment"]),
        row=str(value["id"]),
        sample=int(value["sample"]),
        verdict=str(score["verdict"]),
        reward=_finite(reward),
        advantage=_finite(float(value["advantage"])),
        message=str(score["message"]),
        counts=counts,
        prompt=pieces_of(None, prompt_ids, [ENVIRONMENT] * len(prompt_ids), tokenizer)
        or (Piece(said, ENVIRONMENT),),
        text=pieces_of(str(value["text"]), ids, kinds_of_ids, tokenizer)
        or (Piece(str(value["text"]), UNKNOWN),),
    )


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("is not finite")
    return value


def pieces_of(
    text: str | None,
    ids: Sequence[int],
    kinds: Sequence[str],
    tokenizer: LoadedTokenizer | None,
) -> tuple[Piece, ...]:
    """The text of `ids` in pieces of one kind each, special tokens apart; kinds: of each id. The
    pieces together are the whole text. () if there is no tokenizer, or it does not make `text` of
    the ids (None: any text will do), or ids and kinds do not fit, or there are too many pieces."""
    if tokenizer is None or len(ids) != len(kinds) or not tokenizer.known_ids.issuperset(ids):
        return ()
    whole = tokenizer.decode(ids)
    if text is not None and whole != text:
        return ()
    labels = [
        (kind, token in tokenizer.control_tokens) for token, kind in zip(ids, kinds, strict=True)
    ]
    runs = [(label, len(list(members))) for label, members in groupby(labels)]
    if len(runs) > MAX_PIECES:
        return ()
    # A cut inside a character of several bytes, or where a tokenizer joins words, moves to the end
    # of what the ids before it certainly give.
    cuts, place = [0], 0
    for _, count in runs:
        place += count
        reached = _common(tokenizer.decode(ids[:place]), whole)
        cuts.append(max(cuts[-1], reached))
    cuts[-1] = len(whole)
    return tuple(
        Piece(whole[begin:end], kind, special)
        for ((kind, special), _), (begin, end) in zip(runs, pairwise(cuts), strict=True)
        if begin < end
    )


def _common(first: str, second: str) -> int:
    """The characters at the beginning of both."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
