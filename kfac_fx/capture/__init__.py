"""From an nn.Module to a graph, and one view over the dialects of graphs."""

from kfac_fx.capture.capture import capture, of_program
from kfac_fx.capture.eager import EagerModule
from kfac_fx.capture.module import CapturedModule
from kfac_fx.capture.view import Call, GraphView

__all__ = ["Call", "CapturedModule", "EagerModule", "GraphView", "capture", "of_program"]
