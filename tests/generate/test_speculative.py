"""The account of drafts.

Not covered here: drafting (test_engine.py), judging (test_sampling.py).
"""

import pytest

from nemotron_train.generate.speculative import Acceptance


def test_rates_are_of_the_drafts_that_were_judged() -> None:
    """By hand: three sequences with two drafts each, of which none, both and the first are
    accepted; then one with one draft, refused. The second draft of a sequence is judged only if the
    first was accepted. Each round also gives the token after the last accepted draft."""
    account = Acceptance()
    account.count([0, 2, 1], num_drafted=2)
    account.count([0], num_drafted=1)
    assert account.rates == pytest.approx([2 / 4, 1 / 2])
    assert account.rounds == 4
    assert account.mean_length == pytest.approx(1 + 3 / 4)
