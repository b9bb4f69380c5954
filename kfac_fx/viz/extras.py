"""What pictures need beyond torch and networkx, imported when it is used."""

from __future__ import annotations

import shutil
from importlib import import_module
from typing import Any

from kfac_fx.errors import MissingExtraError

INSTALL_DOT = (
    "Graphviz's program `dot` is not on the PATH; install it for better pictures (Debian and "
    "Ubuntu: apt install graphviz, macOS: brew install graphviz, conda: conda install graphviz)"
)


def extra(module: str) -> Any:
    """A module of the extra ``viz``.

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
    """Whether Graphviz's ``dot`` can be run."""
    return shutil.which("dot") is not None


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A matplotlib figure without a window, whatever backend is set."""
    figure = extra("matplotlib.figure").Figure(figsize=(width, height), **options)
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure
