"""`plan --why KNOB`: who set a knob.

Second truth: for every knob of every run recipe the last writer's value equals the value of Hydra's
own composition, and each named file contains the value attributed to it, read as plain YAML.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config, layers, recipes_folder
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.knobs import to_plain
from nemotron_train.report.plan.diff import flatten
from nemotron_train.report.plan.why import explain


def sources(knob: str, *overrides: str, config: Path | None = None) -> list[tuple[str, str]]:
    """(file name or override, value) of each writer."""
    found = explain(knob, overrides, config).writers
    return [(Path(w.source.split()[0]).name, w.value) for w in found]


def laid_over(trees: list[dict]) -> dict:
    merged: dict = {}
    for tree in trees:
        for knob, value in flatten(tree).items():
            # A whole list replaces an earlier list.
            gone = [known for known in merged if known.startswith(f"{knob}.")]
            for known in gone:
                del merged[known]
            merged[knob] = value
    return merged


@pytest.mark.parametrize("run", [p.stem for p in (recipes_folder() / "run").glob("*.yaml")])
def test_the_layers_are_hydras_composition(run: str) -> None:
    overrides = [f"run={run}", "precision=nvfp4_without_qkv", "train.seed=7"]
    written = laid_over([layer.tree for layer in layers(overrides)])
    composed = flatten(to_plain(compose_config(overrides)))
    assert written["train.seed"] == 7 and len(written) > 50
    for knob, value in written.items():
        if not str(value).startswith("${") and not isinstance(value, list | dict):
            assert str(composed[knob]) == str(value), knob


def test_every_step_is_named_in_order() -> None:
    assert sources("optim.peak_learning_rate", "optim.peak_learning_rate=1e-3") == [
        ("schema.py", "(must be set)"),
        ("tiny.yaml", "0.003"),
        ("optim.peak_learning_rate=1e-3", "0.001"),
    ]
    total = sources("train.total_tokens", "run=ultra_550b_a55b", "train.total_tokens=1e12")
    assert [name for name, _ in total] == [
        "schema.py", "nemotron3.yaml", "ultra_550b_a55b.yaml", "train.total_tokens=1e12",
    ]  # fmt: skip
    text = (recipes_folder() / "train" / "nemotron3.yaml").read_text()
    assert total[1][1] == str(yaml.safe_load(text)["total_tokens"])
    chain = sources("precision.rules.qkv.enabled", "precision=nvfp4_without_qkv")
    assert chain == [("schema.py", "true"), ("nvfp4_without_qkv.yaml", "false")]
    assert sources("precision.rules.qkv.match", "precision=nvfp4_without_qkv")[-1] == (
        "nvfp4_nemotron3.yaml", "*.linear_qkv",
    )  # fmt: skip
    assert sources("guard.max_skips") == [("schema.py", "10")]
    assert explain("name", []).value == "tiny" and sources("name")[-1][1] == "${model.name}"
    assert "experts: 16" in explain("model.moe", []).value, "a part of the configuration too"


def test_a_recipe_of_ones_own_replaces_the_group(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [bf16, _self_]\nname: mine\n")
    found = sources("precision.name", f"precision={mine}")
    assert found[-1] == ("mine.yaml", "mine") and ("bf16.yaml", "bf16") in found
    assert any("anew" in value for _, value in found)
    assert explain("precision.name", [f"precision={mine}"]).value == "mine"


def test_a_stored_configuration(tmp_path: Path) -> None:
    """--config, and a precision recipe merged over it, which removes all of its rules."""
    config = to_plain(compose_config(["precision=nvfp4_nemotron3", "train.seed=5"]))
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(config))
    assert sources("train.seed", config=stored)[-1] == ("config.yaml", "5")
    over = sources("precision.default.format", "precision=bf16", config=stored)
    assert [name for name, _ in over[-3:]] == ["config.yaml", "precision=bf16", "bf16.yaml"]
    assert explain("precision.rules", ["precision=bf16"], stored).value == "{}"
    run = tmp_path / "a"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"name": "a"}))
    resumed = sources("name", f"resume={run}")
    assert resumed[-1][1] == "a"
    assert explain("train.seed", [f"resume={run}"]).value == "5"


def test_a_wrong_knob_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"did you mean optim\.peak_learning_rate"):
        explain("optim.peak_larning_rate", [])
    assert main(["plan", "--why", "seed"]) == 2
    assert "train.seed" in capsys.readouterr().err
    assert main(["plan", "--why", "train.seed", "train.sede=1"]) == 2


def test_it_loads_no_torch() -> None:
    script = (
        "import sys; from nemotron_train.cli.main import main; "
        "code = main(['plan', '--why', 'train.total_tokens', 'run=ultra_550b_a55b']); "
        "sys.exit(code or sorted({'torch', 'megatron', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("train.total_tokens = 20000000000000")
