"""Recipe files and stored configurations on disk: lookup, loading and error messages.

Owns: the recipes folder, and users' own recipe files with the recipes that they list under
`defaults`. Does not own: Hydra's composition of the built-in recipes, or the grammar of overrides
(both in `compose`). OmegaConf is imported only when needed.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.config.typed_values import knob_type
from nemotron_train.config.yaml_file import load_yaml

RECIPE_FILE_ENDS = (".yaml", ".yml")


def recipes_folder() -> Path:
    """The folder of built-in recipes: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load_recipe_file(group: str, path: Path) -> Any:
    """Load a user's recipe file. Like a built-in recipe, it may list recipes of its group under
    `defaults` and override some of their knobs. Raises ConfigError (see `load_yaml`)."""
    from omegaconf import OmegaConf

    return OmegaConf.merge({}, *(tree for _, tree in recipe_chain(group, path)))


def recipe_chain(group: str, path: Path) -> list[tuple[Path, Any]]:
    """(path, contents) of each file that a user's recipe is merged from, in merge order. Raises
    ConfigError (see `load_yaml`)."""
    loaded = load_yaml(path, f"{group}={path}", knob_type(Config, group))
    defaults = list(loaded.pop("defaults", []))
    chain: list[tuple[Path, Any]] = []
    for name in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if name == "_self_":
            chain.append((path, loaded))
        else:
            chain += recipe_chain(group, recipes_folder() / group / f"{name}.yaml")
    return chain


def with_run_recipe(base: Any, choice: str) -> Any:
    """`base`, the configuration of a parent run, with the knobs of recipes/run/CHOICE.yaml (or of a
    user's file) merged over it."""
    from omegaconf import OmegaConf

    return OmegaConf.merge(base, load_run_recipe(choice)[1])


def load_run_recipe(choice: str) -> tuple[Path, Any]:
    """Path and contents of a run recipe, given by its name or by the path of a file.

    Raises ConfigError if there is no such recipe, or if it selects other recipes under `defaults`.
    """
    path = Path(choice)
    if not choice.endswith(RECIPE_FILE_ENDS):
        choices = sorted(file.stem for file in (recipes_folder() / "run").glob("*.yaml"))
        if choice not in choices:
            raise ConfigError(
                f"run={choice}: no such recipe{nearest(choice, choices)}; "
                f"there are {', '.join(choices)}"
            )
        path = recipes_folder() / "run" / f"{choice}.yaml"
    recipe = load_yaml(path, f"run={choice}", Config)
    if "defaults" in recipe:
        raise ConfigError(
            f"run={choice}: picks other recipes, which cannot be laid over a parent's "
            "configuration; a branch takes a run recipe of single knobs, such as "
            "run=context_extension"
        )
    return path, recipe


def nearest(name: str, names: Sequence[str]) -> str:
    """' (did you mean NAME?)' with the closest of `names`, or ''."""
    leaf = name.rpartition(".")[2]
    close = [known for known in names if known.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
