"""Capture an nn.Module by symbolic tracing, and read graphs of every dialect in one vocabulary."""

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.capture.dialect import Call
from kfac_fx.capture.graph_view import GraphView

__all__ = ["Call", "CapturedModule", "GraphView"]
