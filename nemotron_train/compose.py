"""How words on the command line become a typed configuration. The only file that knows Hydra.

Owns: the recipes folder, the grammar of overrides, the merge into dataclasses, the message that
names a wrong knob. Does not own: what a configuration means (`config.derive`), nor the verbs.

Hydra composes `recipes/pretrain.yaml` with the chosen groups (`model=tiny`; a path, such as
`precision=mine.yaml`, is a file of the user's own); every other override is then set on
`OmegaConf.structured(Config)`, which refuses an unknown knob or a wrong type. Interpolations are
resolved last, so they follow an override. Hydra is imported when needed.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_train.config.schema import Config, ConfigError
from nemotron_train.train.lineage import apply_recorded, parse_branch

RECIPE_FILE_ENDS = (".yaml", ".yml")


def recipes_folder() -> Path:
    """The folder of recipes: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def compose_config(overrides: Sequence[str], config_file: Path | None = None) -> Config:
    """The configuration of a run.

    Starts from `resume=FOLDER`'s own config.yaml, from that of the run in `branch=FOLDER@STEP`,
    from `config_file`, or from the recipes. A whole config.yaml takes one recipe, `precision`; a
    branch also a `run` that sets single knobs and picks no other recipes.
    Raises ConfigError naming the knob, the recipe or the file that is wrong.
    """
    parsed = parse_overrides(overrides)
    groups = {override.key_or_group: override for override in parsed if _is_group(override)}
    values = [override for override in parsed if not _is_group(override)]
    resume, branch = (
        next((str(o.value()) for o in values if o.key_or_group == knob), "")
        for knob in ("resume", "branch")
    )
    given = {"resume=": bool(resume), "branch=": bool(branch), "--config": config_file is not None}
    starts = [name for name, is_given in given.items() if is_given]
    if len(starts) > 1:
        raise ConfigError(f"{' and '.join(starts)} exclude each other: give one of them")
    if not starts:
        return to_typed(Config, _compose_recipes(list(groups.values())), values)
    for group, override in groups.items():
        if group != "precision" and not (group == "run" and branch):
            raise ConfigError(
                f"{group}={override.value()}: a recipe cannot be laid over a whole config.yaml; "
                f"set single knobs ({group}.KNOB=VALUE) or leave out {starts[0]}"
            )
    if resume:
        base = _load_run_config(Path(resume))
    elif branch:
        base = _load_parent_config(branch)
        values = [override for override in values if override.key_or_group != "branch"]
    else:
        assert config_file is not None
        base = _load_yaml(config_file, f"--config {config_file}")
    if "precision" in groups:
        base["precision"] = _compose_recipes([groups["precision"]])["precision"]
    if "run" in groups:
        base = _with_run_recipe(base, groups["run"].value())
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


def parse_overrides(overrides: Sequence[str], sweeps: bool = False) -> list[Any]:
    """Hydra's `Override` objects; ConfigError for what is no `KNOB=VALUE`, or, unless `sweeps`
    are taken, for several values at once."""
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
        if override.is_sweep_override() and not sweeps:
            raise ConfigError(
                f"{text}: several values at once are a sweep; give one value, or use "
                "`nemotron-train sweep`"
            )
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
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    chosen, files = [], {}
    fields = {field.name for field in dataclasses.fields(Config)}
    for override in groups:
        group, choice = override.key_or_group, override.value()
        if choice.endswith(RECIPE_FILE_ENDS) and group in fields:
            files[group] = _load_recipe_file(group, Path(choice))
            continue
        choices = sorted(path.stem for path in (recipes_folder() / group).glob("*.yaml"))
        if choice not in choices:
            raise ConfigError(
                f"{group}={choice}: no such recipe{nearest(choice, choices)}; "
                f"there are {', '.join(choices)}; a file of your own is given by its path, "
                "which ends in .yaml"
            )
        # A group of pretrain.yaml's defaults is replaced, any other one is added.
        chosen.append(f"{'' if group in fields else '+'}{group}={choice}")
    try:
        with initialize_config_dir(str(recipes_folder()), version_base="1.3"):
            composed = compose("pretrain", overrides=chosen)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the recipes do not compose: {str(error).splitlines()[0]}") from error
    with open_dict(composed):
        for group, recipe in files.items():
            composed[group] = recipe
    return composed


def _with_run_recipe(base: Any, choice: str) -> Any:
    """The knobs of recipes/run/CHOICE.yaml (or a file of the user's own) laid over a parent's
    configuration."""
    from omegaconf import OmegaConf

    path = Path(choice)
    if not choice.endswith(RECIPE_FILE_ENDS):
        choices = sorted(found.stem for found in (recipes_folder() / "run").glob("*.yaml"))
        if choice not in choices:
            raise ConfigError(
                f"run={choice}: no such recipe{nearest(choice, choices)}; "
                f"there are {', '.join(choices)}"
            )
        path = recipes_folder() / "run" / f"{choice}.yaml"
    recipe = _load_yaml(path, f"run={choice}")
    if "defaults" in recipe:
        raise ConfigError(
            f"run={choice}: picks other recipes, which cannot be laid over a parent's "
            "configuration; a branch takes a run recipe of single knobs, such as "
            "run=context_extension"
        )
    return OmegaConf.merge(base, recipe)


def _load_recipe_file(group: str, path: Path) -> Any:
    """A recipe of the user's own. Like ours it may name others of its group under `defaults`, and
    then says only what differs."""
    from omegaconf import OmegaConf

    loaded = _load_yaml(path, f"{group}={path}")
    defaults = list(loaded.pop("defaults", []))
    merged = OmegaConf.create()
    for name in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if name != "_self_":
            base = recipes_folder() / group / f"{name}.yaml"
            merged.merge_with(_load_recipe_file(group, base))
        else:
            merged.merge_with(loaded)
    return merged


def _load_run_config(folder: Path) -> Any:
    """config.yaml of the run folder to resume, pointed at where that folder lies now."""
    base = _load_from_run(folder, f"resume={folder}")
    base.update({"name": folder.resolve().name, "folder": str(folder.parent)})
    base.update({"resume": str(folder)})
    return base


def _load_parent_config(branch: str) -> Any:
    """config.yaml of the run to branch from, with the plan its checkpoint was trained under, and a
    name that says where the new run comes from."""
    folder, step = parse_branch(branch)
    base = _load_from_run(folder, f"branch={branch}", step)
    name = f"{folder.resolve().name}_at_{step}_${{precision.name}}"
    base.update({"name": name, "folder": str(folder.parent), "branch": f"{folder}@{step}"})
    return base


def _load_from_run(folder: Path, asked: str, before_step: int | None = None) -> Any:
    """config.yaml of a run folder, with the precision plan and the phases that came since."""
    from omegaconf import OmegaConf

    if not folder.is_dir():
        raise ConfigError(f"{asked}: no such run folder")
    base = _load_yaml(folder / "config.yaml", asked)
    apply_recorded(base, folder, before_step)
    # Stopping early, or another plan, was asked of the process of then, not of the run.
    once = {"train": {"stop_after_steps": 0}, "switch_precision": False}
    return OmegaConf.merge(base, once)


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
        return ConfigError(f"{knob}: there is no such knob{nearest(knob, knobs)}")
    return ConfigError(f"{knob}: {str(error).splitlines()[0]}")


def nearest(name: str, names: Sequence[str]) -> str:
    """« (did you mean x?)» for the closest known name, or nothing."""
    leaf = name.rpartition(".")[2]
    close = [known for known in names if known.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
