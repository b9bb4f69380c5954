"""Weights that are computed from a parameter on their way to a use (scaled, standardised, masked).

The use is that of the computed weight W; the parameter V gets its factors with G scaled, row by
row, by what stands between the two. Where W_o = s_o V_o with s free of V that is exact. Elsewhere
(weight normalisation, standardisation) the rest of the Jacobian is left out, and the block says
so. What a weight goes through is not matched by name: its Jacobian is looked at.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from kfac_fx.capture.parameter_paths import Derivation, Reference
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import NodeRef, ParameterUse, Scale
from kfac_fx.ops.row_scale import row_factors
from kfac_fx.passes.rules.base import Refusal, Site, joined

POINTS = 4
LEAST_SHARE = 0.25
"""Least share of the Jacobian's squares that the factors of the rows must account for."""


def weight_of(value: object, site: Site) -> Reference | None:
    """The open parameter behind a weight, or the one that it is computed from."""
    return site.parameter(value) or site.view.derived(value, site.open)


def apart(weight: Reference, site: Site) -> bool:
    """Whether a bias beside the weight needs a block of its own."""
    return weight.derived is not None or weight.name in site.alone


def through_derivation(use: ParameterUse, weight: Reference) -> ParameterUse | Refusal:
    """The use of a weight as a use of the parameter that it is computed from."""
    derivation = weight.derived
    if derivation is None or use.tap is None:
        return use
    way = " -> ".join(weight.path)
    rows = _rows(use.layouts[0], derivation.seen)
    if rows is None:
        return Refusal(f"{way}: its rows are mixed on the way")
    measured = _measure(derivation, rows)
    if measured is None:
        return Refusal(f"{way}: what it goes through does more than scale its rows")
    entrywise, share = measured
    nodes = NodeRef(derivation.result.name), NodeRef(derivation.source.name)
    reason = None
    if share is not None:
        part = f"{share:.1%} of its Jacobian" + " where that is not zero" * entrywise
        reason = f"{way}: taken as a factor for each row, {part}"
    tap = replace(use.tap, scale=Scale(*nodes, rows, entrywise, not derivation.seen.steps))
    return replace(use, tap=tap, reason=joined(use.reason, reason))


def _rows(layout: Layout, seen: Layout) -> tuple[int, ...] | None:
    """Dimensions of a view of a parameter that count the rows of its matrix (or matrices).

    Args:
        layout: from the parameter's shape to the matrices'.
        seen: from the parameter's shape to the view's.
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


def _measure(derivation: Derivation, rows: Collection[int]) -> tuple[bool, float | None] | None:
    """Whether entries go their way alone, and the share of the Jacobian that scales the rows.

    The Jacobian is looked at for the parameter's value and for others near it. The share is None
    where the factors of the rows are all that it is; None for both where it is too small. Entries
    that do not move the result (masked ones) are not counted.
    """
    generator = torch.Generator().manual_seed(0)
    value = derivation.start
    sizes = [n if d in rows else 1 for d, n in enumerate(value.shape)]
    spread = 0.3 * (float(value.square().mean().sqrt()) or 1.0)
    entrywise, exact, rest, total = True, True, 0.0, 0.0
    for index in range(POINTS):
        noise, direction = (
            torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
            for _ in range(2)
        )
        try:
            point = (value + spread * noise if index else value).requires_grad_()
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
    return (entrywise, None if exact else share) if exact or share >= LEAST_SHARE else None


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, which may be that of single precision."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())
