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
    account.count([0, 2, 1], taken=[1, 3, 2], num_drafted=2)
    account.count([0], taken=[1], num_drafted=1)
    assert account.rates == pytest.approx([2 / 4, 1 / 2])
    assert account.rounds == 4
    assert account.mean_length == pytest.approx(1 + 3 / 4)


def test_drafts_after_the_end_are_neither_accepted_nor_refused() -> None:
    """By hand: of three drafts, sequences take no accepted one but their first token, which ended
    them; one of two accepted; and two of two, where the third would have been refused."""
    account = Acceptance()
    account.count([3, 2, 2], taken=[1, 1, 2], num_drafted=3)
    assert (account.reached, account.accepted) == ([3, 1, 0], [3, 1, 0])
    assert account.tokens == 4 and account.mean_length == pytest.approx(4 / 3)
