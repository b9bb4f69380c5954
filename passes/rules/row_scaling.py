"""Find what part of a weight's way from its parameter is a factor for each row.

What a weight goes through (scaling, standardisation, a mask) is not matched by name: its Jacobian
is looked at, for the parameter's value and for others near it.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.capture.parameter_paths import Derivation
from kfac_fx.ir.layout import Layout
from kfac_fx.ops.row_factors import row_factors

POINTS = 4
"""Values of the parameter for which the Jacobian is looked at; the first is its own."""

LEAST_SHARE = 0.25
"""Least share of the Jacobian's squares that the factors of the rows must account for.

Below it the scaled factors would describe little of the parameter's curvature; the generic rule's
squared gradient is then the more honest statistic.
"""


class RowScaling(NamedTuple):
    """The operations between a parameter and a weight, as far as they scale rows.

    Attributes:
        entrywise: whether each entry is computed from the same entry alone.
        share: the share of the Jacobian's squares that factors for each row account for; None
            where they are all that it is.
    """

    entrywise: bool
    share: float | None


def counting_dims(layout: Layout, seen: Layout) -> tuple[int, ...] | None:
    """Return the dimensions of a parameter's view that count the rows of its matrix (or matrices).

    Args:
        layout: the views from the parameter's shape to the matrices'.
        seen: the views from the parameter's shape to the view's.

    Returns:
        None where a row of the matrix has entries of several of the view's rows.
    """
    if not layout.whole:
        return None
    block = layout.apply(torch.arange(prod(layout.start)).reshape(layout.start))
    count = block.shape[:-1].numel()
    owner = torch.empty(block.numel(), dtype=torch.long)
    owner[block.reshape(count, -1)] = torch.arange(count).unsqueeze(1)
    owner = seen.apply(owner.reshape(layout.start))
    axes = range(owner.dim())
    rows = tuple(d for d in axes if not torch.equal(owner, owner.narrow(d, 0, 1).expand_as(owner)))
    others = [d for d in axes if d not in rows]
    straight = owner.permute(*rows, *others).reshape(count, -1)
    same = torch.equal(straight, torch.arange(count).unsqueeze(1).expand_as(straight))
    return rows if same else None


def measure_scaling(derivation: Derivation, rows: Collection[int]) -> RowScaling | None:
    """Return how far a derivation scales rows; None where that is too little, or it cannot be run.

    Entries that do not move the result (masked ones) are not counted.

    Args:
        derivation: computes the weight from the parameter.
        rows: dimensions of both that count the rows.
    """
    generator = torch.Generator().manual_seed(0)
    value = derivation.start
    sizes = [n if d in rows else 1 for d, n in enumerate(value.shape)]
    # A function may scale rows at one point by chance (a mask of zeros, an initial value): others
    # near it, at the parameter's own size, decide.
    spread = 0.3 * (float(value.square().mean().sqrt()) or 1.0)
    entrywise, exact, rest, total = True, True, 0.0, 0.0
    for index in range(POINTS):
        noise, direction = (
            torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
            for _ in range(2)
        )
        try:
            point = (value + spread * noise if index else value).requires_grad_()
            # Two products with the Jacobian's transpose: of a random direction and of ones. Where
            # entries go their way alone they agree up to the direction, so the Jacobian is
            # diagonal.
            result = derivation.function(point)
            pulled, slope = (
                torch.autograd.grad(output.sum(), point, retain_graph=True)[0]
                for output in (result * direction, result)
            )
        except (RuntimeError, ValueError):
            return None
        entrywise = entrywise and _close(pulled, slope * direction)
        scaled = row_factors(result, point, list(rows), entrywise).reshape(sizes) * direction
        exact = exact and _close(scaled, pulled)
        if entrywise:
            scaled = scaled * (slope != 0)
        rest += float((pulled - scaled).square().sum())
        total += float(pulled.square().sum())
    share = 1 - rest / max(total, torch.finfo(value.dtype).tiny)
    if not exact and share < LEAST_SHARE:
        return None
    return RowScaling(entrywise, None if exact else share)


def _close(one: Tensor, other: Tensor) -> bool:
    """Tell whether two are equal up to rounding, which may be that of single precision."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())
