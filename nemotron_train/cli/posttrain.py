"""The `posttrain` verbs and `data chat`: arguments and help. Imports the implementation on use."""

import argparse

from nemotron_train.cli.verbs import Verb, open_console
from nemotron_train.compose.compose import to_typed
from nemotron_train.compose.overrides import parse_overrides


def run_sft(arguments: argparse.Namespace) -> int:
    """Run `posttrain sft`."""
    from nemotron_train.posttrain.sft import sft

    return sft(arguments.overrides)


def run_warm(arguments: argparse.Namespace) -> int:
    """Run `posttrain warm`."""
    from nemotron_train.posttrain.warm import warm

    return warm(arguments.overrides, open_console().print)


def run_grpo(arguments: argparse.Namespace) -> int:
    """Run `posttrain grpo`."""
    from nemotron_train.posttrain.grpo import grpo

    return grpo(arguments.overrides)


def run_heal(arguments: argparse.Namespace) -> int:
    """Run `posttrain heal`."""
    from nemotron_train.posttrain.grpo import heal

    return heal(arguments.overrides)


def run_rows(arguments: argparse.Namespace) -> int:
    """Run `posttrain rows`."""
    from nemotron_train.posttrain.warm_start import RowsConfig, write_rows

    config = to_typed(RowsConfig, {}, parse_overrides(arguments.overrides, RowsConfig))
    write_rows(config, open_console().print)
    return 0


def run_data_chat(arguments: argparse.Namespace) -> int:
    """Run `data chat` and print what was made."""
    from nemotron_train.data.chat.prepare import ChatDataConfig, prepare_chat

    config = to_typed(ChatDataConfig, {}, parse_overrides(arguments.overrides, ChatDataConfig))
    console = open_console()
    made = prepare_chat(config, console.print)
    splits = made.manifest.splits
    tokens = sum(splits[name].tokens for name in ("train", "validation"))
    counts = ", ".join(f"{splits[name].documents:,} {name}" for name in ("train", "validation"))
    console.print(
        f"{config.output}: {counts}; {tokens:,} tokens, {made.trained_tokens / tokens:.1%} trained",
        soft_wrap=True,
    )
    if made.dropped:
        console.print(f"left out as longer than a row: {made.dropped:,} conversations")
    return 0


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="+", metavar="KNOB=VALUE")


def _optional_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KNOB=VALUE")


POSTTRAIN_VERBS: dict[str, Verb] = {
    "data chat": Verb(
        "conversations in JSONL -> token ids with a mask of what the assistant said",
        run_data_chat,
        _overrides,
        """\
A row is {"messages": [{"role": "user", "content": "..."}, ...]}, or {"prompt": "...",
"answer": "..."} with "thinking" or without.

The knobs: rows=FILE.jsonl, output=FOLDER and tokenizer=FOLDER (required), sequence_length=N,
too_long=refuse|drop, validation_fraction=0.02, empty_thinking_share=0.1, cut_thinking_share=0.03,
seed=1234.

Example:
  nemotron-train data chat rows=mine.jsonl tokenizer=data/mine/tokenizer output=data/chat
""",
    ),
    "posttrain grpo": Verb(
        "reinforcement learning of a checkpoint over several environments at once",
        run_grpo,
        _optional_overrides,
        """\
Without branch= it first makes what it starts from: runs/tiny (`pretrain`) and runs/warm
(`posttrain warm`).

The knobs: branch=RUN_FOLDER@STEP, name=policy, steps=100, prompts=16, samples=8 (of each prompt),
environments (default: the six families), optim.peak_learning_rate=1e-4, those of
GrpoConfig in nemotron_train/config/grpo.py and grpo_knobs.py, and those of `pretrain`.

Examples:
  nemotron-train posttrain grpo branch=runs/warm@1000 name=policy
  nemotron-train posttrain grpo branch=runs/warm@1000 name=two \\
      "environments={arithmetic: {ratio: 2}, mine: {use: 'rewards.py:exact', rows: tasks.jsonl}}" \\
      correction=truncated ratio_low=0
  nemotron-train posttrain grpo resume=runs/policy
""",
    ),
    "posttrain warm": Verb(
        "fine-tune a checkpoint on worked solutions, as a start for posttrain grpo",
        run_warm,
        _overrides,
        """\
`posttrain rows` and `posttrain sft` together. The knobs: branch=RUN_FOLDER@STEP and name=NAME
(required), count=4000 (rows of a family), balance=true (more of the families that take longer),
environment=NAME,NAME (default all), level=1|2|3, and those of `posttrain sft`.

Example:
  nemotron-train posttrain warm branch=runs/tiny@128 name=warm
""",
    ),
    "posttrain heal": Verb(
        "train the multi-token-prediction block of a policy on its own rollouts",
        run_heal,
        _overrides,
        """\
The policy stays as it is, bit for bit. Each step samples rollouts with drafts, and logs the
accepted share of each depth beside the reward. The knobs: branch=RUN_FOLDER@STEP and name=NAME
(required), steps=100, optim.peak_learning_rate=1e-3, and those of `posttrain grpo`.

Example:
  nemotron-train posttrain heal branch=runs/policy@100 name=healed steps=40
""",
    ),
    "posttrain rows": Verb(
        "worked solutions of generated tasks, as conversations for posttrain sft",
        run_rows,
        _overrides,
        """\
The knobs: output=FILE.jsonl (required), environment=NAME,NAME (default all), count=1000 (of each),
level=1|2|3 (default 0: all three), low_effort_share=0 (of the rows: effort low and half of the
reasoning), seed=1234.

Example:
  nemotron-train posttrain rows output=solutions.jsonl count=2000
  nemotron-train posttrain sft branch=runs/tiny@128 rows=solutions.jsonl name=warm
""",
    ),
    "posttrain sft": Verb(
        "fine-tune a checkpoint on conversations, with the loss on the answers only",
        run_sft,
        _overrides,
        """\
The knobs: branch=RUN_FOLDER@STEP, rows=FILE.jsonl and name=NAME (required), epochs=2, those of
`data chat` except output (here conversations=FOLDER), tokenizer and seed, and those of `pretrain`.

Examples:
  nemotron-train posttrain sft branch=runs/tiny@128 rows=mine.jsonl name=tuned
  nemotron-train posttrain sft branch=runs/imported@0 rows=mine.jsonl name=tuned \\
      optim.peak_learning_rate=5e-5 precision=bf16
  nemotron-train posttrain sft resume=runs/tuned
""",
    ),
}
