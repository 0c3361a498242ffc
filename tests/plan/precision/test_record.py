"""The record of a precision plan in a checkpoint: one digest per plan, whatever file it comes from.

Second truth: plans are equal or not by the formats that `resolve_plan(...).at(tokens)` gives every
linear. Not covered: how a run uses the record (tests/run_folder/test_branch.py).
"""

import itertools
import json

import pytest

from nemotron_train.compose.compose import compose_config, recipes_folder
from nemotron_train.config.schema import Config
from nemotron_train.plan.precision.record import label, plan_record
from nemotron_train.plan.precision.resolve import resolve_plan

PLANS = sorted(path.stem for path in (recipes_folder() / "precision").glob("*.yaml"))


def config_of(*overrides: str) -> Config:
    return compose_config(["optim.decay_tokens=1000", *overrides])


def resolved(config: Config) -> object:
    """The full content of a plan without its name."""
    phases = [
        (start, resolve_plan(config).at(start).formats) for start in resolve_plan(config).boundaries
    ]
    return config.precision.parameter_dtype, phases


def test_digests_differ_exactly_where_ready_plans_do() -> None:
    configs = [config_of(f"precision={plan}") for plan in PLANS]
    for one, other in itertools.combinations(configs, 2):
        same = (
            plan_record(resolve_plan(one))["digest"] == plan_record(resolve_plan(other))["digest"]
        )
        assert same == (resolved(one) == resolved(other)), (one.precision, other.precision)


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (["precision.name=renamed"], True),
        (["precision.rules.mtp.enabled=false"], False),
        (["precision.default.hadamard=false"], False),
        (["precision.default.weight_2d=false"], False),
        (["precision.default.stochastic_rounding=false"], False),
        (["precision.rules.mamba_out.dgrad=bf16"], False),
        (["precision.phases=[{from_tokens: 4096, at_least: {fprop: bf16}}]"], False),
        (["train.seed=7", "optim.peak_learning_rate=1.0"], True),
    ],
)
def test_what_changes_the_digest(overrides: list[str], same: bool) -> None:
    plain = plan_record(resolve_plan(config_of("precision=nvfp4_nemotron3")))
    changed = plan_record(resolve_plan(config_of("precision=nvfp4_nemotron3", *overrides)))
    assert (changed["digest"] == plain["digest"]) == same


def test_rules_said_in_other_words_are_the_same_plan() -> None:
    """Mamba in BF16 and everything else in NVFP4, by a rule for Mamba or by rules for all other
    linears."""
    kinds = ("attention", "moe", "mtp_projection")
    rules = [f"+precision.rules.{kind}={{layer_type: {kind}, format: nvfp4}}" for kind in kinds]
    mamba = "+precision.rules.mamba={layer_type: mamba, format: bf16}"
    one = plan_record(resolve_plan(config_of("precision=nvfp4_all", mamba)))
    other = plan_record(resolve_plan(config_of("precision=bf16", *rules)))
    assert one["digest"] == other["digest"] and one["name"] != other["name"]


def test_record_is_json_and_says_everything() -> None:
    """Read back from JSON, the record names the products of every linear in every phase."""
    config = config_of("precision=nvfp4_bf16_forward")
    record = json.loads(json.dumps(plan_record(resolve_plan(config))))
    assert [phase["from_tokens"] for phase in record["phases"]] == resolve_plan(config).boundaries
    for phase in record["phases"]:
        for path, formats in resolve_plan(config).at(phase["from_tokens"]).formats.items():
            words = phase["linears"][path].split()
            assert words[:3] == [
                f"fprop={formats.fprop}",
                f"dgrad={formats.dgrad}",
                f"wgrad={formats.wgrad}",
            ]
            options = [o for o in ("weight_2d", "hadamard", "stochastic_rounding") if o in words]
            assert options == words[3:]
            assert all(getattr(formats, option) for option in options)
    assert label(record) == f"nvfp4_bf16_forward ({record['digest'][:12]})"
