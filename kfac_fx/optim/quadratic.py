"""The quadratic model of the objective with the exact Fisher (Martens & Grosse 2015, section 6.4).

M(delta) = 1/2 delta^T (F + (lambda + eta) I) delta + grad^T delta. Products with F are those of
products.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.optim.products import Direction, Parameters
from kfac_fx.torch_internals import foreach


@dataclass(frozen=True)
class QuadraticModel:
    """M along the proposal Delta and, if there is one, the previous update delta_0.

    Restricted to their span, M is a quadratic function of one or two numbers, whose minimum is the
    learning rate alpha and the momentum mu: nothing has to be tuned.

    Args:
        B: v_i^T (F + (lambda + eta) I) v_j, [n, n] in float64.
        b: grad^T v_i, [n] in float64.
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
        """Return the model along directions.

        Args:
            directions: v_1 to v_n.
            gram: v_i^T F v_j, [n, n].
            gradient: the gradient of the objective with its l2 term.
            damping: lambda + eta. Too little of it makes steps that the model is wrong about.
        """
        dots = inner_products([*directions, gradient])
        return cls(gram + damping * dots[:-1, :-1], dots[-1, :-1])

    def minimum(self) -> tuple[Tensor, float]:
        """Return (alpha, mu) that minimise M, [n], and its value there, which is not positive."""
        # The previous update is often nearly parallel to the proposal. A pseudo-inverse then takes
        # the shortest solution, where a solve would give huge steps of opposite signs.
        if len(self.b) > 2:
            coefficients = -(torch.linalg.pinv(self.B, hermitian=True) @ self.b)
        else:
            found = _least(self.B.tolist(), self.b.tolist())
            coefficients = torch.tensor(found, dtype=self.b.dtype, device=self.b.device)
        return coefficients, self.at(coefficients)

    def at(self, coefficients: Tensor) -> float:
        """Return M of a combination of the directions, whose coefficients are [n]."""
        return float(0.5 * coefficients @ self.B @ coefficients + self.b @ coefficients)


def _least(B: list[list[float]], b: list[float]) -> list[float]:
    """Return -B^+ b for one or two numbers: LAPACK takes as long as a small network's forward."""
    if len(b) == 1:
        return [-b[0] / B[0][0] if B[0][0] != 0 else 0.0]
    (p, q), (_, r) = B
    # The eigenvalues of [[p, q], [q, r]]; the smaller one by the determinant, which is exact where
    # the difference of two large numbers is not.
    large = (p + r) / 2 + math.copysign(math.hypot((p - r) / 2, q), p + r)
    if large == 0:
        return [0.0, 0.0]
    small = (p * r - q * q) / large
    angle = 0.5 * math.atan2(2 * q, p - r) + (0.0 if p + r >= 0 else 0.5 * math.pi)
    x, y = math.cos(angle), math.sin(angle)  # of the larger one; (-y, x) of the other
    along = -(x * b[0] + y * b[1]) / large
    across = 0.0
    if abs(small) > 2 * sys.float_info.epsilon * abs(large):
        across = -(x * b[1] - y * b[0]) / small
    return [along * x - across * y, along * y + across * x]


def inner_products(directions: Sequence[Direction]) -> Tensor:
    """Return the sums of the products of all entries, for all pairs: [n, n] in float64.

    Entries of complex tensors count as two real ones. In float32 the sums over millions of entries
    would lose the differences that (alpha, mu) are computed from.
    """
    result = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for names in _parts(directions[0]):
        rows = torch.stack([_flat(direction, names) for direction in directions]).double()
        result = result.to(rows.device).addmm_(rows, rows.mT)
    return result


AT_ONCE = 2**20
"""Entries of a direction that are copied to float64 at once."""


def _parts(like: Parameters) -> list[list[str]]:
    """Return the names in groups that lie on one device: few calls, and no large copies."""
    parts: list[list[str]] = []
    size, device = AT_ONCE, None
    for name, value in like.items():
        if size + value.numel() > AT_ONCE or value.device != device:
            parts.append([])
            size, device = 0, value.device
        size += value.numel()
        parts[-1].append(name)
    return parts


def _flat(direction: Parameters, names: Sequence[str]) -> Tensor:
    values = (direction[name] for name in names)
    real = (torch.view_as_real(v) if v.is_complex() else v for v in values)
    return torch.cat([v.reshape(-1) for v in real])


def combination(coefficients: Sequence[float], directions: Sequence[Direction]) -> Direction:
    """Return sum_i c_i v_i; the directions stay as they are."""
    first = directions[0]
    result = dict(zip(first, foreach.mul(list(first.values()), coefficients[0]), strict=True))
    for c, direction in zip(coefficients[1:], directions[1:], strict=True):
        foreach.add_(list(result.values()), [direction[n] for n in result], alpha=c)
    return result


def cloned(direction: Parameters) -> Direction:
    """Return a copy with memory of its own."""
    return {name: value.clone() for name, value in direction.items()}
