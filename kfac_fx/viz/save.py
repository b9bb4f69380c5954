"""A curvature graph as a file; the suffix says which."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

from kfac_fx.config import FLOW_DIRECTIONS, FlowDirection
from kfac_fx.errors import FormatError, UnknownOptionError
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.reading.inspection import HasCurvature
from kfac_fx.reading.report import CurvatureReport
from kfac_fx.viz.draw_graphviz import MANY, clear_headings, dot_graph
from kfac_fx.viz.draw_matplotlib import plain_figure
from kfac_fx.viz.extras import INSTALL_DOT, DotGraph, has_dot
from kfac_fx.viz.facts import to_networkx
from kfac_fx.viz.json_format import to_json
from kfac_fx.viz.page import page
from kfac_fx.viz.picture import Picture, picture

log = logging.getLogger("kfac_fx")


PICTURES = ("svg", "png", "pdf")
SUFFIXES = (*PICTURES, "dot", "graphml", "json", "html")
DPI = 110
"""Pixels an inch of a png, and of what matplotlib draws."""


def to_pydot(
    curvature: CurvatureGraph,
    preconditioner: HasCurvature | None = None,
    *,
    fold: bool = True,
    direction: FlowDirection = "TB",
) -> DotGraph:
    """Return the picture as a ``pydot.Dot``; arguments as for ``save``.

    Raises:
        MissingExtraError: pydot is not installed.
    """
    return dot_graph(picture(curvature, _report(preconditioner), fold=fold), direction=direction)


def save(
    curvature: CurvatureGraph,
    path: str | Path,
    preconditioner: HasCurvature | None = None,
    *,
    fold: bool = True,
    direction: FlowDirection = "TB",
) -> None:
    """Write svg, png, pdf, dot, graphml, json or html, as the suffix says.

    Without Graphviz's ``dot``, matplotlib draws, and a warning says what to install.

    Args:
        curvature: the graph.
        path: the path of the file; an older one is replaced.
        preconditioner: whose statistics are shown on the boxes, and whose couplings are drawn; None
            for the transform's own couplings, without statistics.
        fold: whether equal modules in a row become one, "× 12".
        direction: the direction of the forward pass: "TB", downwards, or "LR", to the right.

    Raises:
        UnknownOptionError: another suffix or direction.
        MissingExtraError: pydot, or what replaces it, is not installed.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in SUFFIXES:
        known = ", ".join(f".{name}" for name in SUFFIXES)
        raise UnknownOptionError(f"{Path(path).name!r} has no known suffix; valid are {known}")
    if direction not in FLOW_DIRECTIONS:
        raise UnknownOptionError(f"direction={direction!r} is unknown; valid are 'TB', 'LR'")
    report = _report(preconditioner)

    # Each is called for its own suffix only: a JSON file needs neither pydot nor a picture.
    def drawn() -> Picture:
        return picture(curvature, report, fold=fold)

    writers: dict[str, Callable[[], bytes]] = {
        "dot": lambda: bytes(dot_graph(drawn(), direction=direction).to_string(), "utf-8"),
        "graphml": lambda: _graphml(curvature),
        "json": lambda: to_json(curvature).encode(),
        "html": lambda: _page(curvature, report, fold, direction).encode(),
    }
    write = writers.get(suffix, lambda: rendered(drawn(), suffix, direction))
    Path(path).write_bytes(write())


def rendered(shown: Picture, suffix: str, direction: FlowDirection) -> bytes:
    """Return a picture as the content of a file.

    Args:
        shown: the picture.
        suffix: "svg", "png" or "pdf".
        direction: the direction of the forward pass; matplotlib's pictures always go downwards.

    Raises:
        MissingExtraError: pydot, or matplotlib in place of Graphviz, is not installed.
    """
    if has_dot():
        graph = dot_graph(shown, direction=direction)
        if len(shown.nodes) <= MANY:
            clear_headings(graph)
        if suffix == "png":
            graph.set("dpi", str(DPI))
        content: bytes = graph.create(prog="dot", format=suffix, encoding="utf-8")
        return content
    # Graphviz is a program, which pip cannot install: a picture of less beauty is better than none.
    log.warning("%s; matplotlib draws instead", INSTALL_DOT)
    buffer = io.BytesIO()
    plain_figure(shown).savefig(buffer, format=suffix, dpi=DPI)
    return buffer.getvalue()


def _graphml(curvature: CurvatureGraph) -> bytes:
    import networkx as nx  # late, as in facts.py

    buffer = io.BytesIO()
    nx.write_graphml(to_networkx(curvature), buffer)
    return buffer.getvalue()


def _page(
    curvature: CurvatureGraph, report: CurvatureReport | None, fold: bool, direction: FlowDirection
) -> str:
    pictures = [picture(curvature, report, fold=fold)]
    # The reader may switch between both, where there is something to unfold.
    if fold:
        unfolded = picture(curvature, report, fold=False)
        if len(unfolded.nodes) > len(pictures[0].nodes):
            pictures.append(unfolded)
    drawings = [rendered(shown, "svg", direction).decode() for shown in pictures]
    return page(curvature, report, pictures, drawings)


def _report(preconditioner: HasCurvature | None) -> CurvatureReport | None:
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, HasCurvature):
        raise FormatError(f"{type(preconditioner).__name__} is no Preconditioner")
    return preconditioner.report()
