"""How KFAC adapts: lambda and gamma by their rules, and which batches it believes."""

from __future__ import annotations

import math

import pytest
import torch
from support.inside import estimate_of
from torch import nn

import kfac_fx
from kfac_fx.curvature.estimate import Averages
from kfac_fx.curvature.outliers import SETTLED, TINY, Fit, fit
from kfac_fx.optim.adapt_damping import LARGEST, DampingRule
from kfac_fx.optim.batch_trust import PATIENCE, BatchTrust

ETA, SMALLEST, T1, T2 = 0.01, 0.04, 5, 20
OMEGA_1, OMEGA_2 = 0.95**5, 0.95**10


def rule(damping: float, limit: float = 100.0) -> DampingRule:
    return DampingRule(damping, ETA, SMALLEST, limit, T1, T2)


@pytest.mark.parametrize(
    ("rho", "factor"), [(0.76, OMEGA_1), (0.75, 1.0), (0.25, 1.0), (0.24, 1 / OMEGA_1)]
)
def test_lambda_follows_the_reduction_ratio(rho: float, factor: float) -> None:
    """Martens & Grosse 2015, section 6.5."""
    made = rule(2.0)
    assert made.judge(-4 * rho, -4.0) == pytest.approx(rho)
    assert made.damping == pytest.approx(2.0 * factor)


def test_lambda_stays_within_limits() -> None:
    made = rule(SMALLEST / 0.9)
    made.judge(-1.0, -1.0)
    assert made.damping == SMALLEST
    made = rule(2.0)
    made.damping = 2 * LARGEST * 0.9
    made.judge(1.0, -1.0)
    assert made.damping == 2 * LARGEST
    made.rejected()
    assert made.damping == 2 * LARGEST
    assert rule(2.0).judge(-1.0, 0.0) == 1.0  # a model that predicts nothing


def test_gamma_is_searched_among_its_neighbours() -> None:
    """Section 6.6, every T2 iterations."""
    made = rule(2.0)
    gamma = (2.0 + ETA) ** 0.5
    assert made.candidates(T2 + 1) == [gamma]
    assert made.candidates(T2) == pytest.approx([gamma, gamma * OMEGA_2, gamma / OMEGA_2])
    assert rule(2.0, limit=1.0).candidates(T2) == pytest.approx([gamma, gamma * OMEGA_2])
    made.gamma = 0.0
    assert made.candidates(1) == pytest.approx([(SMALLEST + ETA) ** 0.5])


def test_a_step_that_was_undone_raises_both() -> None:
    made = rule(2.0)
    gamma = made.gamma
    made.rejected()
    assert (made.damping, made.gamma) == pytest.approx((2.0 / OMEGA_1, gamma / OMEGA_2))
    made.gamma = 1e9
    made.rejected()
    assert made.gamma == pytest.approx((2 * LARGEST) ** 0.5)


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
        assert trust.widest == 500.0
        trust.fitted(False)
    assert trust.widest == math.inf
    trust.fitted(True)
    assert trust.widest == 500.0


def entry(recorded: int, size: float = 1.0) -> Averages:
    """Of a layer whose averages A and G are multiples of the identity."""
    net = kfac_fx.transform(nn.Linear(2, 3, bias=False))
    (made,) = estimate_of(kfac_fx.Preconditioner(net)).all
    for average in made.all:
        average.write(size * torch.eye(len(average.stored)))
    made.recorded = recorded
    return made


@pytest.mark.parametrize(
    ("recorded", "A", "G", "expected"),
    [
        (SETTLED, 9.9, 9.9, Fit(False, False)),
        (SETTLED, 10.1, 1.0, Fit(True, False)),
        (SETTLED, 1.0, 10.1, Fit(True, False)),
        (SETTLED, 1 / 10.1, 1 / 10.1, Fit(False, False)),
        (1, 9.9, 1e9, Fit(False, False)),  # derivatives may start at zero
        (1, 10.1, 1.0, Fit(True, False)),
        (1, 1 / 10.1, 1.0, Fit(False, True)),
        (1, 1 / 9.9, 1e-9, Fit(False, False)),
        (1, TINY / 2, 1.0, Fit(False, False)),
        (0, 1e9, 1e9, Fit(False, False)),
    ],
)
def test_statistics_are_compared_with_their_averages(
    recorded: int, A: float, G: float, expected: Fit
) -> None:
    new = [A * torch.eye(2), G * torch.eye(3)]
    assert fit(entry(recorded).compared(new), 10.0) == expected


def test_statistics_of_what_has_just_come_to_life() -> None:
    new = [9.9 * TINY / 2**0.5 * torch.eye(2), torch.zeros(3, 3)]
    assert not fit(entry(SETTLED, 0.0).compared(new), 10.0).outlier
    assert fit(entry(SETTLED, 0.0).compared([1.1 * new[0], new[1]]), 10.0).outlier
    assert fit([], 10.0) == Fit(False, False)
