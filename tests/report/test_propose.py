"""Telemetry records, their picture, and the plans proposed from them.

Second truth: an exhaustive search over all exemption lists, for the greedy choice; the command
line's own `plan`, for the file. Not covered: the look of the picture, and whether the proposed plan
trains better.
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.precision.telemetry_record import OPERANDS, flush_rates
from nemotron_train.report.plot.precision import plot_precision
from nemotron_train.report.propose import Candidate, choose
from nemotron_train.report.runs.telemetry import KINDS, kind_of, layer_of

CONFIG = compose_config(["model=tiny", "precision=bf16"])
PATHS = [
    entry.path
    for entry in resolve_plan(CONFIG).at(0).linears
    if entry.path != "output_layer" and not entry.path.endswith("router")
]


def operand(error: float, flushed: float) -> dict:
    return {
        "flush_to_zero": flushed,
        "saturated": 0.01,
        "relative_error": error,
        "snr_db": 20.0 if error else None,
        "amax": 3.0,
        "scale_histogram": [0] * 17 + [4],
    }


def make_run(folder: Path, steps: int = 4, form: str = "nvfp4", **errors: tuple[float, float]):
    """A run on tiny in which all linears have relative error 0.1 and 5 % flushed to zero. Kinds in
    `errors` have the given numbers instead."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(CONFIG)))))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            about = {"step": 10 * step, "tokens": 20480 * step}
            file.write(json.dumps(about | {"loss": 3.0, "lr": 1e-3}) + "\n")
            modules = {}
            for path in PATHS:
                error, flushed = errors.get(kind_of(path), (0.1, 0.05))
                modules[path] = {
                    form: {name: operand(error, flushed) for name in OPERANDS},
                    "zero_weight_gradients": 0.01,
                    "formats": dict.fromkeys(("fprop", "dgrad", "wgrad"), "bf16"),
                }
            record = about | {"kind": "precision", "precision_telemetry": modules}
            file.write(json.dumps(record) + "\n")
    return folder


def test_every_linear_has_a_kind_and_a_layer() -> None:
    for model in ("tiny", "super_120b_a12b"):
        config = compose_config([f"model={model}", "precision=nvfp4_all"])
        for path, formats in resolve_plan(config).at(0).formats.items():
            if formats.fprop == "nvfp4":
                assert kind_of(path) in KINDS.values(), path
    assert layer_of("decoder.layers.12.mixer.in_proj") == "12 M"
    assert layer_of("mtp.layers.0.mtp_model_layer.layers.1.mlp.fc1_latent_proj") == "mtp 1 E"
    assert layer_of("mtp.layers.0.eh_proj") == "mtp"


