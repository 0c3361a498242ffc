"""A small model that answers yes or no, and an environment that rewards yes."""

import gzip
import json
from pathlib import Path
from typing import Any

REWARDS = """
def yes(completion, answer):
    return completion == answer

def always(completion, answer):
    return 1.0
"""
GRPO = ["posttrain", "grpo", "train.sequence_length=64", "max_new_tokens=12", "prompts=4"]
GRPO += ["samples=6", "optim.peak_learning_rate=2e-3", "optim.warmup_tokens=0"]
GRPO += ["train.save_every_steps=2"]
YES = "environments={mine: {use: 'grpo_rewards.py:yes', rows: grpo_tasks.jsonl}}"


def make_warm(knobs: list[str], name: str) -> str:
    """Pretrain and fine-tune such a model in the current folder, with six tasks whose answer is
    yes. Returns the word that branches from it."""
    from nemotron_train.cli.main import main

    Path("grpo_rewards.py").write_text(REWARDS)
    with open("grpo_rows.jsonl", "w") as rows, open("grpo_tasks.jsonl", "w") as tasks:
        for number in range(48):
            prompt = f"say {number % 6}"
            answer = "yes" if (number // 6) % 2 else "no"
            rows.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
            if number < 6:
                task = {"prompt": prompt, "answer": "yes", "thinking": False}
                tasks.write(json.dumps(task) + "\n")
    assert main(["pretrain", *knobs, f"name={name}_base"]) == 0
    words = [f"branch=runs/{name}_base@10", "rows=grpo_rows.jsonl", "train.sequence_length=64"]
    words += [f"name={name}_warm", "epochs=10", "optim.peak_learning_rate=5e-3"]
    assert main(["posttrain", "sft", *words]) == 0
    saved = Path(f"runs/{name}_warm/checkpoints").glob("step_*")
    return f"branch=runs/{name}_warm@{max(int(path.name[5:]) for path in saved)}"


def rollouts(name: str, step: int) -> list[dict[str, Any]]:
    """The rollouts of a step of the run `name`."""
    path = Path(f"runs/{name}/rollouts/step_{step:08}.jsonl.gz")
    return [json.loads(line) for line in gzip.open(path, "rt")]
