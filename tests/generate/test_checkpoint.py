"""A checkpoint opened for generation and evaluation.

Not covered: several ranks (tests/distributed/test_generate.py), messages (test_command.py).
"""

from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.config.schema import GemmFormat
from nemotron_train.generate.checkpoint import open_checkpoint
from nemotron_train.generate.engine import Engine
from nemotron_train.generate.knobs import ModelKnobs

PATH = "decoder.layers.0.mixer.in_proj"
PHASES = "precision.phases=[{from_tokens: 1024, at_least: {format: bf16}}]"


@pytest.fixture(scope="module")
def run(small_run: tuple[Path, list[str]], in_small_run: None) -> str:
    """Eight steps of 256 tokens, in NVFP4 up to step 4 and in BF16 after it."""
    words = ["name=phased", "precision=nvfp4_all", PHASES, "train.total_tokens=2048"]
    words += ["train.save_every_steps=2", "train.keep_checkpoints=9"]
    assert main(["pretrain", *small_run[1], *words]) == 0
    return "runs/phased"


@pytest.mark.parametrize(("step", "form"), [(2, GemmFormat.nvfp4), (6, GemmFormat.bf16)])
def test_a_model_computes_in_the_formats_of_its_step(run: str, step: int, form: GemmFormat) -> None:
    """By hand: 512 tokens lie before the switch at 1,024, and 1,536 after it."""
    with open_checkpoint(f"{run}@{step}", ModelKnobs(), print) as model:
        assert model.precision.attached()[PATH].products == (form, form, form)


def test_a_score_does_not_depend_on_the_sequences_beside_it(run: str) -> None:
    """NVFP4's tensor scale is one for all tokens of a pass in training. Here each token has its
    own: a long neighbour would otherwise move every score, by more than a hundredth."""
    short = list(range(3, 20))
    long = [(7 * i) % 500 for i in range(60)]
    with open_checkpoint(f"{run}@2", ModelKnobs(), print) as model:
        engine = Engine(model.model, None)
        alone = engine.log_probabilities([short])[0]
        beside = engine.log_probabilities([short, long])[0]
    assert beside == pytest.approx(alone, abs=1e-4)