def test_flush_rates_are_of_what_training_quantizes() -> None:
    measured = {name: operand(0.1, 0.2) for name in OPERANDS}
    modules = {
        "a": {
            "nvfp4": measured,
            "formats": {"fprop": "bf16", "dgrad": "nvfp4", "wgrad": "bf16"},
        }
    }
    assert flush_rates(modules) == {
        "flush_to_zero/a/dgrad_gradient": 0.2,
        "flush_to_zero/a/dgrad_weight": 0.2,
    }


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_picture(form: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", form=form, mamba_out=(0.0, 0.4))
    picture = plot_precision(run)
    assert picture == run / "precision.png"
    with Image.open(picture) as image:
        assert image.width > 1500 and image.height > 700
        assert len(image.convert("RGB").getcolors(1 << 20)) > 200
    assert [path.name for path in run.glob("*.png")] == ["precision.png"]


def test_no_picture_without_telemetry(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert plot_precision(tmp_path / "a") is None


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_choice_keeps_to_the_budget(sizes: list[tuple[int, int]], budget: float) -> None:
    """Never above the budget, never a choice below average, and at most one candidate away from the
    best list of such candidates (the knapsack bound of a greedy choice)."""
    flops, errors = sum(f for f, _ in sizes), max(1, sum(e for _, e in sizes))
    listed = [
        Candidate(str(i), str(i), f / flops, e / errors, ("", 0.0, None))
        for i, (f, e) in enumerate(sizes)
    ]
    listed.sort(key=lambda candidate: -candidate.ratio)
    chosen = choose(listed, budget)
    assert sum(c.flops for c in chosen) <= budget + 1e-9
    assert all(c.ratio > 1 for c in chosen)
    worthy = [c for c in listed if c.ratio > 1]
    best = max(
        sum(c.error for c in some)
        for size in range(len(worthy) + 1)
        for some in itertools.combinations(worthy, size)
        if sum(c.flops for c in some) <= budget + 1e-12
    )
    largest = max((c.error for c in worthy), default=0.0)
    assert sum(c.error for c in chosen) >= best - largest - 1e-9


@pytest.mark.parametrize(
    ("knobs", "errors", "chosen"),
    [
        (["budget=0.16"], {"mamba_out": (0.6, 0.05)}, ["mamba_out"]),
        (["budget=0.16", "error=flush"], {"mamba_out": (0.1, 0.9)}, ["mamba_out"]),
        (["budget=0"], {"mamba_out": (0.6, 0.05)}, []),
        (["budget=0.12", "by=module"], {"qkv": (0.9, 0.05)}, ["qkv_3", "mtp_qkv_0"]),
    ],
)
def test_proposed_file_is_a_plan(
    knobs: list[str],
    errors: dict[str, tuple[float, float]],
    chosen: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The kind with the large error is exempted. The file loads by its path, resolves, and keeps no
    more than the budget above NVFP4."""
    run = make_run(tmp_path / "run", **errors)
    output = tmp_path / "mine.yaml"
    assert main(["precision", "propose", str(run), *knobs, f"output={output}"]) == 0
    rules = yaml.safe_load(output.read_text())["rules"]
    assert list(rules)[: len(chosen)] == chosen
    assert bool(rules) == bool(chosen)
    reasons = [line for line in output.read_text().splitlines() if line.startswith("  #")]
    assert len(reasons) == len(rules) and all("of the FLOPs" in reason for reason in reasons)

    config = compose_config(["model=tiny", f"precision={output}"])
    assert config.precision.name == "proposed"
    flops = {entry.path: entry.flops for entry in resolve_plan(config).at(0).linears}
    kept = [path for path in PATHS if resolve_plan(config).at(0).formats[path].fprop != "nvfp4"]
    budget = float(knobs[0].removeprefix("budget="))
    assert sum(flops[path] for path in kept) <= budget * sum(flops[path] for path in PATHS)
    if chosen and "by=module" not in knobs:
        assert set(kept) >= {p for p in PATHS if p.endswith("mixer.out_proj")}
    assert main(["plan", "model=tiny", f"precision={output}"]) == 0
    assert "proposed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget=1.5"], "budget=1.5: give a share"),
        (["budget=0.1", "format=nvfp4"], "format=nvfp4: exemptions are in bf16 or mxfp8"),
        (["budget=0.1", "format=mxfp8"], "was not measured in mxfp8"),
        (["bugdet=0.1"], "did you mean budget?"),
        (["by=kind"], "budget is not set"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert main(["precision", "propose", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_recipe_file_builds_on_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with `defaults` equals the recipe with the same change made on the command line."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "defaults: [nvfp4_without_qkv, _self_]\nname: mine\nrules: {mtp: {enabled: false}}\n"
    )
    ours = compose_config([f"precision={mine}"])
    same = compose_config(["precision=nvfp4_without_qkv", "precision.rules.mtp.enabled=false"])
    assert resolve_plan(ours).at(0).formats == resolve_plan(same).at(0).formats
    assert ours.precision.name == "mine"
    mine.write_text("defaults: [nvfp5]\n")
    assert main(["plan", f"precision={mine}"]) == 2
    assert "nvfp5" in capsys.readouterr().err
