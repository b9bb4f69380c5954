"""The pass that finds the blocks whose eigenvalues can be estimated from the data (EKFAC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.errors import UnknownOptionError
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph, Moment
from kfac_fx.ir.use import FactorSpec
from kfac_fx.ops.sides import side_of
from kfac_fx.passes.base import Analysis, curvature_of
from kfac_fx.passes.find_couplings import text_of_side, why_alone


def find_moments(module: nn.Module, blocks: Mapping[str, CurvatureBlock]) -> tuple[Moment, ...]:
    """Return a moment for every Kronecker block of one plain use whose cases are told apart.

    The second moment is that of one case's gradient U_G^T (g a^T) U_A, so a block qualifies where
    the same tap sees a and g of a case together (docs/explanation/mathematics.md, section 5).
    """
    found = []
    for name, block in blocks.items():
        if why_alone(block) is None and not side_of(text_of_side(module, block)).interleaved:
            A, G = (factor.shape[0] for factor in block.factors)
            S = FactorSpec("S", (G, A), "gradient")
            found.append(Moment(name, f"{block.slot}__moment", (S,)))
    return tuple(found)


class FindMoments(Analysis):
    """Find the blocks whose eigenvalues can be estimated.

    Raises:
        UnknownOptionError: the model runs its own code; without a graph there is no place for a
            second tap after that of the factors.
    """

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """Return the curvature graph with moments."""
        if isinstance(module, CapturedModule) and module.runs_model:
            raise UnknownOptionError("ekfac=True needs a graph: capture='eager' has none")
        curvature = curvature_of(module, "FindMoments")
        return replace(curvature, moments=find_moments(module, curvature.blocks))
