"""`posttrain sft`: supervised fine-tuning of a checkpoint on conversations.

Owns: the defaults of such a run and its data folder. The run itself is a branch with `weights_only`
on data whose loss mask is 1 where the assistant speaks. Checkpoints, resume, guard, precision
plans, layouts and report are those of pretraining.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from nemotron_train.compose.compose import compose_config, to_typed
from nemotron_train.compose.overrides import parse_overrides
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import BlendSource, Config, DataKind, DataPhase, DecayStyle
from nemotron_train.data.chat.prepare import ChatDataConfig, TooLong, prepare_chat
from nemotron_train.data.packed import PackedSource
from nemotron_train.run import pretrain

_RATE_SHARE = 0.2  # of the parent's peak learning rate
_WARMUP_SHARE = 0.05  # of the run's tokens; the rate then falls to its minimum


@dataclass
class SftConfig:
    """The knobs of `posttrain sft` beside those of `pretrain`."""

    rows: str = ""  # a .jsonl or .jsonl.gz file of conversations, or a pattern
    epochs: float = 2.0  # passes over the conversations, unless train.total_tokens is given
    conversations: str = ""  # folder to make of them; "": data/conversations/NAME
    too_long: TooLong = TooLong.refuse
    validation_fraction: float = field(default=ChatDataConfig.validation_fraction)
    empty_thinking_share: float = field(default=ChatDataConfig.empty_thinking_share)
    cut_thinking_share: float = field(default=ChatDataConfig.cut_thinking_share)


SFT_KNOBS = frozenset(knob.name for knob in fields(SftConfig))


def sft(words: Sequence[str]) -> int:
    """Run `posttrain sft` with these words KNOB=VALUE. Returns the exit code of the run.

    Raises ConfigError as `pretrain` and `prepare_chat` do, and if there is nothing to start from.
    """
    ours = [word for word in words if word.partition("=")[0].lstrip("+") in SFT_KNOBS]
    theirs = [word for word in words if word not in ours]
    knobs = to_typed(SftConfig, {}, parse_overrides(ours, SftConfig))
    given = {word.partition("=")[0].lstrip("+") for word in theirs}
    if "resume" in given:
        if ours:
            raise ConfigError(f"{ours[0]}: a run that is resumed keeps its conversations")
        return pretrain(compose_config(theirs))
    if "branch" not in given:
        raise ConfigError(
            "branch is not set: give the checkpoint to fine-tune, branch=RUN_FOLDER@STEP"
        )
    if not knobs.rows:
        raise ConfigError("rows is not set: give rows=FILE.jsonl, one conversation a line")
    if not 0 < knobs.epochs < math.inf:
        raise ConfigError(f"epochs={knobs.epochs}: must be a number above 0")
    if "name" not in given:
        raise ConfigError("name is not set: give the run a name of its own")
    parent = compose_config(theirs)
    config = with_conversations(parent, knobs)
    return pretrain(_with_schedule(config, knobs.epochs, given))


def with_conversations(config: Config, knobs: SftConfig) -> Config:
    """The configuration of a run on the rows of `knobs`, which are made into a folder of data."""
    folder = Path(knobs.conversations or Path("data") / "conversations" / config.name)
    prepare_chat(
        ChatDataConfig(
            rows=knobs.rows,
            output=str(folder),
            tokenizer=config.data.tokenizer,
            sequence_length=config.train.sequence_length,
            too_long=knobs.too_long,
            validation_fraction=knobs.validation_fraction,
            empty_thinking_share=knobs.empty_thinking_share,
            cut_thinking_share=knobs.cut_thinking_share,
            seed=config.train.seed,
        ),
        print,
    )
    blend = [BlendSource(str(folder), 1.0)]
    data = replace(
        config.data,
        kind=DataKind.prepared,
        tokenizer=str(folder / "tokenizer"),
        phases=[DataPhase(0, blend)],
        validation=blend,
    )
    return replace(config, data=data, weights_only=True)


def _with_schedule(config: Config, epochs: float, given: set[str]) -> Config:
    """Tokens for so many epochs, a learning rate that warms up and then falls to its minimum. What
    the user gave stays."""
    train, optim = config.train, config.optim
    rows = PackedSource(
        Path(config.data.phases[0].blend[0].path),
        "train",
        sequence_length=train.sequence_length,
        seed=train.seed,
        vocab_size=config.model.vocab_size,
        shuffle=True,
    )
    total = train.total_tokens
    if "train.total_tokens" not in given:
        steps = epochs * rows.num_windows * train.sequence_length / train.global_batch_tokens
        total = max(1, math.ceil(steps)) * train.global_batch_tokens
    rate = optim.peak_learning_rate
    if "optim.peak_learning_rate" not in given:
        rate = _RATE_SHARE * rate
    minimum = optim.min_learning_rate if "optim.min_learning_rate" in given else 0.0
    warmup, decay, style = optim.warmup_tokens, optim.decay_tokens, optim.decay_style
    if "optim.warmup_tokens" not in given:
        warmup = round(_WARMUP_SHARE * total)
    if "optim.decay_tokens" not in given:
        decay = total - warmup
    if "optim.decay_style" not in given:
        style = DecayStyle.linear
    return replace(
        config,
        train=replace(train, total_tokens=total, **_validation(config, given)),
        optim=replace(
            optim,
            peak_learning_rate=rate,
            min_learning_rate=minimum,
            warmup_tokens=warmup,
            decay_tokens=decay,
            decay_style=style,
        ),
    )


def _validation(config: Config, given: set[str]) -> dict[str, int]:
    """The whole validation split, unless the user chose: it is small. Its rows fill whole batches,
    so that any layout divides them; the first ones come again for that."""
    if "train.validation_tokens" in given:
        return {}
    rows = PackedSource(
        Path(config.data.validation[0].path),
        "validation",
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        shuffle=False,
    )
    tokens, batch = (
        rows.num_windows * config.train.sequence_length,
        config.train.global_batch_tokens,
    )
    tokens = rows.num_windows * config.train.sequence_length
    batch = config.train.global_batch_tokens
    return {"validation_tokens": -(-tokens // batch) * batch}
