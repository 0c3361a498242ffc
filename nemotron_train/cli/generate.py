"""The verbs `generate` and `evaluate acceptance`: arguments, help and exit codes. Imports the
implementation on use. `evaluate` verbs share `runs_and_knobs`."""

import argparse
from collections.abc import Sequence
from typing import Any

from nemotron_train.cli.verbs import Verb
from nemotron_train.compose.compose import to_typed
from nemotron_train.compose.overrides import is_knob, parse_overrides
from nemotron_train.config.errors import ConfigError

# Knobs whose value is taken literally (spaces, quotes, brackets) and that may be repeated.
_TEXTS = ("prompt", "stop", "data")


def runs_and_knobs(schema: Any, words: Sequence[str], most_runs: int = 1) -> tuple[list[str], Any]:
    """Parse `words` into run names and typed knobs of the dataclass `schema`.

    Also checks the model knobs and prepares the platform, which must happen before Megatron-Core is
    imported. Raises ConfigError if a knob is wrong, or there is no run or more than `most_runs`.
    """
    texts: dict[str, list[str]] = {}
    runs, overrides = [], []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in _TEXTS and name in schema.__dataclass_fields__:
            texts.setdefault(name, []).append(value)
        elif is_knob(word):
            overrides.append(word)
        else:
            runs.append(word)
    if not 1 <= len(runs) <= most_runs:
        expected = "one run is needed" if most_runs == 1 else f"name one run or up to {most_runs}"
        actual = f"{len(runs)} are given: {' '.join(runs)}" if runs else "none is given"
        raise ConfigError(f"{expected}, RUN_FOLDER or RUN_FOLDER@STEP; {actual}")
    knobs = to_typed(schema, texts, parse_overrides(overrides, schema))
    _prepare(knobs)
    return runs, knobs


def _prepare(knobs: Any) -> None:
    """Check the model knobs and prepare the platform. Call before importing Megatron-Core."""
    from nemotron_train.generate.knobs import check_model_knobs
    from nemotron_train.platform import device

    check_model_knobs(knobs)
    device.prepare(knobs.threads)


def run_generate(arguments: argparse.Namespace) -> int:
    """Run `generate`."""
    from nemotron_train.generate.knobs import GenerateConfig

    (run,), knobs = runs_and_knobs(GenerateConfig, arguments.words)
    from nemotron_train.generate.terminal import generate

    generate(run, knobs)
    return 0


def run_evaluate_acceptance(arguments: argparse.Namespace) -> int:
    """Run `evaluate acceptance`."""
    from nemotron_train.generate.knobs import AcceptanceConfig

    (run,), knobs = runs_and_knobs(AcceptanceConfig, arguments.words)
    from nemotron_train.evaluate.acceptance import evaluate_acceptance

    evaluate_acceptance(run, knobs)
    return 0


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a verb that takes runs and knobs."""
    parser.add_argument("words", nargs="+", metavar="RUN | KNOB=VALUE")


GENERATE_VERBS: dict[str, Verb] = {
    "generate": Verb(
        "text from a checkpoint, with the multi-token-prediction block drafting if asked",
        run_generate,
        run_arguments,
        """\
RUN is a run folder (its newest checkpoint) or RUN_FOLDER@STEP. The knobs are the fields of
GenerateConfig in nemotron_train/generate/knobs.py:
  prompt=TEXT                    as typed; more than once for several prompts
  prompts=FILE                   one a line, or .jsonl with "prompt"
  chat=true thinking=false       a prompt is what a user says; the answer begins without reasoning
  budget=N budget_grace=N        with chat: most tokens of reasoning, then so many to end a line
  samples=N                      continuations of each prompt (default 1)
  max_new_tokens=N               (default 256)
  temperature=T top_k=K top_p=P  in this order; temperature=0 is greedy
  seed=N                         a sequence's draws depend on it and the sequence's number alone
  stop=TEXT                      end before this text; more than once for several
  coupled=true                   with the same seed, drafts do not change the text
  speculative=true draft_tokens=N   draft, verify in one pass (default: the trained depths)
  output=FILE                    every sequence with tokens and log-probabilities, JSON lines
  tensor=N expert=N expert_tensor=N   share the model among the ranks of torchrun
  batch=N prefill_chunk=N end_of_document=false tokenizer=FOLDER threads=N

Examples:
  nemotron-train generate runs/tiny prompt='def main(' temperature=0 max_new_tokens=64
  nemotron-train generate runs/tiny@128 prompts=prompts.jsonl samples=4 output=out.jsonl
  nemotron-train generate runs/tiny prompt='import ' speculative=true
  torchrun --nproc-per-node 2 -m nemotron_train generate runs/tiny tensor=2 prompt='import '
""",
    ),
    "evaluate acceptance": Verb(
        "how many drafted tokens a checkpoint accepts on held-out text, by depth",
        run_evaluate_acceptance,
        run_arguments,
        """\
Decodes speculatively after prompts cut from held-out documents and counts. The knobs: data=FOLDER
(prepared data; more than once; default: the run's validation data), num_prompts=N (a folder),
prompt_tokens=N, and those of `generate`.

Example:
  nemotron-train evaluate acceptance runs/tiny temperature=0
""",
    ),
}
