"""Import what pictures need beyond torch and networkx, when it is used."""

from __future__ import annotations

import shutil
from importlib import import_module
from typing import Any

from kfac_fx.errors import MissingExtraError

# Neither pydot nor matplotlib must be installed for mypy to run, and neither has types for all that
# is used here: these names say at least which object is meant.
Module = Any
"""A module of the extra ``viz``, whose names are looked up when they are used."""

DotGraph = Any
"""A ``pydot.Dot``, or a ``pydot.Cluster`` inside of one."""

Figure = Any
"""A ``matplotlib.figure.Figure``."""

Axes = Any
"""A ``matplotlib.axes.Axes``."""

INSTALL_DOT = (
    "Graphviz's program `dot` is not on the PATH; install it for better pictures (Debian and "
    "Ubuntu: apt install graphviz, macOS: brew install graphviz, conda: conda install graphviz)"
)


def extra(module: str) -> Module:
    """Return a module of the extra ``viz``.

    Args:
        module: its dotted name; the part before the first dot is named in the error.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"this needs {package}, which is not installed: pip install kfac_fx[viz]"
        ) from error


def has_dot() -> bool:
    """Say whether Graphviz's ``dot`` can be run."""
    return shutil.which("dot") is not None


def new_figure(width: float, height: float, *, constrained: bool = False) -> Figure:
    """Return a matplotlib figure without a window.

    pyplot is not used: it would open a display where one is configured, and change the state of a
    notebook that draws its own figures.

    Args:
        width: in inches.
        height: in inches.
        constrained: whether matplotlib arranges titles and labels so that they do not overlap.
    """
    layout = "constrained" if constrained else None
    figure = extra("matplotlib.figure").Figure(figsize=(width, height), layout=layout)
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure
