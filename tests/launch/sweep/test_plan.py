"""Sweeps: the grid against itertools, the shipped recipes against the model's arithmetic, mistakes
found before the first run, and real sweeps, one of them with a branch. Not covered: Slurm
(tests/launch/sweep/test_slurm.py and tests/slurm), a keyboard interrupt, the results of the
recipes.
"""

import dataclasses
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config, recipes_folder
from nemotron_train.compose.overrides import parse_overrides
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config
from nemotron_train.launch.sweep import local
from nemotron_train.launch.sweep import plan as sweep_module
from nemotron_train.launch.sweep.local import cores_for, run_here
from nemotron_train.launch.sweep.plan import is_finished, plan_sweep
from nemotron_train.plan.architecture.layers import forward_flops, linears, parameters
from nemotron_train.report.gap.gap import gaps
from nemotron_train.report.gap.pairs import read_sweep
from nemotron_train.run_folder.lineage import read_lineage
from tests import warm_process

Small = tuple[Path, list[str]]


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """The runs of a sweep are processes of their own that need not import torch again."""
    with warm_process.in_place_of_subprocess(local):
        yield


def test_grid_is_the_product_of_all_values() -> None:
    """Every combination occurs once, whatever is swept. Values reach the composed configuration."""
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
    assert {cell.baseline for cell in sweep.cells} == {"128-bf16"}, "the first, unless named"


@pytest.mark.parametrize("name", [f.stem for f in (recipes_folder() / "sweep").glob("*.yaml")])
def test_every_sweep_composes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` plans every cell. Each group has a baseline with the same seeds."""
    assert main(["sweep", f"sweep={name}", "--dry-run"]) == 0
    cells = plan_sweep([f"sweep={name}"]).cells
    printed = capsys.readouterr().out.splitlines()
    assert printed == [" ".join(cell.overrides) for cell in cells]
    seeds = {
        group: {c.seed for c in cells if c.group == group} for group in {c.group for c in cells}
    }
    for cell in cells:
        assert cell.baseline in seeds and seeds[cell.baseline] == seeds[cell.group]


def test_given_values_replace_the_recipes() -> None:
    """Extra cells take the other values of the grid and vary with the swept values."""
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
        (["train.seed=1,x"], ("train.seed=1,x", "whole numbers")),
        (["train.seed=1", "name=a,b"], ("name=a,b", "one value")),
        (["train.seed=1", "launcher=ssh"], ("launcher=ssh", "local or slurm")),
        (["train.seed=1", "cluster=local_lab"], ("cluster=local_lab", "launcher=slurm")),
        (["train.seed=1", "variant=x"], ("variant=x", "there are none")),
        (["sweep=scale_ladder", "variant=width65"], ("variant=width65", "width64")),
        (["sweep=branch_bf16", "train.save_every_steps=7"], ("step 64", "save_every_steps")),
        (["sweep=branch_bf16", "train.keep_checkpoints=2"], ("keep_checkpoints=2", "4 or more")),
        (["sweep=branch_bf16", "train.total_tokens=262144"], ("step 128", "128 steps")),
        (["sweep=branch_bf16", "precision=bf16,nvfp4_all"], ("nvfp4_nemotron3", "no such cell")),
    ],
)
def test_mistakes_show_before_anything_runs(overrides: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_sweep(overrides)
    assert len(str(raised.value).splitlines()) == 1
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "at_once, threads, cores, expected",
    [
        (1, 0, 8, (1, 8)),
        (2, 0, 8, (2, 4)),
        (3, 0, 8, (3, 2)),
        (16, 0, 8, (8, 1)),
        (4, 4, 8, (2, 4)),
        (2, 16, 8, (1, 8)),
    ],
)
def test_runs_at_once_have_cores(
    at_once: int, threads: int, cores: int, expected: tuple[int, int]
) -> None:
    sweep = plan_sweep([f"at_once={at_once}", f"train.threads={threads}", "train.seed=1,2"])
    assert cores_for(sweep, cores) == expected


def test_pretrain_points_to_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "train.seed=1,2"]) == 2
    assert "nemotron-train sweep" in capsys.readouterr().err


def test_runs_what_is_missing_and_keeps_failures(
    small_run: Small,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two good cells are trained once and compared. The cell that cannot work is named, sets the
    exit code, and does not stop the others."""
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


# The shipped recipes ---------------------------------------------------------------------------


def configs(name: str) -> dict[str, Config]:
    """The configuration of one cell of each group."""
    return {cell.group: cell.config for cell in plan_sweep([f"sweep={name}"]).cells}


def test_scale_ladder_has_the_same_tokens_a_parameter() -> None:
    """Half a token per active parameter, to a thousandth. Widths are in proportion. Warm-up and
    decay take 8 and 25 % of the steps. Each width is compared with its own BF16."""
    found = configs("scale_ladder")
    assert set(found) == {f"width{w}-{p}" for w in (64, 128, 192) for p in PLANS}
    for config in found.values():
        active = parameters(config.model).active_with_embeddings
        assert config.train.total_tokens / active == pytest.approx(0.5, rel=1e-3)
        model = config.model
        assert model.hidden_size == 32 * model.attention.heads == 16 * model.mamba.heads
        for tokens, share in (
            (config.optim.warmup_tokens, 0.08),
            (config.optim.decay_tokens, 0.25),
        ):
            assert tokens / config.train.total_tokens == pytest.approx(share, abs=0.002)
    for cell in plan_sweep(["sweep=scale_ladder"]).cells:
        assert cell.baseline == f"{cell.group.partition('-')[0]}-bf16"


PLANS = ("bf16", "nvfp4_nemotron3")


def test_latent_moe_costs_what_the_standard_one_does() -> None:
    """N' = N r and K' = K r. The routed experts of a token cost the same FLOPs, bytes and messages,
    and `latent_equal` has the same cost in everything. The numbers are those of the recipe's
    comment."""
    found = configs("latent_moe")
    standard, latent, equal = (found[name] for name in ("standard", "latent", "latent_equal"))
    ratio = standard.model.hidden_size // latent.model.moe.latent_size
    assert ratio == 4
    assert latent.model.moe.experts == ratio * standard.model.moe.experts
    assert latent.model.moe.experts_per_token == ratio * standard.model.moe.experts_per_token
    routed, layer, sent, held = {}, {}, {}, {}
    for name, config in found.items():
        moe = config.model.moe
        first = [x for x in linears(config.model) if x.path.startswith("decoder.layers.1.mlp.")]
        experts = [x for x in first if ".experts." in x.path]
        assert len(experts) == 2
        routed[name] = sum(x.flops for x in experts)
        held[name] = sum(x.weight.parameters for x in experts)
        layer[name] = sum(x.flops for x in first)
        sent[name] = moe.experts_per_token * (moe.latent_size or config.model.hidden_size)
    assert set(routed.values()) == {196_608} and set(held.values()) == {786_432}
    assert set(sent.values()) == {384}
    assert layer == {"standard": 399_360, "latent": 454_656, "latent_equal": 399_360}
    length = standard.train.sequence_length
    assert forward_flops(equal.model, length) == forward_flops(standard.model, length)
    assert parameters(equal.model).total_with_mtp == parameters(standard.model).total_with_mtp
    assert (
        parameters(equal.model).active_with_embeddings
        == parameters(standard.model).active_with_embeddings
    )


def test_branches_wait_for_their_trunk_and_share_its_seed() -> None:
    cells = {cell.name: cell for cell in plan_sweep(["sweep=branch_bf16"]).cells}
    branches = [cell for cell in cells.values() if cell.after]
    assert len(branches) == 9 and len(cells) == 15
    for cell in branches:
        trunk = cells[cell.after]
        assert trunk.seed == cell.seed == cell.config.train.seed and trunk.group == cell.baseline
        assert list(cells).index(trunk.name) < list(cells).index(cell.name)
        step = int(cell.group.rpartition("_")[2])
        assert cell.config.branch == f"runs/branch_bf16/{trunk.name}@{step}"
        assert str(cell.config.precision.name) == "bf16"
        assert cell.config.model == trunk.config.model


def test_a_value_as_baseline_holds_each_group_to_its_own() -> None:
    """Sizes by a recipe group, as on the command line, and cells outside the grid."""
    grid = ["model=tiny,proxy_10m", "precision=bf16,nvfp4_all", "baseline=bf16"]
    assert {cell.group: cell.baseline for cell in plan_sweep(grid).cells} == {
        "tiny-bf16": "tiny-bf16",
        "tiny-nvfp4_all": "tiny-bf16",
        "proxy_10m-bf16": "proxy_10m-bf16",
        "proxy_10m-nvfp4_all": "proxy_10m-bf16",
    }
    beside = plan_sweep(["sweep=loss_gap", "model=tiny,proxy_10m", "precision=bf16,mxfp8"])
    extra = {c.group: c.baseline for c in beside.cells if "other_sums" in c.group}
    assert extra == {f"bf16_other_sums-{m}": f"bf16-{m}" for m in ("tiny", "proxy_10m")}
    crossed = plan_sweep(["sweep=latent_moe", "precision=bf16,mxfp8", "variant=standard,latent"])
    held = {cell.group: cell.baseline for cell in crossed.cells}
    assert held["latent-mxfp8"] == "standard-mxfp8" and held["latent-bf16"] == "standard-bf16"
    batches = "train.micro_batch_sequences=2,4"  # the cells outside the grid fix this knob
    with pytest.raises(ConfigError, match="bf16_other_sums would be held to bf16, and"):
        plan_sweep(["sweep=loss_gap", "precision=bf16,mxfp8", batches])


# Real runs -------------------------------------------------------------------------------------


def test_a_branch_runs_after_its_trunk(
    small_run: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This holds although two runs may go at once. The branch is composed before its trunk starts;
    its configuration equals the one composed from the trunk's folder afterwards. A trunk that fails
    is reported with its branches, and the other seed continues."""
    folder, overrides = small_run
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/small.yaml").write_text(
        "branches:\n  late: {of: bf16, step: 4, overrides: [precision=nvfp4_all]}\n"
    )
    monkeypatch.setattr(sweep_module, "recipes_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    os.symlink(folder / "data", tmp_path / "data")
    asked = [
        "sweep=small",
        "at_once=2",
        *overrides,
        "train.save_every_steps=4",
        "precision=bf16,mxfp8",
    ]
    asked += ["train.keep_checkpoints=9", "train.seed=1,2"]
    # The second trunk cannot start: a file lies where its run folder should be.
    (tmp_path / "runs/small").mkdir(parents=True)
    (tmp_path / "runs/small/bf16-seed2").write_text("")
    planned = plan_sweep(asked)
    [before] = [cell for cell in planned.cells if cell.name == "late-seed1"]
    console = Console(file=io.StringIO(), width=200)
    keep = {"bf16-seed1", "bf16-seed2", "late-seed1", "late-seed2"}
    four = dataclasses.replace(planned, cells=[c for c in planned.cells if c.name in keep])
    assert sorted(run_here(four, console)) == ["bf16-seed2", "late-seed2"]
    said = console.file.getvalue()
    assert said.index("ended bf16-seed1") < said.index("started late-seed1")
    assert "not started late-seed2: bf16-seed2 is not finished" in said
    branch = tmp_path / "runs/small/late-seed1"
    assert is_finished(branch)
    assert read_lineage(branch)["branched_from"]["step"] == 4
    [after] = [cell for cell in plan_sweep(asked).cells if cell.name == "late-seed1"]
    again = dataclasses.replace(after.config, train=before.config.train)
    assert again == before.config, "but for the threads, which the trunk was told"
    assert after.config.train.threads == 1


@given(
    st.text(
        st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="$"), min_size=1
    )
)
def test_a_quoted_value_comes_back(value: str) -> None:
    """Hydra's own parser reads the value back, whatever quotes and backslashes it contains."""
    [parsed] = parse_overrides([f"folder={sweep_module._quoted(value)}"], Config)
    assert parsed.value() == value
