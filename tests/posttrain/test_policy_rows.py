"""Rollouts packed into training rows.

Second truth: a search of the rows for every rollout, place by place. Not covered: what the trainer
makes of the rows (policy_supply).
"""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.posttrain.policy_rows import PolicyRows, pack_rollouts
from nemotron_train.posttrain.rollout import Rollout
from tests.posttrain.rollouts import rollout

PADDING, LENGTH = 77, 12


@st.composite
def batches(draw: st.DrawFn) -> list[Rollout]:
    found = []
    for number in range(draw(st.integers(0, 9))):
        prompt = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
        kinds = draw(st.text("sfe", max_size=LENGTH + 1 - len(prompt)))
        ids = draw(st.lists(st.integers(0, 60), min_size=len(kinds), max_size=len(kinds)))
        found.append(rollout(prompt, ids, kinds, sequence=number))
    return found


def documents(rows: PolicyRows) -> list[tuple[int, list[int], list[tuple[bool, float]]]]:
    """(index of the rollout, tokens, whether each target was sampled and its log-probability), of
    each document that is not padding, read place by place."""
    found = []
    for row in range(len(rows.tokens_BS)):
        place = 0
        while place < rows.tokens_BS.shape[1]:
            document, end = rows.document_ids_BS[row, place], place
            while end < rows.tokens_BS.shape[1] and rows.document_ids_BS[row, end] == document:
                end += 1
            tokens = [*rows.tokens_BS[row, place:end], rows.labels_BS[row, end - 1]]
            targets = [
                (bool(rows.trained_BS[row, i]), float(rows.sampler_BS[row, i]))
                for i in range(place, end)
            ]
            found.append((int(rows.rollout_BS[row, place]), list(map(int, tokens)), targets))
            place = end
    return found


@given(given_rollouts=batches(), multiple=st.integers(1, 3), least=st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_every_rollout_is_there_once_and_whole(
    given_rollouts: list[Rollout], multiple: int, least: int
) -> None:
    rows = pack_rollouts(given_rollouts, LENGTH, multiple, PADDING, least)
    count = len(rows.tokens_BS)
    assert count >= max(least, 1) and count % multiple == 0
    assert rows.tokens_BS.shape == rows.labels_BS.shape == (count, LENGTH)
    np.testing.assert_array_equal(rows.tokens_BS[:, 1:], rows.labels_BS[:, :-1])
    np.testing.assert_array_equal(rows.loss_mask_BS, rows.trained_BS.astype(np.float32))
    filled = {number for number, one in enumerate(given_rollouts) if one.ids}
    seen: list[int] = []
    for number, tokens, targets in documents(rows):
        if number < 0:
            assert not any(sampled for sampled, _ in targets)
            continue
        seen.append(number)
        one = given_rollouts[number]
        whole = one.prompt_ids + one.ids
        # The last place of a document that fills no row predicts what follows it: never trained.
        assert tokens[: len(whole)] == whole and len(tokens) <= len(whole) + 1
        wanted = [(False, 0.0)] * (len(one.prompt_ids) - 1)
        for kind, value in zip(one.kinds, one.log_probabilities, strict=True):
            wanted.append((True, value) if kind == "s" else (False, 0.0))
        assert targets[: len(wanted)] == wanted
        assert not any(sampled for sampled, _ in targets[len(wanted) :])
    assert sorted(seen) == sorted(filled)
    sampled = sum(one.kinds.count("s") for one in given_rollouts)
    assert rows.trained_BS.sum() == sampled == rows.loss_mask_BS.sum()
    assert np.isfinite(rows.sampler_BS).all()
    padding = np.bincount(rows.rollout_BS[rows.trained_BS] + 1, minlength=1)[0]
    assert padding == 0, "every trained target belongs to a rollout"
    for number, one in enumerate(given_rollouts):
        of_one = rows.trained_BS & (rows.rollout_BS == number)
        assert of_one.sum() == one.kinds.count("s")
        assert rows.labels_BS[of_one].tolist() == [
            token for token, kind in zip(one.ids, one.kinds, strict=True) if kind == "s"
        ]


def test_the_stop_token_is_trained_and_padding_is_not() -> None:
    """One rollout that ends with its stop token 2, by hand."""
    rows = pack_rollouts([rollout([5, 6], [7, 9, 2], "ses")], 7, 1, PADDING)
    assert rows.tokens_BS.tolist() == [[5, 6, 7, 9, 2, 77, 77]]
    assert rows.labels_BS.tolist() == [[6, 7, 9, 2, 77, 77, 77]]
    assert rows.loss_mask_BS.tolist() == [[0, 1, 0, 1, 0, 0, 0]]
    assert rows.sampler_BS.tolist() == [[0, -0.5, 0, -1.5, 0, 0, 0]]
    assert rows.document_ids_BS.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert rows.rollout_BS.tolist() == [[0, 0, 0, 0, -1, -1, -1]]
    assert math.isnan(rollout([5], [7], "e").log_probabilities[0])
