"""The quadratic model of a step: its minimum along one or more directions, and inner products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_fx.optim import quadratic
from kfac_fx.optim.quadratic import QuadraticModel, combination, inner_products

pytestmark = pytest.mark.usefixtures("float64")


def positive(n: int, scale: float) -> Tensor:
    root = torch.randn(n, n)
    return scale * (root @ root.T + 1e-6 * torch.eye(n))


def parallel(n: int, scale: float) -> Tensor:
    """Of directions that are multiples of each other."""
    v = torch.randn(n, 1)
    return scale * v @ v.T


def diagonal(n: int, scale: float) -> Tensor:
    return scale * torch.diag(torch.arange(float(n)) + 1.0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("kind", [positive, parallel, diagonal])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_minimum_is_that_of_the_pseudo_inverse(n: int, kind: object, scale: float) -> None:
    for _ in range(20):
        B = kind(n, scale)  # type: ignore[operator]
        b = B @ torch.randn(n)
        found, value = QuadraticModel(B, b).minimum()
        wanted = -(torch.linalg.pinv(B, hermitian=True) @ b)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=0)
        assert value == pytest.approx(float(0.5 * wanted @ b), rel=1e-8)
        assert value <= 0


def test_a_flat_model_moves_nothing() -> None:
    for n in (1, 2):
        found, value = QuadraticModel(torch.zeros(n, n), torch.ones(n)).minimum()
        assert found.abs().sum() == 0 and value == 0


def test_what_is_not_a_number_stays_so() -> None:
    found, _ = QuadraticModel(torch.full((2, 2), float("nan")), torch.ones(2)).minimum()
    assert found.isnan().any()


def directions(count: int) -> list[dict[str, Tensor]]:
    """Of entries in two precisions and of complex ones."""
    return [
        {
            "a": torch.randn(3, 4),
            "b": torch.randn(5).float(),
            "c": torch.randn(2, 3, dtype=torch.complex128),
            "d": torch.randn(4, 3).T,
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("at_once", [1, 12, 2**20])
def test_inner_products(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many entries are widened at once."""
    monkeypatch.setattr(quadratic, "AT_ONCE", at_once)
    given = directions(3)
    found = inner_products(given)
    for i, one in enumerate(given):
        for j, other in enumerate(given):
            pairs = ((one[n].to(other[n].dtype), other[n]) for n in one)
            wanted = sum((p.conj() * q).sum().real.double() for p, q in pairs)
            torch.testing.assert_close(found[i, j], torch.as_tensor(wanted), rtol=1e-6, atol=1e-9)


def test_a_combination_leaves_the_directions_alone() -> None:
    given = directions(2)
    before = [{name: value.clone() for name, value in one.items()} for one in given]
    found = combination([0.5, -2.0], given)
    for name, value in found.items():
        wanted = 0.5 * before[0][name] - 2.0 * before[1][name]
        torch.testing.assert_close(value, wanted)
        assert torch.equal(given[0][name], before[0][name])
