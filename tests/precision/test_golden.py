"""Our numerics against vectors computed by others (tests/golden/README.md), bit for bit.

Not covered: any GPU, native kernels. The d01 and d02 vectors are transcriptions, not outputs.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nemotron_train.kernels import quantize
from nemotron_train.precision.gemm import block_scaled_matmul
from nemotron_train.precision.hadamard import hadamard, hadamard_matrix
from nemotron_train.precision.mxfp8 import mxfp8_operand, quantize_mxfp8
from nemotron_train.precision.nvfp4 import (
    E2M1_VALUES,
    e2m1_codes,
    nvfp4_operand,
    quantize_nvfp4,
    round_e2m1,
)
from nemotron_train.precision.rounding import round_to_nearest_

FOLDER = Path(__file__).parents[1] / "golden" / "nvfp4"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _both_implementations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vector by quantize.c, if it compiles, and by torch operators."""
    if request.param == "torch":
        monkeypatch.setattr(quantize, "quantize_library", lambda: None)
    elif not quantize.can_quantize():
        pytest.skip("no C compiler here")


def _load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _names(prefixes: str) -> list[str]:
    names = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    assert len(names) == 20, names
    return [name for name in names if name[0] in prefixes]


def _assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    bits = _BITS[ours.element_size()]
    assert torch.equal(ours.contiguous().view(bits), theirs.contiguous().view(bits))


@pytest.mark.parametrize("name", _names("qwr"))
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_quantized_tensors(name: str, transposed: bool) -> None:
    golden, _ = _load(name)
    block = "2d" if name.startswith("w") else "1d"
    suffix, axis, x = "", "row", golden["inputs.x"]
    if transposed:
        suffix, axis, x = "_t", "col", golden.get("outputs.rht_of_x_t", x.t())
    quantized = quantize_nvfp4(x, block=block)
    _assert_same_bits(quantized.codes, golden[f"outputs.data{suffix}"])
    _assert_same_bits(quantized.scales, golden[f"outputs.scale{suffix}_u8"])
    _assert_same_bits(quantized.amax.view(1), golden[f"outputs.global_amax_{axis}"])
    _assert_same_bits(quantized.dequantize(), golden[f"outputs.dequant{suffix}_f32"])
    fused = nvfp4_operand(x, block=block)
    _assert_same_bits(fused.values, quantized.operand().values)
    other_layout = nvfp4_operand(x.t().contiguous(), block=block, dim=0)
    _assert_same_bits(other_layout.t().values, fused.values)


@pytest.mark.parametrize("name", _names("r"))
def test_hadamard_transform_on_a_cpu(name: str) -> None:
    golden, _ = _load(name)
    x, expected = golden["inputs.x"], golden["outputs.rht_of_x_t"]
    _assert_same_bits(hadamard(x.t().contiguous()), expected)
    _assert_same_bits(hadamard(x, dim=0).t(), expected)


def test_hadamard_matrix() -> None:
    golden, _ = _load("h01_rht_matrix_bf16")
    _assert_same_bits(hadamard_matrix(torch.bfloat16), golden["outputs.transform"])


@pytest.mark.parametrize("name", _names("g"))
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "fast"])
def test_the_three_products_of_a_linear(name: str, strict: bool) -> None:
    """Strict: bit for bit. Fast: Transformer Engine's own tolerance for its kernels, 8e-3."""
    golden, meta = _load(name)
    x, w, dy = (golden[f"inputs.{key}"] for key in ("x", "w", "dy"))
    weight_block = "2d" if meta["two_d"] == "True" else "1d"

    def along_tokens(tensor: Tensor) -> Tensor:
        return hadamard(tensor, dim=0) if meta["rht"] == "True" else tensor

    x_rows, dy_rows = nvfp4_operand(x), nvfp4_operand(dy)
    w_rows = nvfp4_operand(w, block=weight_block)
    w_columns = nvfp4_operand(w, block=weight_block, dim=0)
    x_columns = nvfp4_operand(along_tokens(x), dim=0)
    dy_columns = nvfp4_operand(along_tokens(dy), dim=0)
    start = golden["inputs.acc0"]
    results = {
        "y": block_scaled_matmul(x_rows, w_rows, strict=strict),
        "y_accumulated": block_scaled_matmul(x_rows, w_rows, accumulate_MN=start, strict=strict),
        "dx": block_scaled_matmul(dy_rows, w_columns.t(), strict=strict),
        "dw": block_scaled_matmul(dy_columns.t(), x_columns.t(), strict=strict),
    }
    for key, result in results.items():
        expected = golden[f"outputs.{key}"]
        if strict:
            _assert_same_bits(result, expected)
        else:
            torch.testing.assert_close(result, expected, atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize("name", _names("e")[:2])
def test_e2m1_cast_of_every_finite_bfloat16_and_of_ties(name: str) -> None:
    golden, _ = _load(name)
    x = golden["inputs.x"].float()
    _assert_same_bits(e2m1_codes(x), golden["outputs.codes"])


def test_e4m3_cast() -> None:
    golden, _ = _load("e03_e4m3_cast")
    rounded = round_to_nearest_(golden["inputs.x"].clone(), mantissa_bits=3, min_exponent=-6)
    _assert_same_bits(rounded.to(torch.float8_e4m3fn).view(torch.uint8), golden["outputs.u8"])


def test_stochastic_rounding_of_every_word() -> None:
    """Compared as numbers, because we return no negative zero. Packed codes keep the sign (next
    test)."""
    golden, _ = _load("d01_DERIVED_sr_e2m1_all_256_rbits")
    expected = golden["outputs.q"].float()
    x = golden["inputs.x"][:, None].expand_as(expected).contiguous()
    words = torch.arange(256).to(torch.uint8).expand_as(expected)
    assert torch.equal(round_e2m1(x, words), expected)


def test_stochastic_codes_keep_the_sign_of_zero() -> None:
    golden, _ = _load("d01_DERIVED_sr_e2m1_all_256_rbits")
    expected = golden["outputs.q"].float()
    x = golden["inputs.x"][:, None].expand_as(expected).contiguous()
    codes = e2m1_codes(x, torch.arange(256).to(torch.uint8).expand_as(expected))
    numbers = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])[codes.int()]
    known = ~x.isnan()  # the sign of a NaN is undefined
    _assert_same_bits(numbers[known], expected[known])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_mxfp8(transposed: bool) -> None:
    golden, _ = _load("d02_DERIVED_mxfp8_bf16")
    suffix, x = ("_t", golden["inputs.x"].t()) if transposed else ("", golden["inputs.x"])
    quantized = quantize_mxfp8(x)
    _assert_same_bits(quantized.codes, golden[f"outputs.data{suffix}_u8"])
    _assert_same_bits(quantized.scales, golden[f"outputs.scale{suffix}_e8m0_u8"])
    _assert_same_bits(quantized.dequantize(), golden[f"outputs.dequant{suffix}_f32"])
    operand = mxfp8_operand(x.t().contiguous(), dim=0).t() if transposed else mxfp8_operand(x)
    assert torch.equal(operand.values.float() * operand.scale, quantized.dequantize())
