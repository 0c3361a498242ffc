"""Recipe files and stored configurations on disk: finding them, reading them, naming what is wrong.

Owns: the recipes folder, a recipe of the user's own with what it names under `defaults`. Does not
own: Hydra's composition of ours, nor the grammar of overrides (`compose`). OmegaConf is imported
when needed.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError

RECIPE_FILE_ENDS = (".yaml", ".yml")


def recipes_folder() -> Path:
    """The folder of recipes: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load_recipe_file(group: str, path: Path) -> Any:
    """A recipe of the user's own. Like ours it may name others of its group under `defaults`, and
    then says only what differs."""
    from omegaconf import OmegaConf

    return OmegaConf.merge({}, *(tree for _, tree in recipe_chain(group, path)))


def recipe_chain(group: str, path: Path) -> list[tuple[Path, Any]]:
    """The files that a recipe of the user's own is merged from, in order."""
    loaded = load_yaml(path, f"{group}={path}")
    defaults = list(loaded.pop("defaults", []))
    chain: list[tuple[Path, Any]] = []
    for name in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if name == "_self_":
            chain.append((path, loaded))
        else:
            chain += recipe_chain(group, recipes_folder() / group / f"{name}.yaml")
    return chain


def with_run_recipe(base: Any, choice: str) -> Any:
    """The knobs of recipes/run/CHOICE.yaml (or a file of the user's own) laid over a parent's
    configuration."""
    from omegaconf import OmegaConf

    return OmegaConf.merge(base, load_run_recipe(choice)[1])


def load_run_recipe(choice: str) -> tuple[Path, Any]:
    path = Path(choice)
    if not choice.endswith(RECIPE_FILE_ENDS):
        choices = sorted(found.stem for found in (recipes_folder() / "run").glob("*.yaml"))
        if choice not in choices:
            raise ConfigError(
                f"run={choice}: no such recipe{nearest(choice, choices)}; "
                f"there are {', '.join(choices)}"
            )
        path = recipes_folder() / "run" / f"{choice}.yaml"
    recipe = load_yaml(path, f"run={choice}")
    if "defaults" in recipe:
        raise ConfigError(
            f"run={choice}: picks other recipes, which cannot be laid over a parent's "
            "configuration; a branch takes a run recipe of single knobs, such as "
            "run=context_extension"
        )
    return path, recipe


def load_yaml(path: Path, asked: str) -> Any:
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


def nearest(name: str, names: Sequence[str]) -> str:
    """« (did you mean x?)» for the closest known name, or nothing."""
    leaf = name.rpartition(".")[2]
    close = [known for known in names if known.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
