"""The same Hugging Face folder from every layout.

Second truth: the folder made from one rank's checkpoint, byte for byte. A branch saves the weights
and masters it starts with under its own layout. tests/convert covers that the folder is right.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron_train.cli.main import main

TWO = ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"]
FOUR = [*TWO, "parallel.pipeline=2"]
INTERLEAVED = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.expert_tensor=2"]
INTERLEAVED += ["parallel.tensor=2", "parallel.sequence=true"]
layouts = pytest.mark.layouts


@pytest.fixture(scope="module")
def one_rank(
    small_run: tuple[Path, list[str]], run_ranks: Callable[[list[str], Path, int], None]
) -> Path:
    folder, overrides = small_run
    words = ["-m", "nemotron_train", "pretrain", "name=hf_one_rank", *overrides]
    words += ["precision=bf16", "train.save_every_steps=2", "train.stop_after_steps=2"]
    with pytest.raises(AssertionError, match=r"\[3\]"):  # stopped on request
        run_ranks([*words, "train.threads=1"], folder, 1)
    return folder


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [
        ("TP2 EP2", 2, TWO),
        pytest.param("TP2 PP2 EP2", 4, FOUR, marks=layouts),
        pytest.param("TP2 PP2 VPP2 ETP2", 4, INTERLEAVED, marks=layouts),
    ],
)
def test_every_layout_gives_the_same_bytes(
    one_rank: Path,
    name: str,
    ranks: int,
    layout: list[str],
    run_ranks: Callable[[list[str], Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = name.replace(" ", "_")
    words = [
        "-m",
        "nemotron_train",
        "pretrain",
        "branch=runs/hf_one_rank@2",
        f"name={run}",
        *layout,
    ]
    words += ["train.micro_batch_sequences=1", "train.keep_checkpoints=9", "train.threads=1"]
    words += ["train.total_tokens=768", "optim.warmup_tokens=0", "optim.decay_tokens=0"]
    run_ranks(words, one_rank, ranks)
    shards = list((one_rank / "runs" / run / "checkpoints/step_00000002").glob("*.distcp"))
    assert len(shards) >= ranks
    monkeypatch.chdir(one_rank)
    found = {}
    for kind in ("float32", "bfloat16"):
        for source in ("hf_one_rank", run):
            out = Path("theirs") / run / source / kind
            words = ["convert", "to-hf", f"runs/{source}@2", "--out", str(out), "--dtype", kind]
            assert main([*words, "--shard-gib", "0.0001"]) == 0
            found[source] = {path.name: path.read_bytes() for path in out.iterdir()}
        assert len(found[run]) > 6 and found[run] == found["hf_one_rank"], kind
