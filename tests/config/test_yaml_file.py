"""YAML files of anyone: types by knob, bounded aliases, no resolvers in stored configurations."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from nemotron_train.config.cluster import ClusterConfig
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.config.yaml_file import load_yaml

BOMB = 'a: &a ["x","x","x","x","x","x","x","x","x"]\n' + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in pairwise("abcdefghi")
)


def written(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text)
    return path


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    """300 bytes that expand to 9^9 entries."""
    start = time.monotonic()
    with pytest.raises(ConfigError, match="100,000 entries"):
        load_yaml(written(tmp_path, BOMB), "--config")
    assert time.monotonic() - start < 5


def test_a_circular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"file\.yaml"):
        load_yaml(written(tmp_path, "a: &a [*a]\n"), "--config")


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"file\.yaml"):
        load_yaml(written(tmp_path, "a: " + "[" * 20_000 + "]" * 20_000), "--config")


def test_aliases_of_a_reasonable_size_work(tmp_path: Path) -> None:
    loaded = load_yaml(written(tmp_path, "a: &a {x: 1}\nb: *a\n"), "--config")
    assert loaded.b.x == 1


@pytest.mark.parametrize("form", ["${oc.env:SECRET_KEY}", "${ oc.env:HOME}", "x${oc.decode:1}"])
def test_a_stored_configuration_calls_no_resolver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    path = written(tmp_path, f"name: '{form}'\n")
    with pytest.raises(ConfigError, match="resolver") as caught:
        load_yaml(path, "runs/a", Config, resolvers=False)
    assert "hunter2" not in str(caught.value)


def test_interpolations_of_knobs_are_no_resolvers(tmp_path: Path) -> None:
    path = written(tmp_path, "name: '${model.name}_x'\nmodel: {name: a}\n")
    assert load_yaml(path, "runs/a", Config, resolvers=False).name == "a_x"


def test_a_cluster_file_keeps_its_text(tmp_path: Path) -> None:
    text = (
        "name: 2024_01\naccount: 012345\npartition: no\nqos: 1e3\nenvironment: {A: 1.10, B: yes}\n"
    )
    loaded = load_yaml(written(tmp_path, text), "cluster=c", ClusterConfig)
    assert loaded.account == "012345" and loaded.partition == "no" and loaded.qos == "1e3"
    assert loaded.environment == {"A": "1.10", "B": "yes"}


@pytest.mark.parametrize("text", ["3", "[1, 2]", "just words"])
def test_a_file_without_a_table_is_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="holds no configuration"):
        load_yaml(written(tmp_path, text), "--config", Config)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert dict(load_yaml(written(tmp_path, "# nothing\n"), "--config", Config)) == {}
