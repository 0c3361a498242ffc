"""The verbs `evaluate loss`, `evaluate nll-by-position` and `evaluate harness`: arguments and help.
Imports the implementation on use."""

import argparse

from nemotron_train.cli.generate import run_arguments, runs_and_knobs
from nemotron_train.cli.verbs import Verb


def run_loss(arguments: argparse.Namespace) -> int:
    """Run `evaluate loss`."""
    from nemotron_train.evaluate.knobs import LossConfig

    (run,), knobs = runs_and_knobs(LossConfig, arguments.words)
    from nemotron_train.evaluate.loss import evaluate_loss

    evaluate_loss(run, knobs)
    return 0


def run_positions(arguments: argparse.Namespace) -> int:
    """Run `evaluate nll-by-position` on up to 8 checkpoints."""
    from nemotron_train.evaluate.knobs import PositionsConfig

    runs, knobs = runs_and_knobs(PositionsConfig, arguments.words, most_runs=8)
    from nemotron_train.evaluate.positions import evaluate_positions

    evaluate_positions(runs, knobs)
    return 0


def run_harness(arguments: argparse.Namespace) -> int:
    """Run `evaluate harness`."""
    from nemotron_train.evaluate.knobs import HarnessConfig

    (run,), knobs = runs_and_knobs(HarnessConfig, arguments.words)
    from nemotron_train.evaluate.harness import evaluate_harness

    evaluate_harness(run, knobs)
    return 0


def run_environments(arguments: argparse.Namespace) -> int:
    """Run `evaluate environments` on up to 8 checkpoints."""
    from nemotron_train.posttrain.knobs import EvaluateEnvironmentsConfig

    runs, knobs = runs_and_knobs(EvaluateEnvironmentsConfig, arguments.words, most_runs=8)
    from nemotron_train.posttrain.evaluation import evaluate_environments

    evaluate_environments(runs, knobs)
    return 0


def run_budget(arguments: argparse.Namespace) -> int:
    """Run `evaluate budget`."""
    from nemotron_train.posttrain.knobs import EvaluateBudgetConfig

    (run,), knobs = runs_and_knobs(EvaluateBudgetConfig, arguments.words)
    from nemotron_train.posttrain.budget_curve import evaluate_budget

    evaluate_budget(run, knobs)
    return 0


EVALUATE_VERBS: dict[str, Verb] = {
    "evaluate loss": Verb(
        "loss, perplexity and bits a byte of a checkpoint on prepared data, folder by folder",
        run_loss,
        run_arguments,
        """\
RUN is a run folder (its newest checkpoint) or RUN_FOLDER@STEP. The knobs are the fields of
LossConfig in nemotron_train/evaluate/knobs.py: data=FOLDER (more than once; default: the run's
validation data), split=, max_tokens= (of each folder), sequence_length=, output=FILE.json.

Example:
  nemotron-train evaluate loss runs/tiny data=data/code data=data/books
""",
    ),
    "evaluate nll-by-position": Verb(
        "negative log-likelihood against position in long documents, of one or more checkpoints",
        run_positions,
        run_arguments,
        """\
Every document is cut to max_tokens and read in chunks, so memory grows with the attention layers'
cache alone. The knobs are the fields of PositionsConfig in nemotron_train/evaluate/knobs.py:
data=FOLDER (more than once), split=, documents=N, max_tokens=N, first_position=N (of the fit),
output=PATH.

Example:
  nemotron-train evaluate nll-by-position runs/short runs/extended data=data/packages
""",
    ),
    "evaluate environments": Verb(
        "pass@1 and pass@8 of one or more checkpoints in environments, with intervals",
        run_environments,
        run_arguments,
        """\
Every task is sampled several times in the chat format and judged by its environment. Several
checkpoints get the same tasks and draws, and are compared task by task.

The knobs: environment=all|NAME,NAME, rows=FILE.jsonl (tasks of your own),
split=evaluation|harder|train|warm_start, level=1|2|3 (default 0: the three in turn), prompts=32 (of
each environment), samples=8, output=PATH (PATH.json, PATH.png, PATH.0.jsonl.gz with the rollouts),
temperature=, seed=, max_new_tokens=, batch=, speculative=true, tensor=, expert=, scoring_workers=,
scoring_seconds=, sandbox=; budget=N (most thinking tokens of a turn), budget_grace=N,
budget_scope=turn|episode.

Examples:
  nemotron-train evaluate environments runs/warm
  nemotron-train evaluate environments runs/warm runs/grpo environment=arithmetic,tools prompts=64
""",
    ),
    "evaluate budget": Verb(
        "pass@1 of a checkpoint against its reasoning budget, with paired draws",
        run_budget,
        run_arguments,
        """\
The tasks of `evaluate environments` are asked under several budgets, after which `</think>` is
forced. All budgets get the same tasks and draws, so they differ only after the forced close.

The knobs: budgets=[N,N,inf] (inf: no limit; default: 0, B/8, B/4, B/2, B, inf), budget=B (default:
the thinking tokens that 95 % of the model's own reasoning stays below), budget_grace=N (tokens in
which a line break is waited for; default: a tenth of the budget, 4 at least),
budget_scope=turn|episode (each turn has the budget, or all share it), output=PATH (PATH.json,
PATH.png, PATH.BUDGET.jsonl.gz with the rollouts), and those of `evaluate environments`.

Examples:
  nemotron-train evaluate budget runs/warm
  nemotron-train evaluate budget runs/warm budgets=[0,8,32,inf] environment=arithmetic prompts=64
""",
    ),
    "evaluate harness": Verb(
        "tasks of the LM evaluation harness (extra `evaluate`)",
        run_harness,
        run_arguments,
        """\
The knobs are the fields of HarnessConfig in nemotron_train/evaluate/knobs.py: tasks=[A,B],
include_path=FOLDER (with task files of your own), num_fewshot=N, limit=N (a task),
max_length=N (tokens that the model is given at once; longer texts are read in windows),
output=FILE.json. Tasks that the harness brings download their data.

Example:
  nemotron-train evaluate harness runs/tiny tasks=[lambada_openai,hellaswag] limit=100
""",
    ),
}
