"""Differences of configurations, knob by knob. Which of them a run accepts: tests/run_folder."""

from nemotron_train.config.knobs import adds_phases, differences


def test_differences_name_every_knob_of_either_side() -> None:
    """A table that loses an entry (a rule of the precision plan) has changed."""
    old = {"name": "a", "rules": {"first": {"format": "bf16"}, "second": 1}, "same": [1, 2]}
    new = {"name": "b", "rules": {"second": 1}, "same": [1, 2], "added": 0.5}
    assert differences(old, new) == {
        "name": ["a", "b"],
        "rules.first": [{"format": "bf16"}, None],
        "added": [None, 0.5],
    }
    assert differences(old, old) == {}


def test_phases_may_be_added_after_those_that_are_there() -> None:
    first, second, other = {"from_tokens": 0}, {"from_tokens": 9}, {"from_tokens": 5}
    assert adds_phases("data.phases", [first], [first, second])
    assert not adds_phases("data.phases", [first], [other, second])
    assert not adds_phases("data.phases", [first, second], [first])
    assert not adds_phases("precision.phases", [first], [first, second])
