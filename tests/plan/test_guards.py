"""Every guard fires where it should and nowhere else, and the backend is chosen accordingly.

The overflow arithmetic is compared with the check of real strides in `model.mamba.core`, on meta
tensors. Not covered: whether the upstream faults are as their threads describe.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Backend, Config
from nemotron_train.plan.backend import choose_backend
from nemotron_train.plan.guards import (
    GUARDS,
    TESTED_MEGATRON,
    WORKED_AROUND,
    Effect,
    Surroundings,
    enforce,
    findings,
    largest_scan_offset,
)
from nemotron_train.plan.hardware import Hardware, installed_versions
from nemotron_train.plan.precision.resolve import resolve_plan

B200 = Hardware("NVIDIA B200", (10, 0), "2.17.1")
B300 = Hardware("NVIDIA B300", (10, 3), "2.17.1")
H100 = Hardware("NVIDIA H100 80GB HBM3", (9, 0), "2.17.1")
RTX = Hardware("NVIDIA RTX PRO 6000 Blackwell", (12, 0), "2.18.0")
THOR = Hardware("NVIDIA Thor", (11, 0), "2.17.1")
CPU = Hardware("CPU, 2 threads a rank", None, None)
GOOD = Surroundings(B200, {"megatron-core": TESTED_MEGATRON, "torch": "2.13.0+cu130"}, {}, True)

LONG = ["run=ultra_550b_a55b", "train.micro_batch_sequences=1", "train.sequence_length=262144"]
SUPER = ["run=super_120b_a12b", "precision=nvfp4_nemotron3"]
WITH_KERNELS = {"megatron-core": TESTED_MEGATRON, "mamba-ssm": "2.3.0"}


NATIVE_ONLY = {"no_engine", "old_engine", "before_blackwell", "unknown_blackwell"}
NATIVE_ONLY |= {"zeroed_gradients", "mxfp8_on_workstation", "fused_transform"}
NATIVE_ONLY |= {"overriding_environment", "fast_math"}


def at(hardware: Hardware, engine: str | None = "", **changes: object) -> Surroundings:
    if engine != "":
        hardware = replace(hardware, transformer_engine=engine)
    return replace(GOOD, hardware=hardware, **changes)  # type: ignore[arg-type]


FIRES = [
    ("scan_offsets", LONG, replace(GOOD, packages=WITH_KERNELS)),
    ("scan_offsets", LONG, Surroundings(packages=WITH_KERNELS)),
    ("scan_offsets", LONG, Surroundings()),
    ("megatron_version", SUPER, replace(GOOD, packages={"megatron-core": "0.19.3"})),
    (
        "grouped_product",
        ["run=super_120b_a12b", "precision=bf16"],
        Surroundings(B300, {"torch": "2.13.0"}),
    ),
    ("no_engine", SUPER, at(B200, None)),
    ("no_engine", SUPER, at(CPU)),
    ("old_engine", SUPER, at(B200, "2.13.0")),
    ("old_engine", SUPER, at(B200, "2.14.0.dev0+4329ff8")),
    ("before_blackwell", SUPER, at(H100)),
    ("unknown_blackwell", SUPER, at(THOR)),
    ("zeroed_gradients", SUPER, at(RTX)),
    ("zeroed_gradients", SUPER, at(RTX, "2.19.0.dev0")),
    ("mxfp8_on_workstation", SUPER, at(RTX, "2.19.0")),
    ("fused_transform", SUPER, at(RTX, "2.19.0")),
    ("overriding_environment", SUPER, at(B200, environment={"NVTE_NVFP4_DISABLE_RHT": "1"})),
    ("overriding_environment", SUPER, at(B200, environment={"NVTE_NVFP4_4OVER6": "all"})),
    ("fast_math", SUPER, at(B200, environment={"NVTE_USE_FAST_MATH": "1"})),
]

SILENT = [
    ("scan_offsets", LONG, Surroundings(CPU, WITH_KERNELS)),
    ("scan_offsets", [*LONG[:2], "train.sequence_length=131072"], at(B200, packages=WITH_KERNELS)),
    ("scan_offsets", [*LONG, "parallel.tensor=8"], at(B200, packages=WITH_KERNELS)),
    ("scan_offsets", LONG, GOOD),
    ("scan_offsets", [*LONG, "model.pattern=*E"], Surroundings()),
    ("megatron_version", SUPER, GOOD),
    ("grouped_product", SUPER, at(B300)),
    ("grouped_product", ["precision=bf16"], Surroundings(B300, {"torch": "2.12.1"})),
    ("grouped_product", ["precision=bf16"], Surroundings(B200, {"torch": "2.13.0"})),
    ("no_engine", SUPER, GOOD),
    ("no_engine", SUPER, replace(at(CPU), native=False)),
    ("old_engine", SUPER, at(B200, "2.14.0")),
    ("before_blackwell", SUPER, GOOD),
    ("unknown_blackwell", SUPER, at(B300)),
    ("unknown_blackwell", SUPER, at(RTX)),
    ("zeroed_gradients", SUPER, at(RTX, "2.19.0")),
    ("mxfp8_on_workstation", ["run=super_120b_a12b", "precision=nvfp4_all"], at(RTX, "2.19.0")),
    ("fused_transform", SUPER, GOOD),
    ("overriding_environment", SUPER, at(B200, environment={"NVTE_NVFP4_DISABLE_RHT": "0"})),
    ("fast_math", SUPER, at(B200, environment={"NVTE_USE_FAST_MATH": "0"})),
]


@cache
def composed(*overrides: str) -> Config:
    """The composed configuration. Tests must not change it."""
    return compose_config(overrides)


def fired(overrides: list[str], surroundings: Surroundings) -> set[str]:
    config = composed(*overrides)
    return {f.name for f in findings(config, resolve_plan(config), surroundings)}


@pytest.mark.parametrize(("name", "overrides", "surroundings"), FIRES)
def test_fires(name: str, overrides: list[str], surroundings: Surroundings) -> None:
    assert name in fired(overrides, surroundings)


@pytest.mark.parametrize(("name", "overrides", "surroundings"), SILENT)
def test_does_not_fire(name: str, overrides: list[str], surroundings: Surroundings) -> None:
    assert name not in fired(overrides, surroundings)


@pytest.mark.parametrize(("name", "overrides", "surroundings"), FIRES)
def test_native_guards_ask_native_runs_only(
    name: str, overrides: list[str], surroundings: Surroundings
) -> None:
    fires = name in fired(overrides, replace(surroundings, native=False))
    assert fires != (name in NATIVE_ONLY)


def test_each_guard_is_tested_both_ways() -> None:
    names = {guard.name for guard in GUARDS}
    assert names == {name for name, *_ in FIRES} == {name for name, *_ in SILENT}
    assert len(names) == len(GUARDS)


@pytest.mark.parametrize("run", ["tiny", "nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b"])
def test_ready_runs_pass(run: str) -> None:
    """With their own sizes, each on its intended machine."""
    config = compose_config([f"run={run}"])
    surroundings = replace(GOOD, packages=WITH_KERNELS, native=False)
    assert findings(config, resolve_plan(config), surroundings) == []


def test_offsets_are_those_of_the_tensors() -> None:
    """The check of the real strides passes at one length and fails one chunk later."""
    torch = pytest.importorskip("torch")
    from nemotron_train.model.mamba.core import offsets_overflow

    def tensors(config: Config) -> tuple:
        mamba, train = config.model.mamba, config.train
        tensor = config.parallel.tensor
        heads, groups = mamba.heads // tensor, mamba.groups // tensor
        sizes = [heads * mamba.head_dim] + [groups * mamba.state_size] * 2
        shape = (train.micro_batch_sequences, train.sequence_length, sum(sizes))
        x, b, c = torch.empty(shape, device="meta").split(sizes, dim=-1)
        return (
            x.unflatten(-1, (heads, mamba.head_dim)),
            b.unflatten(-1, (groups, mamba.state_size)),
            c.unflatten(-1, (groups, mamba.state_size)),
        )

    last_good = 2**31 // 9216 // 128 * 128  # 9216: x, B and C of Ultra over two ranks
    for length, good in ((last_good, True), (last_good + 128, False)):
        config = compose_config([*LONG[:2], f"train.sequence_length={length}"])
        assert (largest_scan_offset(config) < 2**31) == good
        assert offsets_overflow(*tensors(config), config.model.mamba.chunk_size) == (not good)


def test_warnings_are_said_and_refusals_raised() -> None:
    said: list[str] = []
    config = compose_config(SUPER)
    environment = {"NVTE_USE_FAST_MATH": "1"}
    enforce(config, resolve_plan(config), at(B200, environment=environment), said.append)
    (line,) = said
    assert line.startswith("warning: NVTE_USE_FAST_MATH") and "\n" not in line
    with pytest.raises(ConfigError, match=r"gradient zero on sm_120 \(NVIDIA/Transformer"):
        enforce(config, resolve_plan(config), at(RTX), said.append)


def test_what_is_worked_around_names_modules_of_ours() -> None:
    import importlib.util

    for worked in WORKED_AROUND:
        assert importlib.util.find_spec(f"nemotron_train.{worked.by}") is not None, worked
    assert {guard.effect for guard in GUARDS} == set(Effect)


def test_the_documentation_has_every_guard() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "precision.md").read_text()
    lines = text.splitlines()
    for guard in GUARDS:
        (line,) = [line for line in lines if line.startswith(f"| `{guard.name}` |")]
        assert guard.source in line and f"{guard.effect}s |" in line
        assert ("native; " in line) == (guard.name in NATIVE_ONLY)
    for worked in WORKED_AROUND:
        (line,) = [line for line in lines if line.startswith(f"| {worked.source} |")]
        assert worked.by.replace(".", "/") in line


def test_this_environment_is_the_tested_one() -> None:
    """Canary: for a new Megatron-Core version, review the adaptations and set TESTED_MEGATRON."""
    assert installed_versions()["megatron-core"] == TESTED_MEGATRON


# Native or emulated -------------------------------------------------------------------------


def backend(backend: Backend, surroundings: Surroundings, *overrides: str):
    config = composed(*SUPER, f"precision.backend={backend}", *overrides)
    return choose_backend(config, resolve_plan(config), replace(surroundings, native=False))


@pytest.mark.parametrize(
    ("surroundings", "native"),
    [
        (GOOD, True),
        (at(B300), True),
        (at(B200, "2.14.0"), True),
        (at(B200, None), False),
        (at(B200, "2.13.0"), False),
        (at(H100), False),
        (at(RTX, "2.19.0"), False),
        (at(THOR), False),
        (at(CPU), False),
    ],
)
def test_auto(surroundings: Surroundings, native: bool) -> None:
    choice = backend(Backend.auto, surroundings)
    assert choice.native is native
    assert f": {'native' if native else 'emulated'} (" in choice.text
    assert surroundings.hardware is not None
    assert surroundings.hardware.device_name in choice.text and "\n" not in choice.text


@pytest.mark.parametrize(
    ("surroundings", "facts"),
    [
        (at(B200, None), ["NVIDIA B200", "10.0", "Transformer Engine not installed"]),
        (at(B200, "2.13.0"), ["NVIDIA B200", "10.0", "Transformer Engine 2.13.0", "2.14"]),
        (at(H100), ["NVIDIA H100", "capability 9.0", "Transformer Engine 2.17.1"]),
        (at(RTX), ["RTX PRO 6000", "capability 12.0", "Transformer Engine 2.18.0", "2.19"]),
        (at(THOR), ["Thor", "capability 11.0"]),
        (at(CPU), ["CPU", "no CUDA device"]),
    ],
)
def test_native_refused_in_one_line(surroundings: Surroundings, facts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        backend(Backend.native, surroundings)
    text = str(error.value)
    assert "\n" not in text and "precision.backend=emulated" in text
    assert all(fact in text for fact in facts), text


def test_native_beyond_auto() -> None:
    """With an explicit backend and a new Transformer Engine, a workstation GPU may run NVFP4
    only."""
    surroundings = at(RTX, "2.19.0")
    assert backend(Backend.native, surroundings, "precision=nvfp4_all").native
    assert not backend(Backend.auto, surroundings, "precision=nvfp4_all").native


def test_emulated_on_any_machine() -> None:
    for surroundings in (GOOD, at(H100), at(CPU)):
        assert not backend(Backend.emulated, surroundings).native


def test_a_plan_that_megatron_cannot_say_is_emulated() -> None:
    plan = "precision=nvfp4_bf16_forward"
    choice = backend(Backend.auto, GOOD, plan)
    assert not choice.native and "precision.phases has 1 phase(s)" in choice.text
    with pytest.raises(ConfigError, match=r"precision\.phases"):
        backend(Backend.native, GOOD, plan)


def test_plans_without_block_formats_have_no_choice() -> None:
    for plan in ("bf16", "fp32"):
        for name in Backend:
            choice = backend(name, at(CPU), f"precision={plan}")
            assert not choice.native and not choice.text


def test_environment_of_a_native_run() -> None:
    choice = backend(Backend.auto, GOOD, "precision=nvfp4_all", "precision.default.hadamard=false")
    assert choice.native and choice.environment == {"NVTE_NVFP4_DISABLE_RHT": "1"}


@pytest.mark.parametrize("command", ["pretrain", "plan"])
def test_commands_refuse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` knows no device, but reports that Megatron's file cannot express the plan. `pretrain`
    checks both."""
    plan = "nvfp4_nemotron3" if command == "pretrain" else "nvfp4_bf16_forward"
    words = [command, f"precision={plan}", "precision.backend=native", "name=never"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("nemotron-train: precision.backend=native: ")
    assert shown.err.count("\n") == 1


def test_plan_warns(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["train.global_batch_tokens=100663296", "train.validation_tokens=100663296"]
    assert main(["plan", *LONG, *sizes]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: ") and last.endswith("(state-spaces/mamba#1015)")
