"""`posttrain warm`: fine-tune a checkpoint on worked solutions of generated tasks.

`posttrain rows` and `posttrain sft` in one, with what was found to bring a small model to the point
from which reinforcement learning can go on (docs/posttrain.md).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from nemotron_train.compose.compose import compose_config, to_typed
from nemotron_train.compose.overrides import parse_overrides
from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.sft import SFT_KNOBS, sft
from nemotron_train.posttrain.warm_start import RowsConfig, write_rows

# What `posttrain warm` gives to `posttrain sft` unless the user does.
WARM = {
    "epochs": "1.5",
    "train.global_batch_tokens": "1024",
    "train.micro_batch_sequences": "4",
    "optim.peak_learning_rate": "2e-3",
}
WARM_COUNT = 3600


def warm(words: Sequence[str], say: Callable[[str], None]) -> int:
    """Run `posttrain warm` with these words KNOB=VALUE: write the rows, then fine-tune on them.

    `environment`, `count`, `level` and `balance` are those of `posttrain rows`, the others those of
    `posttrain sft`. Returns the exit code of the run. Raises ConfigError as these verbs do.
    """
    own = {"environment", "count", "level", "balance"}
    given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words}
    ours = [word for word in words if word.partition("=")[0] in own]
    theirs = [word for word in words if word not in ours]
    if "rows" in given:
        raise ConfigError(f"rows={given['rows']}: posttrain warm writes its own; use posttrain sft")
    if "name" not in given or "branch" not in given or "resume" in given:
        return sft(theirs)  # which says what is missing
    folder = Path("data") / "conversations"
    file = folder / f"{given['name']}.jsonl"
    defaults = [f"count={WARM_COUNT}", "balance=true", f"output={file}"]
    config = to_typed(RowsConfig, {}, parse_overrides([*defaults, *ours], RowsConfig))
    compose_config([word for word in theirs if word.partition("=")[0] not in SFT_KNOBS])
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(config, say)
    knobs = [f"{name}={value}" for name, value in WARM.items() if name not in given]
    return sft([*theirs, f"rows={file}", *knobs])
