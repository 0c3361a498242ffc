"""Emulated number formats on two ranks, first the codes, then whole trainings, against one rank.

Second truth: the same on one rank. The tests require two kinds of agreement.

Exact. Every operand of every product (codes, scales, stochastic rounding as in training) under
tensor, sequence, expert-tensor and context parallelism, and every product that is not summed over
ranks. The losses of two data-parallel ranks, against one rank with two micro-batches.

Within a tolerance. Sums over ranks have another order, and are in BF16 under BF16 parameters. With
FP32 parameters and identical random words the difference is 1e-6 until a number crosses the border
between two codes. Then single codes move by a whole step and the trainings diverge, as after any
other perturbation. These are therefore compared over the steps before. The training recipe itself,
in BF16 parameters, is compared within the effect of other random words on one rank.

Not covered: more than two ranks, pipeline stages (a stage holds whole linears), MXFP8's shards.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Small = tuple[Path, list[str]]
RunRanks = Callable[[list[str], Path, int], None]

# Mamba's packed input projection is cut between blocks: 32 heads, 16 per rank.
GEOMETRY = ["model.pattern=MEM*EME", "model.mamba.heads=32", "model.mamba.head_dim=8"]
TENSOR = ["parallel.tensor=2", "parallel.sequence=true"]
SPLIT_EXPERTS = "parallel.expert_tensor=2"

# Operands in the order in which a linear quantizes them, and the dimension along which ranks hold
# parts of them, by how the linear is sharded.
OPERANDS = ("weight", "input", "gradient", "gradient along tokens", "input along tokens")
HELD = {
    "outputs": {"weight": 0, "gradient": 1, "gradient along tokens": 1},
    "inputs": {"weight": 1, "input": 1, "input along tokens": 1},
    "tokens": dict.fromkeys(OPERANDS[1:], 0),
}
PRODUCTS = {
    "outputs": {"y": 2, "dw": 0},
    "inputs": {"dx": 2, "dw": 1},
    "tokens": {"y": 0, "dx": 0},
}
EXPERT_OPERANDS = ("x1", "w1", "x2", "w2", "dy2", "dy2t", "x2t", "dy1", "dy1t", "x1t")


@pytest.fixture(scope="module")
def operands(small_run: Small, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory):
    """The operands on one rank, and on each of two tensor- or context-parallel ranks."""
    folder, overrides = small_run
    script = str(Path(__file__).with_name("precision_operands.py"))
    out = tmp_path_factory.mktemp("operands")
    common = [*overrides, *GEOMETRY, "precision=nvfp4_all"]
    run_ranks([script, str(out / "one"), *common], folder, 1)
    run_ranks([script, str(out / "two"), *common, *TENSOR, SPLIT_EXPERTS], folder, 2)
    run_ranks([script, str(out / "context"), *common, "parallel.context=2"], folder, 2)
    names = ("one.0", "two.0", "two.1", "context.0", "context.1")
    one, *others = (torch.load(out / name) for name in names)
    return one, others[:2], others[2:]


def join(parts: list[torch.Tensor], dim: int, sizes: list[int] | None) -> torch.Tensor:
    """The whole tensor. `sizes`: of the components that each part packs along `dim`."""
    if sizes is None:
        return torch.cat(parts, dim)
    components = zip(*(part.split(sizes, dim) for part in parts), strict=True)
    return torch.cat([torch.cat(component, dim) for component in components], dim)


def test_codes_of_linears_do_not_depend_on_the_layout(operands) -> None:
    """Mamba's input projection rounds its gradients to nearest here. Its columns are packed rank by
    rank, so its random words would differ."""
    one, two, _ = operands
    seen = set()
    for path, whole in one.items():
        if whole["cut"] == "experts":
            continue
        parts = [rank[path] for rank in two]
        cut, sizes = parts[0]["cut"], parts[0]["sizes"]
        seen.add(cut)
        assert len(whole["operands"]) == len(parts[0]["operands"]) == len(OPERANDS)
        for number, name in enumerate(OPERANDS):
            values, scale = whole["operands"][number]
            ranks = [part["operands"][number] for part in parts]
            dim = HELD[cut].get(name)
            held = [ranks[0][0]] if dim is None else [rank[0] for rank in ranks]
            packed = sizes if cut == "outputs" else None
            assert torch.equal(join(held, dim or 0, packed if dim is not None else None), values)
            assert all(torch.equal(rank[1], scale) for rank in ranks), (path, name)
        for name, dim in PRODUCTS[cut].items():
            ours = join(
                [part["products"][name] for part in parts], dim, sizes if cut == "outputs" else None
            )
            assert torch.equal(ours, whole["products"][name]), (path, name)
    assert seen == {"outputs", "inputs", "tokens"}


def test_codes_of_linears_do_not_depend_on_the_context_ranks(operands) -> None:
    """Activations and gradients are cut into pieces of whole blocks; weights are whole. The sum of
    a weight's gradient over the ranks agrees up to the order of the sum. Experts are not compared:
    their tensors are the tokens that meet on a rank."""
    one, _, context = operands
    for path, whole in one.items():
        if whole["cut"] == "experts":
            continue
        parts = [rank[path] for rank in context]
        for number, name in enumerate(OPERANDS):
            values, scale = whole["operands"][number]
            ranks = [part["operands"][number] for part in parts]
            held = ranks[0][0] if name == "weight" else torch.cat([rank[0] for rank in ranks])
            assert torch.equal(held, values), (path, name)
            assert all(torch.equal(rank[1], scale) for rank in ranks), (path, name)
        products = whole["products"]
        for name in ("y", "dx"):
            ours = torch.cat([part["products"][name] for part in parts])
            # Half the rows. On a processor without BF16 instructions the product goes through FP32,
            # whose library sums in another order for another shape. The tolerance is one step of
            # BF16.
            floor = 1e-5 * products[name].abs().max().item()
            torch.testing.assert_close(ours, products[name], rtol=2.0**-7, atol=floor)
        ours = sum(part["products"]["dw"].float() for part in parts)
        step = products["dw"].float().abs().max() * 2.0**-7  # BF16 on each rank and overall
        assert (ours - products["dw"].float()).abs().max() < 1.5 * step, path


def test_codes_of_experts_do_not_depend_on_the_layout(operands) -> None:
    """Each expert's hidden width is sharded over two ranks. One of the experts gets no token."""
    one, two, _ = operands
    paths = [path for path in one if path.endswith(".experts")]
    assert paths
    for path in paths:
        whole, parts = one[path], [rank[path] for rank in two]
        num_experts = len(whole["products"]["dw1"])
        for number, name in enumerate(EXPERT_OPERANDS):
            values, scale = whole["operands"][number]
            ranks = [part["operands"][number] for part in parts]
            assert all(torch.equal(rank[1], scale) for rank in ranks), (path, name)
            if name == "w1":  # rows beyond a rank's 16 are padding
                cut = [rank[0].view(num_experts, -1, values.shape[1])[:, :16] for rank in ranks]
                ours = torch.cat(cut, 1).flatten(0, 1)
            elif ranks[0][0].shape == values.shape:
                ours = ranks[0][0]
            else:
                ours = torch.cat([rank[0] for rank in ranks], 1)
            assert torch.equal(ours, values), (path, name)
        for name, dim in (("dw1", 1), ("dw2", 2)):
            ours = torch.cat([part["products"][name] for part in parts], dim)
            assert torch.equal(ours, whole["products"][name]), (path, name)


