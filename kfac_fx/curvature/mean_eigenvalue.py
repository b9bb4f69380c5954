"""The mean eigenvalue of the estimated Fisher, the scale that a damping is compared with.

Averages are of many batches, and behind where the Fisher shrinks with the loss: ``Newest`` has the
same number for the newest statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


class Scale(NamedTuple):
    """The scale of the newest statistics.

    Attributes:
        lag: how many times too large the averages are for them, 1 or more. The lambda that follows
            the averages is too large by as much, and the inverses are this many times too small, so
            that steps take it back.
        signal: 1, and less where rounding is all that is left of the Fisher: how much smaller than
            ``rounding`` its part of the largest one of earlier statistics is.
    """

    lag: float = 1.0
    signal: float = 1.0


NOTHING_LAGS = Scale()
"""Of a lambda that stays where it is, and makes the inverses stay with it."""


def rounding(dtype: torch.dtype) -> float:
    """Return the part of its largest value below which a mean eigenvalue is taken for rounding.

    Fitted cases have a Fisher and gradients of nothing else: weights would wander along it until
    the fit is lost, as normalised steps of noise are as long as others.
    """
    return 3e2 * torch.finfo(dtype).eps


SETTLING = 5
"""Statistics before the largest mean eigenvalue counts: initial weights may be of any scale."""

REMEMBERED = 0.999
"""Part of the largest mean eigenvalue that is left after each statistic; training may change it."""


class Newest:
    """The mean eigenvalue of the newest statistics, from fading means of each block's trace.

    The shape of the Fisher changes slowly and wants long averages; its scale may fall by a
    thousand within as many steps, as the cases of a classifier are fitted, and an average that
    forgets a twentieth each time is a hundred times too large by then. So are the damping and the
    steps that go with it: the scale is told apart.

    Args:
        curvature: the blocks.
        state: of an earlier one, from ``state``.

    Attributes:
        traces: by block; those of one that got no statistics lately are older.
        largest: the largest mean eigenvalue of the newest statistics so far.
    """

    def __init__(self, curvature: CurvatureGraph, state: Mapping[str, Any] = {}) -> None:
        self._curvature = curvature
        # Earlier states are traces and nothing else.
        self.traces: dict[str, float] = dict(state["traces"] if "largest" in state else state)
        self.largest = float(state.get("largest", 0.0))
        self._level = float(state.get("level", 0.0))
        self._came = int(state.get("came", 0))
        self._mean = self._mean_of_traces()

    def _mean_of_traces(self) -> float:
        size = sum(self._curvature.blocks[name].parameter_count for name in self.traces)
        return max(sum(self.traces.values()) / size, SMALLEST) if size else 0.0

    def state(self) -> dict[str, Any]:
        """Return plain values that another one may begin with."""
        return {
            "traces": dict(self.traces),
            "largest": self.largest,
            "level": self._level,
            "came": self._came,
        }

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
        device = next(iter(found.values())).device
        traces = torch.stack([trace.to(device) for trace in found.values()]).tolist()
        for name, value in zip(found, traces, strict=True):
            old = self.traces.get(name)
            self.traces[name] = value if old is None else FADING * old + (1 - FADING) * value
        self._mean = self._mean_of_traces()
        self._came += 1
        settling = self._came <= SETTLING or not self._level
        self._level = self._mean if settling else self._level**0.9 * self._mean**0.1
        self.largest = max(0.0 if settling else self.largest * REMEMBERED, self._level)

    def lag(self, mean: float) -> float:
        """Return how many times larger an average is than the newest statistics, at least 1.

        Args:
            mean: the mean eigenvalue of the averages that are in use.
        """
        # An average that is too small gives long steps, which the bounds on lengths shorten: it is
        # left alone, for a single batch with hard cases must not make the next steps tiny.
        return max(1.0, mean / self._mean) if self._mean else 1.0

    def left(self) -> float:
        """Return which part of ``largest`` the newest mean eigenvalue is."""
        return self._mean / max(self.largest, SMALLEST) if self._mean else 1.0
