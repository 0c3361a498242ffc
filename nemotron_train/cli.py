"""The command line: verbs, and the composition of a configuration. The only file that knows Hydra.

Owns: `nemotron-train VERB ...`, its help, how overrides become typed dataclasses, exit codes.
Does not own: what a configuration means (`config.derive`), nor any work (each verb imports its
own, so that `--help` and `plan` never load torch).

Composition: Hydra composes `recipes/pretrain.yaml` with the chosen groups (`model=tiny`); every
other override is then set on `OmegaConf.structured(Config)`, which refuses an unknown knob or a
wrong type. Interpolations are resolved last, so they follow an override.
"""

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.config.schema import Config, ConfigError

EXIT_DONE, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2


def recipes_folder() -> Path:
    """The folder of recipes: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


# Composition --------------------------------------------------------------------------------


def compose_config(overrides: Sequence[str], config_file: Path | None = None) -> Config:
    """The configuration of a run.

    Starts from `resume=FOLDER`'s own config.yaml, from `config_file`, or from the recipes.
    Raises ConfigError naming the knob, the recipe or the file that is wrong.
    """
    parsed = parse_overrides(overrides)
    groups = {override.key_or_group: override for override in parsed if _is_group(override)}
    values = [override for override in parsed if not _is_group(override)]
    resume = next((str(o.value()) for o in values if o.key_or_group == "resume"), "")
    if resume and config_file is not None:
        raise ConfigError("resume= and --config exclude each other: give one of them")
    if resume or config_file is not None:
        for group, override in groups.items():
            raise ConfigError(
                f"{group}={override.value()}: a recipe cannot be laid over a whole config.yaml; "
                f"set single knobs ({group}.KNOB=VALUE) or leave out resume= and --config"
            )
    if resume:
        base = _load_run_config(Path(resume))
    elif config_file is not None:
        base = _load_yaml(config_file, f"--config {config_file}")
    else:
        base = _compose_recipes(list(groups.values()))
    return to_typed(Config, base, values)


def to_typed(schema: type, base: Any, overrides: Sequence[Any]) -> Any:
    """An instance of the dataclass `schema`, filled from `base`, then from Hydra overrides."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(schema)
    knobs = sorted(_knobs(config))
    try:
        config = OmegaConf.merge(config, base)
        for override in overrides:
            _set_knob(config, override)
        for knob in sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{knob} is not set: give {knob}=VALUE")
        OmegaConf.resolve(config)
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _as_config_error(error, knobs) from error


def parse_overrides(overrides: Sequence[str]) -> list[Any]:
    """Hydra's `Override` objects; ConfigError for what is no `KNOB=VALUE`, or is a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{text!r} is no override KNOB=VALUE ({reason})") from error
        if override.is_delete():
            raise ConfigError(f"{text}: a knob cannot be deleted; set it with KNOB=VALUE")
        if override.is_sweep_override():
            raise ConfigError(f"{text}: several values at once are a sweep; give one value")
        parsed.append(override)
    return parsed


def _is_group(override: Any) -> bool:
    """Whether an override picks a recipe file (`model=tiny`) rather than setting a knob."""
    folder = recipes_folder() / override.key_or_group
    return (
        "." not in override.key_or_group and folder.is_dir() and isinstance(override.value(), str)
    )


def _compose_recipes(groups: Sequence[Any]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chosen = []
    for override in groups:
        group, choice = override.key_or_group, override.value()
        choices = sorted(path.stem for path in (recipes_folder() / group).glob("*.yaml"))
        if choice not in choices:
            raise ConfigError(
                f"{group}={choice}: no such recipe{_nearest(choice, choices)}; "
                f"there are {', '.join(choices)}"
            )
        # A group of pretrain.yaml's defaults is replaced, any other one is added.
        is_field = group in {field.name for field in dataclasses.fields(Config)}
        chosen.append(f"{'' if is_field else '+'}{group}={choice}")
    try:
        with initialize_config_dir(str(recipes_folder()), version_base="1.3"):
            return compose("pretrain", overrides=chosen)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the recipes do not compose: {str(error).splitlines()[0]}") from error


def _load_run_config(folder: Path) -> Any:
    """config.yaml of the run folder to resume, pointed at where that folder lies now."""
    from omegaconf import OmegaConf

    if not folder.is_dir():
        raise ConfigError(f"resume={folder}: no such run folder")
    base = _load_yaml(folder / "config.yaml", f"resume={folder}")
    place = folder.resolve()
    here = {"name": place.name, "folder": str(folder.parent), "resume": str(folder)}
    # Stopping early was asked of the process that stopped, not of the run.
    return OmegaConf.merge(base, here, {"train": {"stop_after_steps": 0}})


def _load_yaml(path: Path, asked: str) -> Any:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{asked}: there is no {path}") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{asked}: {path} cannot be read ({reason})") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{asked}: {path} holds no configuration")
    return loaded


def _set_knob(config: Any, override: Any) -> None:
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import ValidationError

    key, value = override.key_or_group, override.value()
    try:
        if override.is_add():  # an entry of a table such as precision.rules
            for name in reversed(key.split(".")):
                value = {name: value}
            with open_dict(config):
                config.merge_with(value)
        else:
            OmegaConf.update(config, key, value)
    except ValidationError as error:
        # Token counts are written 1e9 by people who count them; an int field takes that too.
        if not (isinstance(value, float) and value.is_integer()):
            raise ConfigError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
        OmegaConf.update(config, key, int(value))


def _knobs(config: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import OmegaConf

    for key in config:
        yield f"{prefix}{key}"
        # Before the recipes are merged, what an interpolation refers to may be missing.
        unset = OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key)
        if not unset and OmegaConf.is_dict(config[key]):
            yield from _knobs(config[key], f"{prefix}{key}.")


def _as_config_error(error: Exception, knobs: Sequence[str]) -> ConfigError:
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    knob = getattr(error, "full_key", None) or "the configuration"
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return ConfigError(f"{knob}: there is no such knob{_nearest(knob, knobs)}")
    return ConfigError(f"{knob}: {str(error).splitlines()[0]}")


def _nearest(name: str, names: Sequence[str]) -> str:
    """« (did you mean x?)» for the closest known name, or nothing."""
    leaf = name.rpartition(".")[2]
    close = [known for known in names if known.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# Verbs --------------------------------------------------------------------------------------


def run_pretrain(arguments: argparse.Namespace) -> int:
    config = compose_config(arguments.overrides, arguments.config)
    from nemotron_train.run import pretrain

    return pretrain(config)


def run_plan(arguments: argparse.Namespace) -> int:
    asked = [text for text in arguments.overrides if text.startswith("ranks=")]
    others = [text for text in arguments.overrides if not text.startswith("ranks=")]
    config = compose_config(others, arguments.config)
    from nemotron_train.config.derive import derive
    from nemotron_train.report.plan_table import print_plan

    num_ranks = _parse_ranks(asked[-1]) if asked else _smallest_num_ranks(config)
    print_plan(config, derive(config, num_ranks), _console(), layers=arguments.layers)
    return EXIT_DONE


def run_data_prepare(arguments: argparse.Namespace) -> int:
    from nemotron_train.data.commands import run_prepare
    from nemotron_train.data.prepare import PrepareConfig

    run_prepare(to_typed(PrepareConfig, {}, parse_overrides(arguments.overrides)))
    return EXIT_DONE


def run_data_inspect(arguments: argparse.Namespace) -> int:
    from nemotron_train.data.commands import run_inspect

    run_inspect(arguments.path)
    return EXIT_DONE


def run_report(arguments: argparse.Namespace) -> int:
    from nemotron_train.report.plot import plot_loss
    from nemotron_train.report.table import print_runs

    console = _console()
    print_runs(arguments.runs, console)
    for run_folder in arguments.runs:
        console.print(f"wrote {plot_loss(run_folder)}", highlight=False, soft_wrap=True)
    return EXIT_DONE


def _parse_ranks(text: str) -> int:
    value = text.removeprefix("ranks=")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"ranks={value}: give the number of ranks, 1 or more")
    return int(value)


def _smallest_num_ranks(config: Config) -> int:
    """The fewest ranks that hold the layout: both the dense and the expert groups must divide."""
    parallel = config.parallel
    dense = parallel.tensor * parallel.context
    return parallel.pipeline * math.lcm(dense, parallel.expert * parallel.expert_tensor)


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width; 80 columns would break the tables.
    return Console() if sys.stdout.isatty() else Console(width=120)


# Parsing ------------------------------------------------------------------------------------

OVERRIDES_HELP = """\
Overrides are KNOB=VALUE, as many as you like:
  model=tiny                     pick a recipe (a file under recipes/model/)
  train.total_tokens=1e6         set one knob
  'model.pattern=ME*E'           quote what your shell would expand
