"""From the curvature graph to programs."""

from kfac_fx.codegen.compile import compiled, compiled_network, graphed
from kfac_fx.codegen.program import Program

__all__ = ["Program", "compiled", "compiled_network", "graphed"]
