"""The pass that tells which blocks are weaker than their kind of use allows."""

from __future__ import annotations

import logging

from torch import fx

from kfac_fx.errors import CoverageError
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.passes.base import Analysis, curvature_of

log = logging.getLogger("kfac_fx")


class CheckCoverage(Analysis):
    """Log the blocks that are weaker than their kind allows, as one warning for each reason.

    Args:
        strict: raise instead of logging, so that no model trains with less than was expected.

    Raises:
        CoverageError: ``strict`` and at least one such block; names the parameters and reasons.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """Return the curvature graph as it is."""
        curvature = curvature_of(module, "CheckCoverage")
        # Equal layers share their reason: a deep network says it once and not once a layer.
        named: dict[str | None, list[str]] = {}
        for block in curvature.fallbacks:
            named.setdefault(block.reason, []).extend(block.parameters)
        lines = [f"{', '.join(names)}: {reason}" for reason, names in named.items()]
        # All of them at once: who excludes one parameter would meet the next error else.
        if lines and self.strict:
            raise CoverageError(
                "strict=True, but these parameters would get a weaker block than their kind allows "
                "(exclude them or pass strict=False):\n  " + "\n  ".join(lines)
            )
        for line in lines:
            log.warning("weaker block: %s", line)
        return curvature