The knobs and their defaults: nemotron_train/config/schema.py; a mistyped one is refused by name.
"""


@dataclass(frozen=True)
class Verb:
    """One verb of the command line; `arguments` declares what it takes."""

    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]
    epilog: str


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KNOB=VALUE")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="start from this config.yaml (of a run folder) instead of the recipes",
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="one row a layer")


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="+", metavar="KNOB=VALUE")


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of prepared data")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")


VERBS: dict[str, Verb] = {
    "pretrain": Verb(
        "train a model; with no arguments, a small Nemotron-3-shaped one on this machine",
        run_pretrain,
        _run_arguments,
        OVERRIDES_HELP
        + """
Examples:
  nemotron-train pretrain
  nemotron-train pretrain name=first train.total_tokens=1e6 precision=bf16
  nemotron-train pretrain resume=runs/first
  nemotron-train pretrain --config runs/first/config.yaml name=again train.seed=7

The run folder is runs/NAME. The same command again continues the run from its last checkpoint.
Exit codes: 0 done; 2 wrong configuration or input; 3 stopped on request, checkpoint saved.
""",
    ),
    "plan": Verb(
        "what a configuration means: layers, parameters, FLOPs, ranks; nothing is run",
        run_plan,
        _plan_arguments,
        OVERRIDES_HELP
        + """  ranks=N                        plan for N ranks (default: the fewest that fit)

Examples:
  nemotron-train plan
  nemotron-train plan model=super_120b_a12b --layers
  nemotron-train plan model=nano_30b_a3b parallel.expert=8 ranks=64
""",
    ),
    "data prepare": Verb(
        "text, JSONL, Parquet or a Hugging Face data set -> Megatron .bin/.idx shards",
        run_data_prepare,
        _prepare_arguments,
        """\
Example:
  nemotron-train data prepare input=texts/ tokenizer=my_tokenizer/ output=data/mine workers=4

The knobs: PrepareConfig in nemotron_train/data/prepare.py; a mistyped one is refused by name.
The same command again continues where it stopped.
""",
    ),
    "data inspect": Verb(
        "counts, samples and checksum of a folder of prepared data",
        run_data_inspect,
        _inspect_arguments,
        "Example:\n  nemotron-train data inspect data/mine\n",
    ),
    "report": Verb(
        "table and loss.png of one or more runs",
        run_report,
        _report_arguments,
        "Examples:\n  nemotron-train report runs/tiny\n  nemotron-train report runs/*\n",
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _overview() -> str:
    lines = [f"  {name:14} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: nemotron-train VERB ...",
            "",
            "Pretraining of Nemotron-3-style hybrid models.",
            "",
            *lines,
            "",
            "nemotron-train VERB --help tells the rest. To begin: nemotron-train pretrain",
        ]
    )


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_DONE
    if words[0] == "--version":
        from nemotron_train import __version__

        print(f"nemotron-train {__version__}")
        return EXIT_DONE
    num_words = 1 if words[0] in VERBS else 2
    name = " ".join(words[:num_words])
    if name in ("data", "data --help", "data -h"):
        print(_overview())
        return EXIT_DONE
    if name not in VERBS:
        verb = name if words[0] == "data" else words[0]
        raise ConfigError(f"{verb}: no such verb{_nearest(verb, list(VERBS))}")
    verb = VERBS[name]
    parser = _Parser(
        prog=f"nemotron-train {name}",
        description=verb.summary[0].upper() + verb.summary[1:] + ".",
        epilog=verb.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.arguments(parser)
    return verb.run(parser.parse_intermixed_args(words[num_words:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; the contract's codes are in docs/cli.md."""
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"nemotron-train: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("nemotron-train: interrupted", file=sys.stderr)
        return EXIT_FAILED