# Whole trainings ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(small_run: Small, run_ranks: RunRanks) -> Callable[..., list[dict]]:
    """Five steps; the lines of metrics.jsonl. Repeated calls reuse the result."""
    folder, overrides = small_run
    common = [*overrides, *GEOMETRY, "train.micro_batch_sequences=2", "train.threads=1"]
    common += ["train.total_tokens=1280", "optim.decay_tokens=512", "train.validation_tokens=256"]
    trained: dict[tuple[object, ...], list[dict]] = {}

    def run(*words: str, ranks: int = 1) -> list[dict]:
        if (ranks, *words) not in trained:
            name = f"layout_{len(trained)}"
            command = ["-m", "nemotron_train", "pretrain", *common, f"name={name}", *words]
            run_ranks(command, folder, ranks)
            lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
            trained[ranks, *words] = [json.loads(line) for line in lines]
            assert len(trained[ranks, *words]) == 5
        return trained[ranks, *words]

    return run


def differences(ours: list[dict], theirs: list[dict], name: str) -> list[float]:
    """Relative difference, step by step."""
    return [abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs, strict=True)]


RECIPE = ("precision=nvfp4_nemotron3", "optim.clip_grad_norm=1000")


@pytest.mark.layouts
def test_two_data_parallel_ranks_compute_the_same_numbers(train) -> None:
    """Each rank's micro-batch is one of the two of the single rank, rounded with the same words. A
    sum of two has one order. Clipping would bring in the gradient's norm, whose sum has many
    orders."""
    one, two = train(*RECIPE), train(*RECIPE, ranks=2)
    for name in ("loss", "mtp_loss_1", "mtp_loss_2", "load_balance_loss", "max_vio"):
        assert differences(two, one, name) == [0.0] * 5, name
    assert max(differences(two, one, "grad_norm")) < 1e-6


