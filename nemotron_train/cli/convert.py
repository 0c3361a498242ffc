"""The `convert` verbs: arguments, help and exit codes. Imports the implementation on use."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemotron_train.cli.verbs import Verb, open_console
from nemotron_train.compose.compose import compose_config, to_typed
from nemotron_train.compose.overrides import is_knob, parse_overrides
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.platform.files import check_output, check_output_folder, write_output


def run_convert_merge(arguments: argparse.Namespace) -> int:
    """Run `convert merge`. Words with `=` are knobs, all others are checkpoints."""
    from nemotron_train.convert.merge_weights import MergeConfig

    knobs = [word for word in arguments.words if is_knob(word)]
    checkpoints = [word for word in arguments.words if not is_knob(word)]
    config = to_typed(MergeConfig, {}, parse_overrides(knobs, MergeConfig))
    from nemotron_train.convert.merge import merge

    merge(checkpoints, config, open_console())
    return 0


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RUN@STEP | KNOB=VALUE")


def run_convert_to_hf(arguments: argparse.Namespace) -> int:
    """Run `convert to-hf`."""
    from nemotron_train.convert.hugging_face.to_hf import to_hf

    to_hf(
        arguments.checkpoint,
        arguments.out,
        open_console(),
        dtype=arguments.dtype,
        shard_bytes=_shard_bytes(arguments.shard_gib),
        tokenizer=arguments.tokenizer,
    )
    return 0


def run_add_chat_tokens(arguments: argparse.Namespace) -> int:
    """Run `convert add-chat-tokens`."""
    from nemotron_train.convert.chat_tokens import add_chat_tokens

    add_chat_tokens(arguments.checkpoint, arguments.out, open_console())
    return 0


def _add_chat_tokens_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN@STEP", help="a run folder and a step")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run to make")


def _to_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN@STEP", help="a run folder and a step")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--dtype",
        choices=[dtype.value for dtype in Dtype],
        default="",
        help="of the weights (default: the run's); float32 gives the optimizer's masters",
    )
    _shard_argument(parser)
    parser.add_argument(
        "--tokenizer", default="", metavar="DIR", help="where the run's tokenizer lies now"
    )


def run_convert_from_hf(arguments: argparse.Namespace) -> int:
    """Run `convert from-hf`: write the model's recipe and, if there are weights, a run folder."""
    from nemotron_train.convert.hugging_face import config as hf_config
    from nemotron_train.convert.hugging_face.fields import has_weights
    from nemotron_train.plan.derive import derive

    folder, console = arguments.folder, open_console()
    name = hf_config.model_name(folder)
    output = arguments.out or Path("runs") / name
    if has_weights(folder):
        check_output_folder(output, "--out", [folder])
    hf_model = hf_config.read_model(folder, name, frozenset(arguments.ignore))
    recipe = hf_config.recipe_text(hf_model.model, folder)
    if arguments.recipe is not None:
        _check_recipe(arguments.recipe, recipe)
    checked = _compose(recipe, [])
    checked.name = output.name
    derive(checked)  # checks the model and the name of the run
    console.print(hf_config.summary(hf_model.model), soft_wrap=True)
    if not has_weights(folder):
        console.print("no weights there: the recipe alone")
        if arguments.recipe is None:
            print(recipe, end="")
        else:
            file = arguments.recipe
            write_output(file, recipe, "--recipe")
            text = f"wrote {file}; `nemotron-train plan model={file}` says what it costs"
            console.print(text, soft_wrap=True)
        return 0
    from nemotron_train.convert.hugging_face.from_hf import from_hf, wider_than_bfloat16

    words = list(arguments.overrides)
    wide = wider_than_bfloat16(folder, hf_model.model)
    which = f"{len(wide)} tensors, such as {wide[0]}," if wide else ""
    if not any(word.startswith("precision=") for word in words):
        # The weights' own dtype decides, whatever config.json says of them.
        is_float32 = bool(wide) or hf_model.dtype == Dtype.float32
        words.insert(0, f"precision={'fp32' if is_float32 else 'bf16'}")
        if wide and hf_model.dtype != Dtype.float32:
            text = f"{which} hold more than bfloat16: the run is float32, which keeps them exactly"
            console.print(text, soft_wrap=True)
    config = _compose(recipe, words)
    if wide and config.precision.parameter_dtype == Dtype.bfloat16:
        text = f"{which} will be rounded to bfloat16; precision=fp32 keeps them exactly"
        console.print(text, soft_wrap=True)
    config.name, config.folder = output.name, str(output.parent)
    hf_config.check_overrides(hf_model.model, config.model, folder)

    from_hf(folder, config, output, console, shard_bytes=_shard_bytes(arguments.shard_gib))
    if arguments.recipe is not None:
        write_output(arguments.recipe, recipe, "--recipe")
    return 0


