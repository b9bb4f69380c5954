"""A compiler for curvature on torch.fx: K-FAC for the model that you have."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from kfac_fx import errors, likelihoods
from kfac_fx.api import transform
from kfac_fx.backend import backend
from kfac_fx.ir import Coupling, CurvatureBlock, CurvatureGraph, Edge
from kfac_fx.optim import KFAC, GrowingBatches, KFACOptions, Preconditioner, TrainingStep
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
