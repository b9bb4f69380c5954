"""Which batches an optimizer believes: losses, gradients and cases beside their averages."""

from __future__ import annotations

import math

import pytest
import torch

from kfac_fx.optim.batch_trust import BROKEN, PATIENCE, BatchTrust


def believes(trust: BatchTrust, loss: float, norm: float = 2.0) -> bool:
    """Of a gradient in two tensors."""
    parts = [torch.tensor([0.6 * norm]), torch.tensor([[0.8 * norm]])]
    return trust.believes(torch.tensor(loss), parts)


@pytest.fixture
def trust() -> BatchTrust:
    """Losses of 1 and gradients of length 2 are usual, of 100 cases."""
    made = BatchTrust(5.0)
    assert believes(made, 1.0)
    made.accept(100)
    return made


def test_outliers_are_told_from_running_averages(trust: BatchTrust) -> None:
    assert believes(trust, 4.99) and not believes(trust, 5.01)
    assert believes(trust, 1.0, norm=999.0) and not believes(trust, 1.0, norm=1001.0)
    assert not believes(trust, math.nan) and not believes(trust, 1.0, norm=math.inf)
    assert believes(trust, 4.0)
    trust.accept(100)  # as 2, twice the usual, with a weight of 0.1
    assert believes(trust, 5.49) and not believes(trust, 5.51)


@pytest.mark.parametrize(("every", "learnt"), [(11, True), (60, False)])
def test_outliers_of_every_epoch_are_none(trust: BatchTrust, every: int, learnt: bool) -> None:
    """A lost case in one batch of eleven has to be fitted; one broken batch in sixty has not."""
    believed = []
    for batch in range(600):
        hard = batch % every == 0
        usual = believes(trust, 9.0 if hard else 1.0)
        believed += [usual] if hard else []
        if usual:
            trust.accept(100)
    assert any(believed) == learnt and not all(believed)


def test_all_that_is_finite_is_believed_where_outliers_are_not_told(trust: BatchTrust) -> None:
    one = [torch.ones(1)]
    assert trust.believes(torch.tensor(1e9), one, compared=False)
    assert not trust.believes(torch.tensor(math.nan), one, compared=False)
    assert not trust.believes(torch.tensor(1.0), [torch.full((1,), math.inf)], compared=False)


def test_many_outliers_in_a_row_are_none(trust: BatchTrust) -> None:
    assert not any(believes(trust, 9.0) for _ in range(PATIENCE - 1))
    assert believes(trust, 9.0)
    trust.accept(100)
    assert believes(trust, 44.0)  # learnt anew


def test_steps_that_went_wrong(trust: BatchTrust) -> None:
    """The same batch's loss, before and after."""
    assert not trust.grew(1.0, 4.99) and trust.grew(1.0, 5.01) and trust.grew(1.0, math.nan)
    assert not trust.grew(math.inf, math.inf)
    assert not trust.grew(0.0, 0.039) and trust.grew(0.0, 0.041)  # near a perfect fit


def test_few_cases_count_by_their_share(trust: BatchTrust) -> None:
    assert trust.share(26) == 1.0 and trust.share(25) == 0.25
    assert BatchTrust(5.0).share(1) == 1.0


def test_statistics_are_taken_as_they_are_after_many_that_were_no_good(trust: BatchTrust) -> None:
    for _ in range(PATIENCE):
        assert trust.widest() == 500.0 and trust.widest(compared=False) == BROKEN
        trust.fitted(False)
    assert trust.widest() == trust.widest(compared=False) == math.inf
    trust.fitted(True)
    assert trust.widest() == 500.0
