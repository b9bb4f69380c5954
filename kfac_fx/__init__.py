"""A compiler for curvature on torch.fx: K-FAC for the model that you have."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from kfac_fx import errors, likelihoods
from kfac_fx.api import transform
from kfac_fx.backend import backend
from kfac_fx.estimate import estimate
from kfac_fx.ir.coupling import Coupling, Edge
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.optim.attach import Attachment, attach
from kfac_fx.optim.growing_batches import GrowingBatches
from kfac_fx.optim.kfac import KFAC
from kfac_fx.optim.kfac_options import KFACOptions
from kfac_fx.optim.preconditioner import Preconditioner
from kfac_fx.optim.training_step import TrainingStep
from kfac_fx.passes.rules import register_rule
from kfac_fx.reading.fisher_estimate import FisherEstimate

if TYPE_CHECKING:
    from kfac_fx import distributed, passes, viz

    __version__: str

__all__ = [
    "KFAC",
    "Attachment",
    "Coupling",
    "CurvatureBlock",
    "CurvatureGraph",
    "Edge",
    "FisherEstimate",
    "GrowingBatches",
    "KFACOptions",
    "Preconditioner",
    "TrainingStep",
    "attach",
    "backend",
    "distributed",
    "errors",
    "estimate",
    "likelihoods",
    "passes",
    "register_rule",
    "transform",
    "viz",
]


def __getattr__(name: str) -> ModuleType | str:
    """Import a room, or look ``__version__`` up, when it is asked for; training needs none of them.

    Raises:
        AttributeError: this module has no such name.
    """
    # This runs only where a name is missing: after the first time, the room is there.
    if name in ("distributed", "passes", "viz"):
        return import_module(f"kfac_fx.{name}")
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
