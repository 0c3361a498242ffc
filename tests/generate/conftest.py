"""Prepares the platform before a test module imports Megatron-Core, and builds the models."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device

PLATFORM = device.prepare()


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """Builds the untrained small model with these overrides, under its plan, ready to generate. Its
    weights are large enough that logits differ by nats."""
    return _build


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Ragged prompts: one token, shorter than the depths, longer than a chunk."""
    draw = random.Random(1)
    return [[draw.randrange(512) for _ in range(length)] for length in (1, 2, 7, 40, 3)]


def _build(groups: Any, *overrides: str, tokens_apart: bool = True) -> Any:
    from nemotron_train.assemble.build import build_model
    from nemotron_train.compose.compose import compose_config
    from nemotron_train.precision.attach import PrecisionControl
    from tests.conftest import SMALL_RUN

    model_knobs = [knob for knob in SMALL_RUN if knob.startswith("model.")]
    config = compose_config([*model_knobs, "model.init_std=0.1", *overrides])
    model = build_model(config, resolve_plan(config), PLATFORM, groups)
    control = PrecisionControl([model], config, resolve_plan(config), groups)
    control.set_per_token_scales(tokens_apart)
    model.eval()
    model.control = control  # type: ignore[assignment]
    return model
