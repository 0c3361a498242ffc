"""Sweeps: the grid against itertools, mistakes before the first run, and a real sweep that is run
twice. Not covered: Slurm; an interrupt from the keyboard."""

import itertools
import os
from pathlib import Path

import pytest

from nemotron_train.cli import main
from nemotron_train.compose import compose_config, recipes_folder
from nemotron_train.config.schema import ConfigError
from nemotron_train.launch.sweep import is_finished, plan_sweep
from nemotron_train.report.gap import gaps
from nemotron_train.report.pairs import read_sweep

Small = tuple[Path, list[str]]


def test_grid_is_the_product_of_all_values() -> None:
    """Every combination once, whatever is swept; values reach the composed configuration."""
    plans, seeds, widths = ["bf16", "nvfp4_all"], [3, 5], [128, 256]
    sweep = plan_sweep(
        [
            "name=grid",
            f"model.moe.expert_hidden_size={','.join(map(str, widths))}",
            f"precision={','.join(plans)}",
            f"train.seed={','.join(map(str, seeds))}",
        ]
    )
    found = set()
    for cell in sweep.cells:
        config = compose_config(cell.overrides)
        found.add(
            (config.model.moe.expert_hidden_size, str(config.precision.name), config.train.seed)
        )
        assert config.train.seed == cell.seed and config.name == cell.name
        assert Path(config.folder) == Path("runs/grid") == sweep.folder
    assert found == set(itertools.product(widths, plans, seeds))
    assert len({cell.name for cell in sweep.cells}) == len(sweep.cells) == 8
    assert len({cell.group for cell in sweep.cells}) == 4
    assert sweep.baseline == "128-bf16", "the first group, unless named"


@pytest.mark.parametrize("name", [f.stem for f in (recipes_folder() / "sweep").glob("*.yaml")])
def test_every_sweep_composes(name: str) -> None:
    sweep = plan_sweep([f"sweep={name}"])
    assert sweep.baseline in {cell.group for cell in sweep.cells}


def test_given_values_replace_the_recipes() -> None:
    """Extra cells take the grid's other values, and follow it in what is swept."""
    sweep = plan_sweep(["sweep=loss_gap", "precision=bf16,mxfp8", "train.seed=7,8"])
    assert [cell.name for cell in sweep.cells] == [
        "bf16-seed7",
        "mxfp8-seed7",
        "bf16-seed8",
        "mxfp8-seed8",
        "bf16_other_sums-seed7",
        "bf16_other_sums-seed8",
    ]
    again = compose_config(sweep.cells[-1].overrides)
    assert (again.train.micro_batch_sequences, str(again.precision.name)) == (2, "bf16")
    one = plan_sweep(["sweep=loss_gap", "precision=mxfp8", "baseline=bf16_other_sums"]).cells[-1]
    assert str(compose_config(one.overrides).precision.name) == "bf16", "the label says so"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sweep=loss_gab"], ("sweep=loss_gab", "loss_gap")),
        (["precision=bf16,nvfp5"], ("precision=nvfp5", "no such recipe")),
        (["train.sede=1,2"], ("train.sede", "seed")),
        (["train.seed=1,2", "model.pattern=ME*,MEX*E"], ("model.pattern", "X")),
        (["train.seed=1,1"], ("run-seed1", "once")),
        (["train.seed=1", "at_once=0"], ("at_once=0", "1 or more")),
        (["train.seed=1", "name=a/b"], ("name=a/b",)),
        (["precision=bf16,mxfp8", "baseline=bf17"], ("baseline=bf17", "bf16")),
    ],
)
def test_mistakes_show_before_anything_runs(overrides: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_sweep(overrides)
    assert len(str(raised.value).splitlines()) == 1
    for word in words:
        assert word in str(raised.value)


def test_pretrain_points_to_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "train.seed=1,2"]) == 2
    assert "nemotron-train sweep" in capsys.readouterr().err


def test_runs_what_is_missing_and_keeps_failures(
    small_run: Small,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two good cells are trained once and compared; one that cannot work is named, by the exit
    code too, and does not stop the others."""
    folder, overrides = small_run
    monkeypatch.chdir(tmp_path)
    os.symlink(folder / "data", tmp_path / "data")
    runs = tmp_path / "runs/small"
    command = ["sweep", "name=small", "at_once=2", *overrides, "train.seed=1"]
    good = [*command, "precision=bf16,nvfp4_all"]
    assert main(good) == 0
    names = ["bf16-seed1", "nvfp4_all-seed1"]
    assert all(is_finished(runs / name) for name in names)
    [comparison] = read_sweep(runs)
    found = {gap.group: gap for gap in gaps(comparison)}
    assert found["bf16"].validation == [0.0]
    assert 0 < abs(found["nvfp4_all"].validation[0]) < 0.1
    assert (runs / "gap.md").read_text().startswith("| runs |")
    assert (runs / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert "nvfp4_all-seed1" in (runs / "report.html").read_text()

    before = [(runs / name / "metrics.jsonl").stat().st_mtime_ns for name in names]
    assert main(good) == 0
    assert [(runs / name / "metrics.jsonl").stat().st_mtime_ns for name in names] == before

    longer = [text for text in good if not text.startswith("train.total_tokens")]
    assert main([*longer, "train.total_tokens=5120"]) == 2
    assert "train.total_tokens was 2560, now 5120" in capsys.readouterr().err

    others = [text for text in command if not text.startswith("data.tokenizer")]
    assert main([*others, "precision=bf16", "data.tokenizer=nowhere,data/tokenizer"]) == 1
    assert is_finished(runs / "tokenizer-seed1") and not is_finished(runs / "nowhere-seed1")
    assert "nowhere" in (runs / "nowhere-seed1.log").read_text()
