"""Data that changes during a run: an accidental change is refused by name, an intended one is a new
phase.

Second truth: a run, or an order of samples, that had both phases from its start. One rank; the
order does not depend on the ranks (tests/data/test_batches.py).
"""

import copy
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron_train.cli.data import run_prepare
from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import BlendSource, DataPhase
from nemotron_train.data.batches import BatchSource
from nemotron_train.data.fingerprint import changed_data
from nemotron_train.data.prepare import PrepareConfig
from nemotron_train.train.stop import SIGNALS

Small = tuple[Path, list[str]]
Metrics = Callable[[Path], list[dict]]
FIRST = "{from_tokens: 0, blend: [{path: data, weight: 1.0}]}"
LATER = "{from_tokens: 1536, blend: [{path: data, weight: 1.0}, {path: other, weight: 3.0}]}"
BOTH = f"data.phases=[{FIRST},{LATER}]"


@pytest.fixture(autouse=True, scope="module")
def in_small_run(small_run: Small) -> Iterator[None]:
    """Changes to the small run's folder, where `other` lies beside `data`: same tokenizer, other
    text."""
    before, handlers = Path.cwd(), [(number, signal.getsignal(number)) for number in SIGNALS]
    os.chdir(small_run[0])
    Path("other.txt").write_text("\n\n".join(f"line {n} of other text" * 9 for n in range(99)))
    run_prepare(
        PrepareConfig(
            input="other.txt",
            output="other",
            tokenizer="data/tokenizer",
            validation_fraction=0.1,
            workers=1,
        )
    )
    yield
    os.chdir(before)
    for number, handler in handlers:
        signal.signal(number, handler)


def source(phases: list[DataPhase], words: list[str]) -> BatchSource:
    config = compose_config(words)
    config.data.phases = phases
    return BatchSource(
        config.data, sequence_length=64, seed=config.train.seed, split="train", vocab_size=512
    )


def test_a_phase_added_later_loses_and_repeats_nothing(small_run: Small) -> None:
    """Ids and origins of every sample equal those of an order that had the phase from its start."""
    first = DataPhase(0, [BlendSource("data", 1.0)])
    later = DataPhase(1536, [BlendSource("data", 1.0), BlendSource("other", 3.0)])
    known, short = source([first, later], small_run[1]), source([first], small_run[1])
    whole, _ = known.take(known.state_at_start(), 60)
    one, state = short.take(short.state_at_start(), 20)
    two, _ = known.take(state, 40)
    for name in ("sample_ids_B", "origins_B3", "tokens_BS"):
        joined = np.concatenate([getattr(one, name), getattr(two, name)])
        assert np.array_equal(joined, getattr(whole, name)), name
    assert len({tuple(row) for row in whole.origins_B3.tolist()}) == 60
    with pytest.raises(ConfigError, match="a new phase must begin later"):
        known.take(short.take(state, 10)[1], 1)


def test_an_intended_phase_joins_a_run(
    small_run: Small, metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped at step 3 without the phase, resumed with it, then resumed without naming it."""
    assert main(["pretrain", *small_run[1], "name=knew", BOTH]) == 0
    assert main(["pretrain", *small_run[1], "name=learned", "train.stop_after_steps=3"]) == 3
    assert main(["pretrain", "resume=runs/learned", BOTH, "train.stop_after_steps=1"]) == 3
    assert "phases were added" in capsys.readouterr().out
    assert main(["pretrain", "resume=runs/learned"]) == 0
    rows = [row for row in metrics(Path("runs/learned")) if "loss" in row]
    assert rows == metrics(Path("runs/knew"))


def test_a_silent_change_is_refused_by_name(
    small_run: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder at the same path holds other tokens than when the run stopped."""
    words = [*small_run[1], "name=swapped", "data.phases=[{from_tokens: 0, blend: [{path: mine}]}]"]
    shutil.copytree("data", "mine")
    assert main(["pretrain", *words, "train.stop_after_steps=1"]) == 3
    shutil.rmtree("mine")
    shutil.copytree("other", "mine")
    capsys.readouterr()
    assert main(["pretrain", *words]) == 2
    message = capsys.readouterr().err.strip()
    assert "data.phases[0].blend: mine holds other tokens than before" in message
    assert len(message.splitlines()) == 1


def _described() -> dict[str, Any]:
    blend = [{"path": "a", "weight": 1.0, "data": "x"}, {"path": "b", "weight": 2.0, "data": "y"}]
    phases = [{"from_tokens": 0, "blend": blend}, {"from_tokens": 9, "blend": blend}]
    return copy.deepcopy({"sequence_length": 64, "seed": 1, "tokenizer": "t", "phases": phases})


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (["seed"], 2, "train.seed was 1, now 2"),
        (["sequence_length"], 32, "train.sequence_length was 64, now 32"),
        (["tokenizer"], "u", "data.tokenizer was t, now u"),
        (["phases", 1, "from_tokens"], 7, "data.phases[1].from_tokens was 9, now 7"),
        (["phases", 0, "blend", 1, "weight"], 3.0, "the weight of b was 2.0, now 3.0"),
        (["phases", 0, "blend", 1, "data"], "z", "b holds other tokens"),
        (["phases", 0, "blend"], [], "data.phases[0].blend: a is gone"),
        (["phases"], [], "data.phases[0] is gone"),
    ],
)
def test_every_change_has_words(where: list[Any], value: Any, words: str) -> None:
    before, now = _described(), _described()
    place = now
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert words in changed_data(before, now, 1)


def test_what_does_not_matter_is_no_change() -> None:
    """Later phases and the location of a folder do not count as changes."""
    before, now = _described(), _described()
    now["phases"][1]["from_tokens"] = 5
    now["phases"].append(now["phases"][0])
    now["phases"][0]["blend"][0]["path"] = "moved/a"
    assert changed_data(before, now, 0) == ""
    now["phases"][0]["blend"].append({"path": "c", "weight": 1.0, "data": "z"})
    assert "c is new" in changed_data(before, now, 0)
    now["phases"][0]["blend"] = now["phases"][0]["blend"][1::-1]
    assert "the order was a, b" in changed_data(before, now, 0)
