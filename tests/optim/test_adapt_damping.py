"""How KFAC adapts lambda and gamma, against their rules in closed form."""

from __future__ import annotations

import pytest

from kfac_fx.optim.adapt_damping import LARGEST, DampingRule

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
