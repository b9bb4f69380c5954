"""The quadratic model of the objective with the exact Fisher (Martens & Grosse 2015, section 6.4).

M(delta) = 1/2 delta^T (F + (lambda + eta) I) delta + grad^T delta. Products with F on a batch need
one forward-mode derivative of the network for each direction, and the output Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_fx.likelihoods.batch import BatchLikelihood

Direction = Mapping[str, Tensor]


@contextmanager
def _differentiable_forward() -> Iterator[None]:
    """Kernels that have a forward-mode derivative: fused attention and oneDNN's LSTM have none."""
    enabled = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


@torch.no_grad()
def fisher_gram(
    run: Callable[[Mapping[str, Tensor]], BatchLikelihood],
    parameters: Direction,
    directions: Sequence[Direction],
) -> Tensor:
    """v_i^T F v_j for all pairs of directions, [n, n] in float64.

    Args:
        run: from parameters by name to what the likelihood says about the outputs; called once a
            direction.
    """
    rows: list[Tensor] = []
    count = 1.0
    for direction in directions:
        tangents = {name: direction[name].to(p.dtype) for name, p in parameters.items()}
        with _differentiable_forward():
            count, terms = _derivative(run, parameters, tangents)
        rows.append(terms.double())
    stacked = torch.stack(rows)
    return stacked @ stacked.T / count


def _derivative(
    run: Callable[[Mapping[str, Tensor]], BatchLikelihood],
    parameters: Direction,
    tangents: Direction,
) -> tuple[float, Tensor]:
    """The number of terms, and the derivative of the root of the output Fisher in a direction."""
    try:
        with forward_ad.dual_level():
            made = run({n: forward_ad.make_dual(p, tangents[n]) for n, p in parameters.items()})
            terms = made.root()
            tangent: Any = forward_ad.unpack_dual(terms).tangent
        return made.count, torch.zeros_like(terms) if tangent is None else tangent
    except RuntimeError as error:
        if "Nested forward mode" not in str(error):
            raise
    # The outputs hold forward-mode derivatives themselves, which torch.func can nest.

    counts: list[float] = []

    def terms_of(given: Direction) -> Tensor:
        made = run(given)
        counts.append(made.count)
        return made.root()

    found: Any = torch.func.jvp(terms_of, (dict(parameters),), (dict(tangents),))
    return counts[-1], found[1]


@dataclass(frozen=True)
class QuadraticModel:
    """M along two directions: the proposal Delta and the previous update delta_0.

    Attributes:
        B: v_i^T (F + (lambda + eta) I) v_j, [n, n].
        b: grad^T v_i, [n].
    """

    B: Tensor
    b: Tensor

    @classmethod
    def along(
        cls,
        directions: Sequence[Direction],
        gram: Tensor,
        gradient: Direction,
        damping: float,
    ) -> QuadraticModel:
        """The model from products with F, with ``damping`` = lambda + eta."""
        dots = inner_products([*directions, gradient])
        return cls(gram + damping * dots[:-1, :-1], dots[-1, :-1])

    def minimum(self) -> tuple[Tensor, float]:
        """(alpha, mu) that minimise M, and its value there."""
        coefficients = -(torch.linalg.pinv(self.B, hermitian=True) @ self.b)
        return coefficients, self.at(coefficients)

    def at(self, coefficients: Tensor) -> float:
        """M of a combination of the directions."""
        return float(0.5 * coefficients @ self.B @ coefficients + self.b @ coefficients)


def inner_products(directions: Sequence[Direction]) -> Tensor:
    """Sums of the products of all entries, for all pairs: [n, n] in float64."""
    result = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for name, like in directions[0].items():
        rows = torch.stack([_wide(d[name]) for d in directions])
        result = result.to(like.device).addmm_(rows, rows.mT)
    return result


def _wide(value: Tensor) -> Tensor:
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.reshape(-1).to(torch.float64)


def combination(
    coefficients: Sequence[float], directions: Sequence[Direction]
) -> dict[str, Tensor]:
    """sum_i c_i v_i, by parameter."""
    result = {name: value * coefficients[0] for name, value in directions[0].items()}
    for c, direction in zip(coefficients[1:], directions[1:], strict=True):
        torch._foreach_add_(list(result.values()), [direction[n] for n in result], alpha=c)
    return result


def cloned(direction: Direction) -> dict[str, Tensor]:
    """A copy."""
    return {name: value.clone() for name, value in direction.items()}


def shorten(updates: Direction, gradient: Direction, largest: float) -> None:
    """Scales F^-1 gradient to a squared length gradient^T F^-1 gradient of at most ``largest``."""
    lengths = [(gradient[n] * updates[n].conj()).sum().real.double() for n in gradient]
    length = torch.stack(lengths).sum().clamp_min(1e-300)
    length = torch.where(length.isfinite(), length, torch.nan)  # zero would be taken for an update
    scale = float((largest / length).sqrt().clamp_max(1.0))
    torch._foreach_mul_([updates[n] for n in gradient], scale)