def _compose(recipe: str, overrides: Sequence[str]) -> Config:
    """Compose pretrain's configuration with the text `recipe` as its model recipe."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.yaml"
            file.write_text(recipe, encoding="utf-8")
            return compose_config([f"model={file}", *overrides])
    except OSError as error:
        place = tempfile.gettempdir()
        raise ConfigError(f"{place}: cannot be written ({error.strerror})") from None


def _check_recipe(path: Path, text: str) -> None:
    """Raises ConfigError, before the work, if the recipe cannot be written at `path` or if another
    file is there. The same command again finds its own."""
    check_output(path, "--recipe")
    try:
        is_other = path.exists() and path.read_bytes() != text.encode()
    except OSError as error:
        raise ConfigError(f"--recipe {path}: cannot be read ({error.strerror})") from None
    if is_other:
        raise ConfigError(f"--recipe {path}: is there already; give another")


def _from_hf_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="config.json, weights, tokenizer")
    parser.add_argument("overrides", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument(
        "--out", type=Path, metavar="RUN", help="the run folder to make (default: runs/NAME)"
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="also write the model there")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field of config.json that is not known and does not matter; may be repeated",
    )
    _shard_argument(parser)


def _shard_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-gib", type=float, default=5.0, metavar="N", help="size of a file (default 5)"
    )


def _shard_bytes(gib: float) -> int:
    if not 0 < gib < 2**20:
        raise ConfigError(f"--shard-gib {gib}: must be a number above 0")
    return max(1, int(gib * 2**30))


CONVERT_VERBS: dict[str, Verb] = {
    "convert merge": Verb(
        "the weighted mean of checkpoints, as a run folder to branch from",
        run_convert_merge,
        _merge_arguments,
        """\
The knobs: output=RUN_FOLDER (required), weights=uniform|linear|wsd (default uniform),
decay_style=linear|cosine|minus_sqrt (of weights=wsd, default minus_sqrt).

weights=wsd emulates a decay of the learning rate from the earliest checkpoint to the latest. The
optimizer is dropped; the result stands at the latest checkpoint's step and data position.

Example:
  nemotron-train convert merge runs/a@600 runs/a@800 runs/a@1000 weights=wsd output=runs/merged
  nemotron-train pretrain branch=runs/merged@1000 name=annealed
""",
    ),
    "convert to-hf": Verb(
        "a checkpoint as a folder that Hugging Face's transformers loads",
        run_convert_to_hf,
        _to_hf_arguments,
        """\
Weights as safetensors under the names of the published Nemotron 3, config.json, generation
settings, the tokenizer. The same command again goes on where it was cut off.

Examples:
  nemotron-train convert to-hf runs/tiny@128 --out exported
  nemotron-train convert to-hf runs/big@40000 --out exported --dtype float32 --shard-gib 10
""",
    ),
    "convert add-chat-tokens": Verb(
        "a checkpoint whose tokenizer and model have the special tokens of conversations",
        run_add_chat_tokens,
        _add_chat_tokens_arguments,
        """\
For runs with a tokenizer of their own, such as imports; tokenizers that `data prepare` and the
embedded corpus train have the tokens. The optimizer is dropped.

Example:
  nemotron-train convert add-chat-tokens runs/imported@0 --out runs/chat
  nemotron-train posttrain sft branch=runs/chat@0 rows=mine.jsonl name=tuned
""",
    ),
    "convert from-hf": Verb(
        "a Hugging Face folder as a recipe and, with weights, as a run to branch from",
        run_convert_from_hf,
        _from_hf_arguments,
        """\
Reads config.json and safetensors; runs no code of the folder. A field that our model cannot
follow is refused by name. Without weights the model's recipe is printed, for model=FILE.yaml.
KNOB=VALUE are pretrain's, for the run folder's config.yaml.

Examples:
  nemotron-train convert from-hf nemotron_3_super/ --recipe super.yaml
  nemotron-train convert from-hf exported --out runs/back optim=nemotron3_super
  nemotron-train pretrain branch=runs/back@0 name=more 'data.validation=[{path: data/mine}]' \\
      'data.phases=[{from_tokens: 0, blend: [{path: data/mine}]}]'
""",
    ),
}
