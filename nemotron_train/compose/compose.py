"""Command-line arguments to a typed configuration. The only file that uses Hydra.

Owns: the grammar of overrides, the merge into dataclasses and its order (`layers`), the error
message for a wrong knob. Does not own: files (`recipe_files`), the meaning of a configuration
(`plan.derive`), the commands.

Hydra composes `recipes/pretrain.yaml` with the selected recipes (`model=tiny`; a path such as
`precision=mine.yaml` selects a user's file). All other overrides are then set on
`OmegaConf.structured(Config)`, which rejects unknown knobs and wrong types. Interpolations are
resolved last, so they use overridden values. Hydra is imported only when needed.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_train.compose.overrides import parse_overrides
from nemotron_train.compose.recipe_files import (
    RECIPE_FILE_ENDS,
    load_recipe_file,
    load_run_recipe,
    nearest,
    recipe_chain,
    recipes_folder,
    with_run_recipe,
)
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.knobs import differences
from nemotron_train.config.schema import Config
from nemotron_train.config.yaml_file import load_yaml
from nemotron_train.run_folder.lineage import LINEAGE, apply_recorded, parse_branch


@dataclass(frozen=True)
class Layer:
    """One source of knob values. source: a file or a command-line argument; tree: the values it
    sets, plain and with interpolations unresolved; replaces: the part of the configuration from
    which this layer removes all earlier values, or ""."""

    source: str
    tree: dict[str, Any]
    replaces: str = ""


def compose_config(overrides: Sequence[str], config_file: Path | None = None) -> Config:
    """The configuration of a run.

    It starts from the config.yaml of the run in `resume=FOLDER` or `branch=FOLDER@STEP`, from
    `config_file`, or from the recipes. A complete config.yaml can be combined with a `precision`
    recipe only; a branch also with a `run` recipe that sets single knobs and selects no other
    recipes. Raises ConfigError with the knob, the recipe or the file that is wrong.
    """
    groups, values, resume, branch = _sorted_overrides(overrides, config_file)
    if not (resume or branch or config_file):
        return to_typed(Config, _compose_recipes(list(groups.values())), values)
    if resume:
        base = _load_run_config(Path(resume))
    elif branch:
        base = _load_parent_config(branch)
        values = [override for override in values if override.key_or_group != "branch"]
    else:
        assert config_file is not None
        base = load_yaml(config_file, f"--config {config_file}", Config, resolvers=False)
    if "precision" in groups:
        base["precision"] = _compose_recipes([groups["precision"]])["precision"]
    if "run" in groups:
        base = with_run_recipe(base, groups["run"].value())
    return to_typed(Config, base, values)


def layers(overrides: Sequence[str], config_file: Path | None = None) -> list[Layer]:
    """All sources that `compose_config` merges over the schema's defaults, in merge order. Raises
    ConfigError in the same cases."""
    from omegaconf import OmegaConf

    groups, values, resume, branch = _sorted_overrides(overrides, config_file)
    result: list[Layer] = []
    if resume or branch:
        folder = Path(resume) if resume else parse_branch(branch)[0]
        requested_by = f"resume={resume}" if resume else branch
        stored = load_yaml(folder / "config.yaml", requested_by, Config, resolvers=False)
        loaded = _load_run_config(folder) if resume else _load_parent_config(branch)
        result.append(Layer(str(folder / "config.yaml"), _raw(stored)))
        changed = differences(_raw(stored), _raw(loaded))
        for knob, (_, value) in changed.items():
            is_recorded = knob.startswith(("precision.", "data.phases"))
            source = str(folder / LINEAGE) if is_recorded else "what this start is"
            result.append(Layer(source, _nested(knob, value)))
    elif config_file is not None:
        result.append(
            Layer(
                str(config_file), _raw(load_yaml(config_file, "--config", Config, resolvers=False))
            )
        )
    if not result:
        result += _recipe_layers(list(groups.values()))
    else:
        if "precision" in groups:  # replaces the whole precision part
            result.append(Layer(f"precision={groups['precision'].value()}", {}, "precision"))
            result += [
                layer
                for layer in _recipe_layers([groups["precision"]])
                if list(layer.tree) == ["precision"] or layer.replaces == "precision"
            ]
        if "run" in groups:
            path, recipe = load_run_recipe(groups["run"].value())
            result.append(Layer(str(path), _raw(recipe)))
    for override in values:
        wrapped = OmegaConf.create({"value": override.value()})
        value = OmegaConf.to_container(wrapped, resolve=False)["value"]  # type: ignore[index]
        result.append(Layer(override.input_line, _nested(override.key_or_group, value)))
    return result


def _sorted_overrides(
    overrides: Sequence[str], config_file: Path | None
) -> tuple[dict[str, Any], list[Any], str, str]:
    """The overrides that select recipes, by group; the overrides that set knobs; the values of
    `resume=` and `branch=`, or ""."""
    parsed = parse_overrides(overrides, Config)
    groups = {override.key_or_group: override for override in parsed if _is_group(override)}
    values = [override for override in parsed if not _is_group(override)]
    resume, branch = (
        next((str(o.value()) for o in values if o.key_or_group == knob), "")
        for knob in ("resume", "branch")
    )
    is_start_given = {
        "resume=": bool(resume),
        "branch=": bool(branch),
        "--config": config_file is not None,
    }
    starts = [name for name, is_given in is_start_given.items() if is_given]
    if len(starts) > 1:
        raise ConfigError(f"{' and '.join(starts)} exclude each other: give one of them")
    for group, override in groups.items() if starts else ():
        if group != "precision" and not (group == "run" and branch):
            raise ConfigError(
                f"{group}={override.value()}: a recipe cannot be laid over a whole config.yaml; "
                f"set single knobs ({group}.KNOB=VALUE) or leave out {starts[0]}"
            )
    return groups, values, resume, branch


def to_typed(schema: type, base: Any, overrides: Sequence[Any]) -> Any:
    """An instance of the dataclass `schema`, filled from `base` and then from Hydra overrides.

    Raises ConfigError for an unknown knob, a value of a wrong type, and a knob that is not set.
    """
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


def _is_group(override: Any) -> bool:
    """Whether an override selects a recipe file (`model=tiny`) instead of setting a knob."""
    folder = recipes_folder() / override.key_or_group
    return (
        "." not in override.key_or_group and folder.is_dir() and isinstance(override.value(), str)
    )


def _compose_recipes(groups: Sequence[Any]) -> Any:
    from omegaconf import open_dict

    chosen, files = _chosen(groups)
    composed = copy.deepcopy(_compose_built_in(tuple(chosen)))
    with open_dict(composed):
        for group, path in files.items():
            composed[group] = load_recipe_file(group, path)
    return composed


@functools.lru_cache(64)
def _compose_built_in(chosen: tuple[str, ...]) -> Any:
    """The built-in recipes of these selections. Kept: the cells of a sweep ask again and again, and
    Hydra takes two thirds of the time of a cell. Copy the result before changing it."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(recipes_folder()), version_base="1.3"):
            return compose("pretrain", overrides=list(chosen))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the recipes do not compose: {str(error).splitlines()[0]}") from error


def _chosen(groups: Sequence[Any]) -> tuple[list[str], dict[str, Path]]:
    """The selections of built-in recipes as Hydra overrides, and the users' own files by group."""
    chosen, files = [], {}
    fields = {field.name for field in dataclasses.fields(Config)}
    for override in groups:
        group, choice = override.key_or_group, override.value()
        if choice.endswith(RECIPE_FILE_ENDS) and group in fields:
            files[group] = Path(choice)
            continue
        choices = sorted(path.stem for path in (recipes_folder() / group).glob("*.yaml"))
        if choice not in choices:
            raise ConfigError(
                f"{group}={choice}: no such recipe{nearest(choice, choices)}; "
                f"there are {', '.join(choices)}; a file of your own is given by its path, "
                "which ends in .yaml"
            )
        # Hydra syntax: no prefix replaces a group in the defaults of pretrain.yaml, + adds another.
        chosen.append(f"{'' if group in fields else '+'}{group}={choice}")
    return chosen, files


def _recipe_layers(groups: Sequence[Any]) -> list[Layer]:
    """The files that `_compose_recipes` merges, in merge order."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode

    chosen, files = _chosen(groups)
    try:
        with initialize_config_dir(str(recipes_folder()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list("pretrain", chosen, RunMode.RUN).defaults
    except HydraException as error:
        raise ConfigError(f"the recipes do not compose: {str(error).splitlines()[0]}") from error
    result = []
    for default in defaults:
        name, package = default.config_path or "", default.package or ""
        if not name.startswith("hydra/"):
            path = recipes_folder() / f"{name}.yaml"
            tree = _raw(load_yaml(path, name))
            tree.pop("defaults", None)
            result.append(Layer(str(path), _nested(package, tree) if package else tree))
    for group, path in files.items():
        result.append(Layer(f"{group}={path}", {}, group))
        chain = recipe_chain(group, path)
        result += [Layer(str(file), _nested(group, _raw(tree))) for file, tree in chain]
    return result


def _raw(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _nested(knob: str, value: Any) -> dict[str, Any]:
    for name in reversed(knob.split(".")):
        value = {name: value}
    return value


def _load_run_config(folder: Path) -> Any:
    """config.yaml of the run folder to resume, with the current location of that folder."""
    base = _load_from_run(folder, f"resume={folder}")
    base.update({"name": folder.resolve().name, "folder": str(folder.parent)})
    base.update({"resume": str(folder)})
    return base


def _load_parent_config(branch: str) -> Any:
    """config.yaml of the run to branch from, with the precision plan of its checkpoint and a name
    for the new run that contains the parent's name and step."""
    folder, step = parse_branch(branch)
    base = _load_from_run(folder, f"branch={branch}", step)
    name = f"{folder.resolve().name}_at_{step}_${{precision.name}}"
    base.update({"name": name, "folder": str(folder.parent), "branch": f"{folder}@{step}"})
    base.update({"fresh_data": False, "weights_only": False})  # not inherited from the parent
    return base