def test_tensor_parallel_rounds_by_the_same_words(train) -> None:
    """Every linear in NVFP4, FP32 parameters, experts sharded too. The learning rate is zero, so
    that each step is a separate trial. Steps without a crossing agree to the order of FP32 sums,
    gradients included. Words or scales of another layout would move the gradient's norm by 1e-3 in
    all steps, as Mamba's input projection does if it rounds stochastically."""
    nearest = "{match: '*.in_proj', format: nvfp4, stochastic_rounding: false}"
    words = ("precision=nvfp4_all", "precision.parameter_dtype=float32")
    words += (f"+precision.rules.packed={nearest}", "optim.peak_learning_rate=1e-30")
    words += ("optim.min_learning_rate=1e-31",)
    one, two = train(*words), train(*words, *TENSOR, SPLIT_EXPERTS, ranks=2)
    assert max(differences(two, one, "loss")) < 5e-6
    norms = differences(two, one, "grad_norm")
    assert min(norms) < 1e-6 and max(norms) < 1e-2, norms


@pytest.mark.layouts
def test_context_parallel_rounds_by_the_same_words(train) -> None:
    """The same with pieces of the sequence. Experts, which see the tokens of their rank, are in
    FP32."""
    experts = "{experts: true, format: float32}"
    words = ("precision=nvfp4_all", "precision.parameter_dtype=float32")
    words += (f"+precision.rules.experts={experts}", "optim.peak_learning_rate=1e-30")
    words += ("optim.min_learning_rate=1e-31",)
    one, two = train(*words), train(*words, "parallel.context=2", ranks=2)
    assert max(differences(two, one, "loss")) < 5e-6
    norms = differences(two, one, "grad_norm")
    assert min(norms) < 1e-6 and max(norms) < 1e-2, norms


def test_expert_parallel_rounds_whole_experts(train) -> None:
    """An expert's tensor contains the tokens of both ranks: those of one rank's micro-batch of
    twice the size, in another order. Blocks along the tokens differ, so wgrad stays FP32."""
    experts = "{experts: true, format: nvfp4, wgrad: float32, stochastic_rounding: false}"
    words = ("precision=fp32", f"+precision.rules.experts={experts}")
    one = train(*words, "train.micro_batch_sequences=4")
    two = train(*words, "parallel.expert=2", ranks=2)
    assert max(differences(two, one, "loss")[:3]) < 1e-6
    assert max(differences(two, one, "grad_norm")[:3]) < 1e-6


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(TENSOR, id="tensor", marks=pytest.mark.layouts),
        pytest.param(["parallel.expert=2"], id="expert"),
    ],
)
def test_recipe_agrees_within_its_noise(train, layout: list[str]) -> None:
    """BF16 parameters, everything rounded as in training. One rank with micro-batches of four rows
    instead of two (other amax, other words) differs from itself by up to 1.6e-3 in these five
    steps, and by 6e-5 in the first, before any update."""
    away = differences(train(*RECIPE, *layout, ranks=2), train(*RECIPE), "loss")
    assert away[0] < 2e-4 and max(away) < 2e-3, away
