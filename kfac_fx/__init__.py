"""A compiler for curvature on torch.fx: K-FAC for the model that you have."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from kfac_fx import errors, likelihoods
from kfac_fx.api import transform
from kfac_fx.backend import backend
from kfac_fx.ir.coupling import Coupling, Edge
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.optim.growing_batches import GrowingBatches
from kfac_fx.optim.kfac import KFAC
from kfac_fx.optim.kfac_options import KFACOptions
from kfac_fx.optim.preconditioner import Preconditioner
from kfac_fx.optim.training_step import TrainingStep
from kfac_fx.passes.rules import register_rule

if TYPE_CHECKING:
    from kfac_fx import viz

    __version__: str

__all__ = [
    "KFAC",
    "Coupling",
    "CurvatureBlock",
    "CurvatureGraph",
    "Edge",
    "GrowingBatches",
    "KFACOptions",
    "Preconditioner",
    "TrainingStep",
    "backend",
    "errors",
    "likelihoods",
    "register_rule",
    "transform",
    "viz",
]


def __getattr__(name: str) -> ModuleType | str:
    """Import ``viz`` and look ``__version__`` up when they are asked for; training needs neither.

    Raises:
        AttributeError: this module has no such name.
    """
    # This runs only where a name is missing: after the first time, viz is there.
    if name == "viz":
        return import_module("kfac_fx.viz")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'kfac_fx' has no attribute {name!r}")


def _version() -> str:
    """Return the version of the installed package; "0+unknown" where it runs uninstalled."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kfac_fx")
    except PackageNotFoundError:
        return "0+unknown"
