"""The printed plan and the text of precision.txt: complete, plain in a pipe, and without torch.

Not covered: the look of the tables on a terminal, and that the model computes in the formats named
here.
"""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.quantities import format_bytes, format_count
from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import forward_flops, linears
from nemotron_train.plan.derive import derive
from nemotron_train.plan.precision.resolve import resolve_plan, share_of_flops
from nemotron_train.plan.precision.text import plan_text
from nemotron_train.report.plan.table import print_plan

RANKS = {
    "tiny": 1,
    "proxy_10m": 1,
    "proxy_100m": 1,
    "nano_30b_a3b": 8,
    "super_120b_a12b": 64,
    "ultra_550b_a55b": 768,
}


def printed(config: Config, ranks: int, width: int = 120, layers: bool = False) -> str:
    out = io.StringIO()
    print_plan(config, derive(config, ranks), Console(file=out, width=width), layers=layers)
    return out.getvalue()


@pytest.mark.parametrize(("run", "ranks"), RANKS.items())
def test_every_run_recipe_prints(run: str, ranks: int) -> None:
    """Plain text in a pipe. Nothing is cut, and the whole pattern is on one line."""
    config = compose_config([f"run={run}"])
    text = printed(config, ranks)
    assert "\x1b" not in text and "…" not in text
    assert f"  {config.model.pattern}\n" in text
    assert all(len(line) <= 120 for line in text.splitlines() if config.model.pattern not in line)


def test_super_shows_the_published_numbers() -> None:
    text = printed(compose_config(["run=super_120b_a12b"]), 64)
    for number in (
        "120.67 B",
        "123,611,033,088",
        "12.77 B",
        "40 M Mamba-2, 8 * attention, 40 E",
        "experts.linear_fc1 1024→2688, 22 of 512",
        "22 experts x 1024 wide = 22,528 elements",
        "25,165,824 tokens = 3,072 sequences of 8,192",
        "993,411 for 25.00 T tokens",
    ):
        assert number in text


def test_nothing_is_cut_on_a_narrow_console() -> None:
    """Cells fold: every character of the widest linear's name is shown, in order."""
    text = printed(compose_config([]), 1, width=60)
    cells = re.findall(r"^\s*\d*\s*(\S+)", text.split("Precision")[1], re.MULTILINE)
    assert "decoder.*.mlp.shared_experts.linear_fc1" in "".join(cells)
    assert "…" not in text


def test_one_row_a_layer() -> None:
    config = compose_config(["run=ultra_550b_a55b"])
    text = printed(config, 768, layers=True).split("Every layer")[1].split("Parameters")[0]
    rows = re.findall(r"^(\d+) +(\d+) +([M*E]) ", text, re.MULTILINE)
    assert len(rows) == 108 + 2
    stages = config.model.pattern.split("|")
    expected = [(letter, stage) for stage, part in enumerate(stages) for letter in part]
    assert [(letter, int(stage)) for _, stage, letter in rows[:108]] == expected


def test_shares_of_flops_fill_the_model() -> None:
    """The last row is the whole forward cost. The rows above it add up to 100 %."""
    config = compose_config([])
    text = printed(config, 1).split("Layers")[1].split("Parameters")[0]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", text)]
    assert shares[-1] == 100.0
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.05 * len(shares))
    assert format_count(forward_flops(config.model, config.train.sequence_length)) in text


def test_names_from_the_configuration_are_not_markup() -> None:
    config = compose_config([])
    config.model.name = "[red]x[/red]"
    assert "[red]x[/red]: 7 layers" in printed(config, 1)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1.00 K"), (123_611_033_088, "123.61 B")]
)
def test_counts(value: int, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(1023, "1,023 B"), (45_056, "44.00 KiB")])
def test_bytes(value: int, text: str) -> None:
    assert format_bytes(value) == text


# Precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bf16")])
def test_every_linear_has_one_precision(precision: str, dtype: str) -> None:
    config = compose_config([f"precision={precision}"])
    plan = resolve_plan(config).at(0).linears
    assert [entry.path for entry in plan] == [linear.path for linear in linears(config.model)]
    for entry in plan:
        wanted = "float32" if entry.path.endswith("router") else dtype
        formats = entry.formats
        assert formats.fprop == formats.dgrad == formats.wgrad == wanted
        assert entry.rule
    assert sum(share_of_flops(plan).values()) == pytest.approx(1)


def test_precision_text_lists_every_linear_once() -> None:
    config = compose_config(["run=super_120b_a12b"])
    lines = plan_text(resolve_plan(config)).splitlines()
    for linear in linears(config.model):
        (line,) = (line for line in lines if line.split()[:1] == [linear.path])
        assert len(line.split()) >= 5
    router = 2 * 4096 * 512 * 42
    share = router / sum(linear.flops for linear in linears(config.model))
    assert any(f"{share:.3%}" in line and "float32" in line for line in lines)


# Start-up -----------------------------------------------------------------------------------


def test_plan_loads_neither_torch_nor_matplotlib() -> None:
    """The whole command in a fresh process, for the largest model."""
    script = (
        "import sys; from nemotron_train.cli.main import main; "
        "code = main(['plan', 'run=ultra_550b_a55b', '--layers']); "
        "heavy = {'torch', 'megatron', 'matplotlib', 'transformers', 'datasets'}; "
        "sys.exit(code or sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "549.31 B" in done.stdout
