"""A compiler for curvature on torch.fx: K-FAC for the model that you have."""

from kfac_fx import errors, likelihoods, viz
from kfac_fx.api import transform
from kfac_fx.backend import backend
from kfac_fx.ir import Coupling, CurvatureBlock, CurvatureGraph, Edge
from kfac_fx.ir.faces import register
from kfac_fx.optim import KFAC, GrowingBatches, Preconditioner, TrainingStep
from kfac_fx.passes.rules import register_rule

# The same number is in pyproject.toml and CITATION.cff; a test compares them. It is written here
# rather than asked of the installed package, because a plain checkout has none.
__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "Coupling",
    "CurvatureBlock",
    "CurvatureGraph",
    "Edge",
    "GrowingBatches",
    "Preconditioner",
    "TrainingStep",
    "backend",
    "errors",
    "likelihoods",
    "register_rule",
    "transform",
    "viz",
]

register(viz)
