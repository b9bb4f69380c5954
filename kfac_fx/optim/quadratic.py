"""The quadratic model of the objective with the exact Fisher (Martens & Grosse 2015, section 6.4).

M(delta) = 1/2 delta^T (F + (lambda + eta) I) delta + grad^T delta. Products with F on a batch need
one forward-mode derivative of the network for each direction, and the output Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_fx.likelihoods.batch import BatchLikelihood
from kfac_fx.torch_internals import foreach
from kfac_fx.torch_internals.error_texts import refuses_nested_forward_mode

Direction = dict[str, Tensor]
"""A tensor of the shape of each parameter, by name: a gradient, a proposal, an update."""

Parameters = Mapping[str, Tensor]
"""Parameters by name, which nobody here writes to."""


@contextmanager
def _differentiable_forward() -> Iterator[None]:
    """Take kernels with a forward-mode derivative: fused attention and oneDNN's LSTM have none."""
    enabled = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


@torch.no_grad()
def fisher_gram(
    run: Callable[[Parameters], BatchLikelihood],
    parameters: Parameters,
    directions: Sequence[Direction],
) -> Tensor:
    """Return v_i^T F v_j for all pairs of directions: [n, n] in float64, F of one likelihood term.

    With B the derivative of the output Fisher's root, F = J^T B^T B J. One derivative in forward
    mode gives B J v for a direction, and the products of those are all that is asked for: F itself
    has parameters squared many entries.

    Args:
        run: a function from parameters by name to what the likelihood says about the outputs; it is
            called once a direction, and its outputs must not depend on random numbers that change.
        parameters: where the derivatives are taken.
        directions: v_1 to v_n.
    """
    rows: list[Tensor] = []
    count = 1.0  # of likelihood terms: the same for all directions
    for direction in directions:
        tangents = {name: direction[name].to(p.dtype) for name, p in parameters.items()}
        with _differentiable_forward():
            count, terms = _derivative(run, parameters, tangents)
        rows.append(terms.double())
    stacked = torch.stack(rows)
    return stacked @ stacked.T / count


def _derivative(
    run: Callable[[Parameters], BatchLikelihood],
    parameters: Parameters,
    tangents: Direction,
) -> tuple[float, Tensor]:
    """Return the number of terms, and the derivative of the output Fisher's root in a direction."""
    try:
        with forward_ad.dual_level():
            made = run({n: forward_ad.make_dual(p, tangents[n]) for n, p in parameters.items()})
            terms = made.root()
            tangent: Tensor | None = forward_ad.unpack_dual(terms).tangent
        return made.count, torch.zeros_like(terms) if tangent is None else tangent
    except RuntimeError as error:
        if not refuses_nested_forward_mode(error):
            raise
    # The outputs hold forward-mode derivatives themselves (residuals of differential equations).
    # torch.func nests its levels, dual_level does not; it is tried second, as it costs more.
    counts: list[float] = []

    def terms_of(given: Parameters) -> Tensor:
        made = run(given)
        counts.append(made.count)
        return made.root()

    derivative: Tensor = torch.func.jvp(terms_of, (dict(parameters),), (tangents,))[1]
    return counts[-1], derivative


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
        coefficients = -(torch.linalg.pinv(self.B, hermitian=True) @ self.b)
        return coefficients, self.at(coefficients)

    def at(self, coefficients: Tensor) -> float:
        """Return M of a combination of the directions, whose coefficients are [n]."""
        return float(0.5 * coefficients @ self.B @ coefficients + self.b @ coefficients)


def inner_products(directions: Sequence[Direction]) -> Tensor:
    """Return the sums of the products of all entries, for all pairs: [n, n] in float64.

    Entries of complex tensors count as two real ones. In float32 the sums over millions of entries
    would lose the differences that (alpha, mu) are computed from.
    """
    result = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for name, like in directions[0].items():
        rows = torch.stack([_wide(d[name]) for d in directions])
        result = result.to(like.device).addmm_(rows, rows.mT)
    return result


def _wide(value: Tensor) -> Tensor:
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.reshape(-1).to(torch.float64)


def combination(coefficients: Sequence[float], directions: Sequence[Direction]) -> Direction:
    """Return sum_i c_i v_i; the directions stay as they are."""
    result = {name: value * coefficients[0] for name, value in directions[0].items()}
    for c, direction in zip(coefficients[1:], directions[1:], strict=True):
        foreach.add_(list(result.values()), [direction[n] for n in result], alpha=c)
    return result


def cloned(direction: Parameters) -> Direction:
    """Return a copy with memory of its own."""
    return {name: value.clone() for name, value in direction.items()}


def shorten(updates: Direction, gradient: Parameters, largest: float) -> None:
    """Scale Fhat^-1 gradient in place to a squared length of at most ``largest``.

    The squared length in Fhat is gradient^T Fhat^-1 gradient, so that no product with Fhat is
    needed (docs/explanation/mathematics.md, section 9).

    Args:
        updates: Fhat^-1 times the gradient; other names in it are left alone.
        gradient: the gradient, by the names of what is scaled.
        largest: above zero.
    """
    lengths = [(gradient[n] * updates[n].conj()).sum().real.double() for n in gradient]
    length = torch.stack(lengths).sum().clamp_min(1e-300)
    # An infinite length would scale the update to zero, which passes for a finite one; not a number
    # makes it not finite, and the caller skips the step.
    length = torch.where(length.isfinite(), length, torch.nan)
    scale = float((largest / length).sqrt().clamp_max(1.0))
    foreach.mul_([updates[n] for n in gradient], scale)
