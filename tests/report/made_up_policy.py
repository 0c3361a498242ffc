"""Folders of runs that trained on rollouts, with made-up numbers and texts."""

import copy
import functools
import gzip
import json
from pathlib import Path
from typing import Any

import yaml

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.knobs import to_plain
from nemotron_train.data.tokenize import train_tokenizer

NAMES = ("arithmetic", "tools")


@functools.cache
def _composed(*words: str) -> dict[str, Any]:
    return to_plain(compose_config(list(words)))


def make_policy_run(
    folder: Path,
    *overrides: str,
    num_steps: int = 30,
    names: tuple[str, ...] = NAMES,
    grpo_steps: int = 100,
) -> Path:
    """Writes the configuration and the metrics of such a run. In step s of n the reward is s/n, the
    pass rate of the first environment too, and that of the others 1 - s/n. grpo_steps: 0 for a
    configuration that trains on data."""
    folder.mkdir(parents=True)
    config = copy.deepcopy(_composed(*overrides))
    config["grpo"]["steps"] = grpo_steps
    config["name"] = folder.name
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(1, num_steps + 1):
        rate = step / num_steps
        row = {"step": step, "tokens": 2048 * step, "time": 1000.0 + step, "loss": -0.5}
        row |= {"validation_loss": 0.25, "tokens_per_second": 900.0, "lr": 1e-4, "grad_norm": 1.0}
        row |= {"reward": rate, "pass": rate / 2, "rollouts_per_second": 20.0 + step % 3}
        row |= {"masked_tokens": 0.01, "logprob_gap_max": 1e-3 if step == 7 else 1e-5}
        row |= {"groups_zero": 1 - rate, "groups_full": rate / 4, "groups_mixed": 0.75 * rate}
        for number, name in enumerate(names):
            row[f"pass/{name}"] = rate if number == 0 else 1 - rate
            row[f"reward/{name}"] = 2 * row[f"pass/{name}"]
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def rollout(name: str, passed: bool, text: str = "yes", **fields: Any) -> dict[str, Any]:
    """A rollout as its file has it. Its ids are numbers of bytes, not those of `byte_tokenizer`."""
    ids = list(text.encode("utf-8", "replace"))
    prompt = [{"role": "user", "content": f"a task of {name}"}]
    row = {"id": f"{name}/1", "environment": name, "messages": prompt}
    turns = [{"role": "assistant", "content": text}]
    return {
        "id": f"{name}/1",
        "environment": name,
        "group": 3,
        "sample": 1,
        "sequence": 25,
        "prompt_ids": list(b"a task"),
        "ids": ids,
        "kinds": [["s", len(ids)]],
        "log_probabilities": [-0.5] * len(ids),
        "episode": {"row": row, "prompt": prompt, "turns": turns, "ended_by": "stop"},
        "score": {
            "reward": float(passed),
            "components": {},
            "verdict": "passed" if passed else "failed",
            "message": "" if passed else "was wrong",
        },
        "cut": False,
        "text": text,
        "thinking_tokens": 0,
        "answer_tokens": len(ids),
        "forced_closes": 0,
        "malformed_calls": 0,
        "malformed_thinking": False,
        "policy_version": 0,
        "trainer_log_probabilities": [-0.5] * len(ids),
        "advantage": 0.25 if passed else -0.75,
        "weight": 1.0,
    } | fields


def write_step(folder: Path, step: int, rollouts: list[dict[str, Any]]) -> Path:
    """Writes the file of one step's rollouts."""
    path = folder / "rollouts" / f"step_{step:08}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(each) + "\n" for each in rollouts]
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return path


def byte_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer of the special tokens, ids 0 to 8, and of the 256 bytes."""
    train_tokenizer([], 265, folder)
    return folder
