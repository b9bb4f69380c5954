"""From an nn.Module to a graph by symbolic tracing, and one view over the dialects of graphs."""

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.capture.dialect import Call
from kfac_fx.capture.graph_view import GraphView

__all__ = ["Call", "CapturedModule", "GraphView"]
