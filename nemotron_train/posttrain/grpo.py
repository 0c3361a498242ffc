"""`posttrain grpo`: reinforcement learning over several environments at once.

Owns: the defaults of such a run, and which configurations it takes. The run itself is a branch with
`weights_only` whose steps train on rollouts of its own model (`policy_supply`). Checkpoints,
resume, guard, precision plans and report are those of pretraining.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.budget import check_budget
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.grpo import GrpoConfig
from nemotron_train.config.grpo_knobs import (
    CorrectionRule,
    Ratio,
    check_advantage,
    check_correction,
    check_curriculum,
    check_objective,
)
from nemotron_train.config.schema import Config
from nemotron_train.data.chat.render import END, ChatFormat
from nemotron_train.data.tokenize import end_token_ids, load_tokenizer
from nemotron_train.platform.terminal import open_console
from nemotron_train.posttrain.environments.scoring import Scoring
from nemotron_train.posttrain.knobs import check_environments, scoring_limits
from nemotron_train.posttrain.pool import Pool
from nemotron_train.posttrain.warm import warm
from nemotron_train.run import pretrain
from nemotron_train.run_folder.integrity import steps_in

# What such a run begins with, unless the user gives it. Rates and lengths in optimizer steps are
# turned into tokens of `train.global_batch_tokens` a step, which only the schedule counts with.
_DEFAULTS = {
    "weights_only": "true",
    "optim.peak_learning_rate": "1e-4",
    "optim.weight_decay": "0",
    "optim.beta2": "0.999",
    "optim.decay_tokens": "0",
    "train.frozen": "['*.router.weight']",
    "train.mtp_detached": "true",
    "train.load_balance_loss": "false",
    "train.save_every_steps": "20",
    "train.validate_every_steps": "0",
    "train.short_share": "0",
}
# And one that trains the MTP block alone.
_HEALING = {
    **_DEFAULTS,
    "grpo.heal": "true",
    "grpo.drafts": "true",
    "optim.peak_learning_rate": "1e-3",
    "train.frozen": "['embedding.*', 'decoder.*', 'output_layer.*']",
}
_STEPS = 100
_BASE, _WARM, _NAME = "tiny", "warm", "policy"  # names of runs without a word of the user
_WARMUP_STEPS = 5


def grpo(words: Sequence[str]) -> int:
    """Run `posttrain grpo` with these words KNOB=VALUE. Returns the exit code of the run.

    Knobs of `config.grpo` may be given without `grpo.` before them. Without a checkpoint to branch
    from, the warm start of the embedded default is made first. Raises ConfigError as `pretrain`
    does, and for a knob out of range.
    """
    words = [_full_name(word) for word in words]
    given = {word.partition("=")[0].lstrip("+") for word in words}
    if "resume" in given:
        config = compose_config(words)
        if "grpo.steps" in given:  # the schedule ends where the steps end
            tokens = config.grpo.steps * config.train.global_batch_tokens
            config = replace(config, train=replace(config.train, total_tokens=tokens))
    else:
        if "branch" not in given:
            code, branch = _default_start(given)
            if code:
                return code
            words, given = [*words, branch], {*given, "branch"}
        if "name" not in given:
            words = [*words, f"name={_NAME}"]
        config = compose_config(_with_defaults(words, given))
    check_grpo(config)
    return _run(config)


def heal(words: Sequence[str]) -> int:
    """Run `posttrain heal` with these words KNOB=VALUE: train the MTP block of a policy on its own
    rollouts, while the policy stays as it is. Returns the exit code of the run.

    Raises ConfigError as `grpo` does, and without a checkpoint, a name or an MTP block.
    """
    words = [_full_name(word) for word in words]
    given = {word.partition("=")[0].lstrip("+") for word in words}
    if "resume" in given:
        return grpo(words)
    for name, what in (("branch", "RUN_FOLDER@STEP"), ("name", "NAME")):
        if name not in given:
            raise ConfigError(f"{name} is not set: give {name}={what}")
    config = compose_config(_with_defaults(words, given, _HEALING))
    check_grpo(config)
    return _run(config)


def _default_start(given: set[str]) -> tuple[int, str]:
    """Make the warm start of the embedded default, or what of it is missing: `pretrain`, then
    `posttrain warm`. Returns the exit code of what did not end well, or 0 and the word that
    branches from it.

    Raises ConfigError for knobs that would have to belong to these runs.
    """
    for name in sorted(given):
        if not name.startswith(("grpo.", "optim.", "train.", "name")):
            raise ConfigError(f"branch is not set: with {name}, give branch=RUN_FOLDER@STEP")
    say = open_console().print
    say(f"no branch=: from the embedded default, runs/{_BASE} and runs/{_WARM}")
    code = pretrain(compose_config([f"name={_BASE}"]))
    if not code:
        code = warm([f"branch=runs/{_BASE}@{_newest(_BASE)}", f"name={_WARM}"], say)
    return code, "" if code else f"branch=runs/{_WARM}@{_newest(_WARM)}"


def _newest(name: str) -> int:
    return max(steps_in(Path("runs") / name / "checkpoints"))


def _full_name(word: str) -> str:
    """A word with `grpo.` before a knob of its group."""
    name = word.lstrip("+").partition("=")[0].partition(".")[0]
    plus = word[: len(word) - len(word.lstrip("+"))]
    own = {knob.name for knob in fields(GrpoConfig)}
    return f"{plus}grpo.{word.lstrip('+')}" if name in own else word


def _with_defaults(
    words: Sequence[str], given: set[str], defaults: Mapping[str, str] = _DEFAULTS
) -> list[str]:
    parent = compose_config([word for word in words if not word.startswith("grpo.")])
    steps = [str(_STEPS), *(w.partition("=")[2] for w in words if w.startswith("grpo.steps="))][-1]
    try:
        count = int(steps)
    except ValueError:
        raise ConfigError(f"steps={steps}: give a number of optimizer steps") from None
    if count < 1:
        raise ConfigError(f"steps={steps}: give 1 or more optimizer steps")
    tokens = parent.train.global_batch_tokens
    defaults = {
        **defaults,
        "grpo.steps": str(count),
        "train.total_tokens": str(count * tokens),
        "optim.warmup_tokens": str(min(_WARMUP_STEPS, count) * tokens),
    }
    peak = "optim.peak_learning_rate="
    rates = [word.removeprefix(peak) for word in words if word.startswith(peak)]
    defaults["optim.min_learning_rate"] = [defaults["optim.peak_learning_rate"], *rates][-1]
    return [*(f"{k}={v}" for k, v in defaults.items() if k not in given), *words]


def check_grpo(config: Config) -> None:
    """Raises ConfigError for a knob of reinforcement learning that is out of range, for knobs that
    exclude each other, and for a layout in which a rank has not the whole model."""
    knobs = config.grpo
    least = {"steps": 1, "prompts": 1, "samples": 2, "updates": 1, "pool": 1, "batch": 1}
    least |= {"max_new_tokens": 1, "keep_rollouts": 0, "lag": 0}
    for name, value in least.items():
        if getattr(knobs, name) < value:
            raise ConfigError(f"{name}={getattr(knobs, name)}: give {value} or more")
    for check in (check_advantage, check_correction, check_objective, check_curriculum):
        check(knobs)
    check_budget(knobs)
    scoring_limits(knobs)
    if knobs.environments:
        check_environments(knobs.environments)
    if knobs.lag > 1:
        raise ConfigError(f"lag={knobs.lag}: give 0, or 1 for rollouts of one step before")
    if knobs.lag and knobs.correction == CorrectionRule.none:
        raise ConfigError("lag=1 needs a correction: give correction=truncated or icepop")
    if knobs.updates > 1 and knobs.ratio == Ratio.forced:
        raise ConfigError(f"updates={knobs.updates} needs ratio=clipped: the policy moves between")
    if knobs.steps % knobs.updates:
        raise ConfigError(f"steps={knobs.steps}: is no multiple of updates={knobs.updates}")
    if knobs.kl_weight:
        raise ConfigError(f"kl_weight={knobs.kl_weight}: there is no reference policy here yet")
    if knobs.contract_bound < 0:
        raise ConfigError(f"contract_bound={knobs.contract_bound}: give 0 (by the plan) or above")
    for name in ("drafts", "heal"):
        if getattr(knobs, name) and not config.model.mtp.depths:
            raise ConfigError(f"{name}=true: the model has no multi-token-prediction block")
    if knobs.max_new_tokens >= config.train.sequence_length:
        raise ConfigError(
            f"max_new_tokens={knobs.max_new_tokens}: must be below train.sequence_length="
            f"{config.train.sequence_length}, which a prompt with its rollout must fit"
        )
    parallel = config.parallel
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
        if getattr(parallel, name) > 1:
            raise ConfigError(
                f"parallel.{name}={getattr(parallel, name)}: posttrain grpo samples with the "
                "trainer's own model, which must be whole on each rank; give 1 (data-parallel "
                "ranks share the prompts)"
            )


def _run(config: Config) -> int:
    """Check what the run needs beside its configuration, before any file is made, and run it.

    Raises ConfigError if an environment or its rows cannot be used, or the tokenizer lacks the
    chat format's tokens.
    """
    folder = Path(config.data.tokenizer)
    tokenizer = load_tokenizer(folder)
    chat = ChatFormat(tokenizer, f"tokenizer={folder}")
    end_token = (*end_token_ids(tokenizer, folder), chat.special_ids[END])[0]
    pool = Pool(config.grpo, config.train.seed)
    with Scoring(scoring_limits(config.grpo)) as scoring:
        pool.check(scoring)

        def policy(trainer: Any) -> AbstractContextManager[None]:
            from nemotron_train.posttrain.policy_supply import PolicySupply

            trainer.train_step.supply = PolicySupply(trainer, pool, scoring, chat, end_token)
            return nullcontext()

        return pretrain(config, policy)
