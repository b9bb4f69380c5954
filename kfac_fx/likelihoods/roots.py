"""Square roots of the output Fisher for distributions of torch that no likelihood here returns.

A callable from outputs to one of them has the exact Fisher, products with it, and statistics with
random signs (``builtin.ROOTS``). The Fishers are textbook ones; docs/explanation/mathematics.md,
section 3, has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch import distributions as D

from kfac_fx.likelihoods.builtin import FIXED, ROOTS, location_scale_root, may_vary


def _above_zero(value: Tensor) -> Tensor:
    """Return a rate with a slope that is finite, also where it has underflown to zero."""
    return value.clamp_min(torch.finfo(value.dtype).tiny)


def _poisson_root(distribution: D.Poisson) -> Iterator[Tensor]:
    # F_out = 1 / rate, the square of the derivative of 2 sqrt(rate).
    yield (2 * _above_zero(distribution.rate).sqrt()).unsqueeze(-1)


def _exponential_root(distribution: D.Exponential) -> Iterator[Tensor]:
    # F_out = 1 / rate^2.
    yield _above_zero(distribution.rate).log().unsqueeze(-1)


def _laplace_root(distribution: D.Laplace) -> Iterator[Tensor]:
    # F_out = diag(1 / b^2, 1 / b^2) in (loc, scale b).
    yield from location_scale_root(distribution, 1.0)


def _log_normal_root(distribution: D.LogNormal) -> Iterator[Tensor]:
    # A function of y that does not depend on the outputs changes no Fisher.
    yield from ROOTS[D.Normal](distribution.base_dist)


def _gamma_root(distribution: D.Gamma) -> Iterator[Tensor]:
    # F_out in (shape a, rate b) is [[trigamma(a), -1 / b], [-1 / b, a / b^2]]. Its root has the
    # columns (-1 / sqrt(a), sqrt(a) / b) and (sqrt(trigamma(a) - 1 / a), 0).
    shape, rate = distribution.concentration, distribution.rate
    a, b = shape.detach(), rate.detach()
    yield (a.sqrt() / b * rate - shape / a.sqrt()).unsqueeze(-1)
    if may_vary(shape):
        # Of a large shape the difference is lost in rounding, and half a square is left of it.
        exact = torch.polygamma(1, a) - 1 / a
        rest = torch.where(a < 100, exact, 0.5 / a.square() + 1 / (6 * a**3))
        yield (rest.clamp_min(0).sqrt() * shape).unsqueeze(-1)


def _negative_binomial_root(distribution: D.NegativeBinomial) -> Iterator[Tensor]:
    # F_out = total_count p in the logit, while total_count is no output.
    logits = distribution.logits
    f = (distribution.total_count.detach() * logits.detach().sigmoid()).sqrt()
    yield (f * logits).unsqueeze(-1)


ROOTS[D.Poisson] = _poisson_root
ROOTS[D.Exponential] = _exponential_root
ROOTS[D.Laplace] = _laplace_root
ROOTS[D.LogNormal] = _log_normal_root
ROOTS[D.Gamma] = _gamma_root
ROOTS[D.NegativeBinomial] = _negative_binomial_root
FIXED[D.NegativeBinomial] = "total_count"
