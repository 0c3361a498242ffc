"""Values by the type of the knob, not by the spelling that YAML or Hydra would guess from."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.config.schema import Config, GemmFormat, PrecisionRule, RecomputeMode
from nemotron_train.config.typed_values import knob_names, knob_type, typed_value, whole_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("262144", 262144),
        ("262_144", 262144),
        ("2e6", 2_000_000),
        ("2.5e3", 2500),
        ("1E+2", 100),
        ("012345", 12345),
        ("-3", -3),
        ("1e23", 10**23),
        ("2.5", None),
        ("4:00:00", None),
        ("inf", None),
        ("nan", None),
        ("", None),
        ("1e999999999", None),
        ("0x10", None),
    ],
)
def test_whole_numbers(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@given(st.integers(-(10**20), 10**20))
def test_every_integer_is_itself(number: int) -> None:
    assert whole_number(str(number)) == number == whole_number(f"{number:_}")


@pytest.mark.parametrize(
    ("knob", "kind"),
    [
        ("name", str),
        ("train.total_tokens", int),
        ("precision.rules.anything", PrecisionRule),
        ("precision.rules.anything.fprop", GemmFormat),
        ("train.recompute.moe", RecomputeMode),
        ("trian.total_tokens", None),
        ("train.total_tokens.more", None),
    ],
)
def test_types_of_knobs(knob: str, kind: object) -> None:
    assert knob_type(Config, knob) is kind


def test_names_of_knobs_have_types() -> None:
    names = knob_names(Config)
    assert "train.recompute.moe" in names
    assert all(knob_type(Config, name) is not None for name in names)


@dataclass
class Inner:
    label: str = ""
    count: int = 0


@dataclass
class Outer:
    texts: list[str] = field(default_factory=list)
    table: dict[str, str] = field(default_factory=dict)
    inner: list[Inner] = field(default_factory=list)
    share: float = 0.0


def test_lists_and_tables() -> None:
    value = {"texts": [1.1, False, "a"], "table": {5349: True}, "inner": [{"label": 14400}]}
    text = {
        "texts": ["1.10", "no", "a"],
        "table": {"012345": "yes"},
        "inner": [{"label": "4:00:00"}],
    }
    assert typed_value(Outer, value, text) == {
        "texts": ["1.10", "no", "a"],
        "table": {"012345": "yes"},
        "inner": [{"label": "4:00:00"}],
    }


def test_what_does_not_fit_stays_as_typed_for_the_message() -> None:
    assert typed_value(int, 14400, "4:00:00") == "4:00:00"
    assert typed_value(float, 14400, "4:00:00") == "4:00:00"
    assert typed_value(float, float("inf"), ".inf") == float("inf")


def test_interpolations_pass() -> None:
    assert typed_value(str, "${model.name}_x", "${model.name}_x") == "${model.name}_x"
    assert typed_value(int, "${train.seed}", "${train.seed}") == "${train.seed}"
