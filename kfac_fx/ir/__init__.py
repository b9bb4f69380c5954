"""What the analysis finds, as frozen dataclasses with nodes and parameters by name."""

from kfac_fx.ir.coupling import Coupling, Edge, couplings_of, parents
from kfac_fx.ir.curvature_graph import Coverage, CurvatureBlock, CurvatureGraph, Moment, Pair
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import (
    Approximation,
    FactorSpec,
    NodeRef,
    ParameterUse,
    Role,
    Scale,
    StatisticKey,
    Tap,
)

__all__ = [
    "Approximation",
    "Coupling",
    "Coverage",
    "CurvatureBlock",
    "CurvatureGraph",
    "Edge",
    "FactorSpec",
    "Layout",
    "Moment",
    "NodeRef",
    "Pair",
    "ParameterUse",
    "Role",
    "Scale",
    "StatisticKey",
    "Tap",
    "couplings_of",
    "parents",
]
