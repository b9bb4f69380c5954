"""The mean eigenvalue of the estimated Fisher, the scale that a damping is compared with.

Averages are of many batches, and behind where the Fisher shrinks with the loss: ``Newest`` has the
same number for the newest statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_fx.curvature.estimate import Averages, Came, Estimate
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph

SMALLEST = 1e-30
"""Of a mean eigenvalue: its root and its inverse are still numbers in float32."""

DAMPING_SHARE = 0.2
"""lambda in mean eigenvalues, where none is given: more hides the curvature, less trusts noise."""

FADING = 0.2
"""Weight of the older in the fading mean of newest traces; hard cases come in few batches."""


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
    # As it is stored, one triangle may be out of date and the precision lower: only the diagonal is
    # read, so a large factor on the host is neither mirrored nor copied.
    return _trace(averages, averages.sizes([average.stored for average in averages.all]))


def _trace(averages: Averages, sizes: Sequence[Tensor]) -> Tensor:
    """Return the trace of a block from the diagonals of its factors; see ``Averages.sizes``."""
    # The form of the factors says all there is to know, whatever approximation the block has: those
    # of one form are multiplied group by group, and products are added up.
    products: dict[int, Tensor] = {}
    for spec, size in zip(averages.holder.factors, sizes, strict=True):
        if spec.role == "count":
            continue
        found = size.sum(-1, dtype=torch.float64)  # of each group
        found = found.sum() if spec.cut else found  # of all sub-blocks
        before = products.get(spec.form)
        products[spec.form] = found if before is None else before * found
    # Calls cost more than numbers here, in every step with statistics: only what is several is
    # summed.
    traces = [product.sum() if product.dim() else product for product in products.values()]
    return traces[0] if len(traces) == 1 else torch.stack(traces).sum()


class Newest:
    """The mean eigenvalue of the newest statistics, from fading means of each block's trace.

    The shape of the Fisher changes slowly and wants long averages; its scale may fall by a
    thousand within as many steps, as the cases of a classifier are fitted, and an average that
    forgets a twentieth each time is a hundred times too large by then. So are the damping and the
    steps that go with it: the scale is told apart.

    Args:
        traces: by block, of an earlier one's ``traces``.

    Attributes:
        traces: by block; those of one that got no statistics lately are older.
    """

    def __init__(self, traces: Mapping[str, float] = {}) -> None:
        self.traces = dict(traces)
        self._mean: float | None = None  # of the traces, once somebody has asked

    @torch.no_grad()
    def add(self, came: Sequence[Came]) -> None:
        """Take new statistics; those of pairs and moments do not count."""
        found = {
            each.averages.holder.name: _trace(each.averages, each.sizes)
            for each in came
            if isinstance(each.averages.holder, CurvatureBlock)
        }
        if not found:
            return
        self._mean = None
        device = next(iter(found.values())).device
        traces = torch.stack([trace.to(device) for trace in found.values()]).tolist()
        for name, value in zip(found, traces, strict=True):
            old = self.traces.get(name)
            self.traces[name] = value if old is None else FADING * old + (1 - FADING) * value

    def lag(self, curvature: CurvatureGraph, mean: float) -> float:
        """Return how many times larger an average is than the newest statistics, at least 1.

        Args:
            curvature: the blocks.
            mean: the mean eigenvalue of the averages that are in use.
        """
        if self._mean is None:
            size = sum(curvature.blocks[name].parameter_count for name in self.traces)
            self._mean = sum(self.traces.values()) / size if size else mean
        # An average that is too small gives long steps, which the bounds on lengths shorten: it is
        # left alone, for a single batch with hard cases must not make the next steps tiny.
        return max(1.0, mean / max(self._mean, SMALLEST))
