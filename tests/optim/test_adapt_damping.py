"""How KFAC adapts lambda and gamma, against their rules in closed form."""

from __future__ import annotations

import pytest

from kfac_fx import errors
from kfac_fx.optim import KFACOptions
from kfac_fx.optim.adapt_damping import FLOOR, LARGEST, DampingRule

ETA, SMALLEST, T1, T2 = 0.01, 0.04, 5, 20
OMEGA_1, OMEGA_2 = 0.95**5, 0.95**10


def rule(damping: float | None, limit: float = 100.0, **changes: float) -> DampingRule:
    given = {"damping_every": T1, "gamma_every": T2, "smallest_damping": SMALLEST, **changes}
    return DampingRule(damping, ETA, KFACOptions(gamma_limit=limit, **given))


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
    made.choose(0.0)
    assert made.candidates(1) == pytest.approx([(SMALLEST + ETA) ** 0.5])


def test_a_step_that_was_undone_raises_both() -> None:
    made = rule(2.0)
    gamma = made.gamma
    made.rejected()
    assert (made.damping, made.gamma) == pytest.approx((2.0 / OMEGA_1, gamma / OMEGA_2))
    made.choose(1e9)
    made.rejected()
    assert made.gamma == pytest.approx((2 * LARGEST) ** 0.5)


def test_omegas_and_the_scale_may_be_given() -> None:
    made = rule(2.0, omega1=0.5, omega2=0.25)
    made.judge(-1.0, -1.0)
    assert made.damping == 1.0
    gamma = (2.0 + ETA) ** 0.5
    assert made.candidates(T2) == pytest.approx([gamma, gamma / 4, gamma * 4])
    # Without a number, lambda_0 is the first mean eigenvalue, and its floor is relative to it.
    made = DampingRule(None, 0.0, KFACOptions(damping_every=T1))
    made.scaled(1e-8)
    made.scaled(2e-8)
    assert (made.damping, made.gamma) == pytest.approx((1e-8, 1e-4))
    made.damping = 1e-20
    made.judge(-1.0, -1.0)
    assert made.damping == 2e-8 * FLOOR


@pytest.mark.parametrize(
    "given",
    [{"omega1": 1.0}, {"omega1": 0.0}, {"omega2": 0.5}, {"damping_every": 0}, {"gamma_every": 1.5}],
    ids=str,
)
def test_wrong_options(given: dict[str, float]) -> None:
    with pytest.raises(errors.UnknownOptionError):
        KFACOptions(**given)