def _load_from_run(folder: Path, requested_by: str, before_step: int | None = None) -> Any:
    """config.yaml of a run folder, with the precision plan and the data phases that later starts
    (before `before_step`, if given) have recorded."""
    from omegaconf import OmegaConf

    if not folder.is_dir():
        raise ConfigError(f"{requested_by}: no such run folder")
    base = load_yaml(folder / "config.yaml", requested_by, Config, resolvers=False)
    apply_recorded(base, folder, before_step)
    # These knobs applied to one earlier process, not to the run.
    one_time_knobs = {"train": {"stop_after_steps": 0}, "switch_precision": False}
    return OmegaConf.merge(base, one_time_knobs)


def _set_knob(config: Any, override: Any) -> None:
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import ValidationError

    key, value = override.key_or_group, override.value()
    try:
        if override.is_add():  # adds an entry to a table such as precision.rules
            for name in reversed(key.split(".")):
                value = {name: value}
            with open_dict(config):
                config.merge_with(value)
        else:
            OmegaConf.update(config, key, value)
    except ValidationError as error:
        raise ConfigError(f"{override.input_line}: {str(error).splitlines()[0]}") from error


def _knobs(config: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import OmegaConf

    for key in config:
        yield f"{prefix}{key}"
        # Before the recipes are merged, the target of an interpolation may be missing.
        unset = OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key)
        if not unset and OmegaConf.is_dict(config[key]):
            yield from _knobs(config[key], f"{prefix}{key}.")


def _as_config_error(error: Exception, knobs: Sequence[str]) -> ConfigError:
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    knob = getattr(error, "full_key", None) or "the configuration"
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return ConfigError(f"{knob}: there is no such knob{nearest(knob, knobs)}")
    return ConfigError(f"{knob}: {str(error).splitlines()[0]}")
