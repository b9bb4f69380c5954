"""From the curvature graph to programs."""

from kfac_fx.codegen.compile import compiled, graphed
from kfac_fx.codegen.program import Program

__all__ = ["Program", "compiled", "graphed"]
