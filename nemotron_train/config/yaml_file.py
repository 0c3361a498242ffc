"""YAML files as typed OmegaConf dictionaries: recipes, cluster files, stored configurations.

A file may be anyone's: aliases are bounded (a few lines can otherwise expand to gigabytes), and in
a stored configuration no interpolation may call a resolver, which could read the environment.

Owns: reading and these limits. Does not own: which type a scalar takes (`typed_values`), what the
configuration means. No torch; OmegaConf is imported when needed.
"""

import re
from pathlib import Path
from typing import Any

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.typed_values import typed_value

MAX_NODES = 100_000  # scalars, lists and tables of a file, its aliases expanded
MAX_BYTES = 16 << 20
_RESOLVER = re.compile(r"\$\{\s*[^{}\s:]+:")


def load_yaml(path: Path, requested_by: str, kind: Any = None, *, resolvers: bool = True) -> Any:
    """Load a YAML file as an OmegaConf dictionary.

    requested_by: the option that names the file, for the error message. kind: the dataclass (or
    other type) that the file fills; a scalar then takes the type of its knob. resolvers: whether
    interpolations such as ${oc.env:HOME} are allowed.

    Raises ConfigError if the file is missing, cannot be read, is too large or is no dictionary.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{requested_by}: {path} has more than {MAX_BYTES:,} bytes")
        text = content.decode()
        _check_nodes(text, path, requested_by)
        if not resolvers and _RESOLVER.search(text):
            raise ConfigError(
                f"{requested_by}: {path} holds an interpolation that calls a resolver, such as "
                "${oc.env:NAME}, which a stored configuration must not do"
            )
        loaded = OmegaConf.create(text)
        plain = OmegaConf.to_container(loaded, resolve=False)
        typed = typed_value(kind, plain, _texts(text) or {})
    except FileNotFoundError:
        raise ConfigError(f"{requested_by}: there is no {path}") from None
    except RecursionError:
        raise ConfigError(f"{requested_by}: {path} is nested too deeply") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{requested_by}: {path} cannot be read ({reason})") from error
    return OmegaConf.create(typed)


def _texts(text: str) -> Any:
    """The file with every scalar as its source text."""
    import yaml

    return yaml.load(text, Loader=yaml.BaseLoader)  # makes strings, lists and dictionaries only


def _check_nodes(text: str, path: Path, requested_by: str) -> None:
    """Raises ConfigError if the file is no table, is circular, or has too many nodes with its
    aliases expanded."""
    import yaml

    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Any) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in open_nodes:
            raise ConfigError(f"{requested_by}: {path} contains itself through an alias")
        open_nodes.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(size(child) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{requested_by}: {path} holds no configuration")
    if root is not None and size(root) > MAX_NODES:
        raise ConfigError(
            f"{requested_by}: {path} has more than {MAX_NODES:,} entries with its aliases expanded"
        )
