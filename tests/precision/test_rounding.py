"""The random words: Philox against Random123's known answers and a scalar transcription, the words
against the uniform distribution, slices against the whole.

Not covered: a full battery (PractRand, BigCrush). Words are used for 8-bit rounding only.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.precision.rounding import philox4x32, random_words, round_to_nearest_

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    words = philox4x32((c0, c1, c2, c3), (k0, k1), 10)
    assert [f"{word.item():08x}" for word in words] == answer.split()


def _scalar_word(seed: int, stream: int, step: int, row: int, column: int) -> int:
    mask = 0xFFFFFFFF
    counter, key = [row, stream, step, 0], [seed & mask, seed >> 32]
    for _ in range(10):
        high, low = divmod(0xD2511F53 * counter[0], 1 << 32)
        high_2, low_2 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = [high_2 ^ counter[1] ^ key[0], low_2, high ^ counter[3] ^ key[1], low]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    mixed = ((column // 4) * 0x9E3779B9 & mask) ^ counter[0]
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B + counter[1] & mask
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 & mask
    return (mixed ^ (mixed >> 16)) >> (8 * (column % 4)) & 0xFF


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**32 - 1),
    row=st.integers(0, 2**31),
    column=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9)),
)
def test_a_slice_holds_the_scalar_words_of_its_elements(
    seed: int, stream: int, step: int, row: int, column: int, shape: tuple[int, int]
) -> None:
    words = random_words(
        shape, seed=seed, stream=stream, step=step, row_offset=row, column_offset=column
    )
    expected = [
        [_scalar_word(seed, stream, step, row + i, column + j) for j in range(shape[1])]
        for i in range(shape[0])
    ]
    assert words.tolist() == expected


def _deviations(counts: torch.Tensor) -> float:
    """The number of standard deviations between chi² (equal expectations) and its mean."""
    expected = counts.sum().double() / counts.numel()
    freedom = counts.numel() - 1
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    return abs(chi_squared - freedom) / math.sqrt(2 * freedom)


def test_words_are_uniform_and_neighbours_independent() -> None:
    """Single words, and pairs of neighbours in a row (one mix, the next mix, the next block), in a
    column, across streams, steps and seeds: chi² within 5 standard deviations."""
    shape = (1024, 2048)
    words = random_words(shape, seed=7, stream=3).int()
    assert _deviations(torch.bincount(words.flatten(), minlength=256)) < 5
    pairs = [(words[:, :-distance], words[:, distance:]) for distance in (1, 4, 16)]
    pairs.append((words[:-1], words[1:]))
    pairs.append((words, random_words(shape, seed=7, stream=4).int()))
    pairs.append((words, random_words(shape, seed=7, stream=3, step=1).int()))
    pairs.append((words, random_words(shape, seed=8, stream=3).int()))
    for one, other in pairs:
        assert _deviations(torch.bincount((one * 256 + other).flatten(), minlength=65536)) < 5


def test_one_bit_of_a_coordinate_flips_half_of_the_bits() -> None:
    """Avalanche: row, column group, stream, step and seed, 16 low bits each."""
    base = {"seed": 5, "stream": 9, "step": 2, "row_offset": 64, "column_offset": 1024}

    def bits(**changed: int) -> torch.Tensor:
        words = random_words((1, 4), **(base | changed))
        return (words[..., None] >> torch.arange(8)) & 1

    for name in base:
        flipped = [
            (bits() ^ bits(**{name: base[name] ^ (1 << bit)})).float().mean()
            for bit in range(2 if name == "column_offset" else 0, 32)
        ]
        # About 30 trials of 32 fair bits: standard deviation 0.016.
        assert abs(float(sum(flipped)) / len(flipped) - 0.5) < 0.08, name


def test_rounding_means_are_right_over_words() -> None:
    """The mean of 2^20 words is 127.5 within 5 standard deviations (73.9 / 2^10 each)."""
    words = random_words((512, 2048), seed=1, stream=1)
    assert abs(words.double().mean() - 127.5) < 5 * 73.9 / 1024


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), width=st.sampled_from([0.1, 1.0, 10.0]))
def test_rounding_to_a_grid_is_a_cast_where_torch_has_one(seed: int, width: float) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * width
    x[:3] = torch.tensor([0.0, -0.0, math.nan])
    for dtype, mantissa_bits, min_exponent in (
        (torch.float8_e4m3fn, 3, -6),
        (torch.float8_e5m2, 2, -14),
        (torch.bfloat16, 7, -126),
        (torch.float16, 10, -14),
    ):
        ours = round_to_nearest_(x.clone(), mantissa_bits=mantissa_bits, min_exponent=min_exponent)
        assert torch.equal(ours[:2], torch.zeros(2)) and ours[2].isnan()
        assert torch.equal(ours[3:], x[3:].to(dtype).float())
