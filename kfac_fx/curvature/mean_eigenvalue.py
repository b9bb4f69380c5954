"""The mean eigenvalue of the estimated Fisher, the scale that a damping is compared with."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from kfac_fx.curvature.estimate import Average, Averages, Estimate
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.ir.use import FactorSpec

SMALLEST = 1e-30
"""Of a mean eigenvalue: its root and its inverse are still numbers in float32."""


@torch.no_grad()
def mean_eigenvalue(curvature: CurvatureGraph, estimate: Estimate) -> float:
    """Return sum_b tr F_b / sum_b dim_b over the blocks with statistics, undamped.

    Couplings between blocks do not change a trace. See docs/explanation/mathematics.md, section 5.

    Args:
        curvature: the blocks.
        estimate: the running averages, with statistics of one batch at least.

    Returns:
        A number above zero; 1.0 where no derivative was ever other than zero, so that there is no
        scale.
    """
    # A block that never ran would make the mean smaller by its size, without a trace of its own.
    known = {name: of for name, of in estimate.blocks.items() if of.recorded}
    traces = [trace(averages).to(estimate.like.device) for averages in known.values()]
    size = sum(curvature.blocks[name].parameter_count for name in known)
    mean = float(torch.stack(traces).sum()) / size if traces else 0.0
    return max(mean, SMALLEST) if mean > 0 else 1.0


def trace(averages: Averages) -> Tensor:
    """Return the trace of a block, [] in float64: of a covariance, or sum of tr A_g tr G_g.

    Args:
        averages: of a block; groups of a convolution, or experts, are products of their own.
    """
    # The form of the factors says all there is to know, whatever approximation the block has: those
    # of one form are multiplied group by group, and products are added up.
    specs = [spec for spec in averages.holder.factors if spec.role != "count"]
    pairs = sorted(zip(specs, averages.factors, strict=True), key=lambda pair: pair[0].form)
    products = []
    for _, same in groupby(pairs, key=lambda pair: pair[0].form):
        traces = [_traces(spec, average) for spec, average in same]
        products.append((traces[0] * traces[1] if len(traces) > 1 else traces[0]).sum())
    return torch.stack(products).sum()


def _traces(spec: FactorSpec, average: Average) -> Tensor:
    """Return the trace of each group's factor, or of all sub-blocks of one that is cut."""
    # As it is stored, one triangle may be out of date and the precision lower: only the diagonal is
    # read, so a large factor on the host is neither mirrored nor copied.
    stored = average.stored
    flat = spec.diagonal or stored.dim() < 2  # a covariance that is one says so by its shape alone
    diagonal = stored if flat else stored.diagonal(0, -2, -1)
    found = diagonal.sum(-1, dtype=torch.float64)
    return found.sum() if spec.cut else found
