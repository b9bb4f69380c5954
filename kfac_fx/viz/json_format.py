"""Curvature graphs as JSON and back, equal to what they were; docs/reference/stability.md."""

from __future__ import annotations

import json
from pathlib import Path

from kfac_fx.errors import FormatError
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.viz.facts import to_networkx

FORMAT = "kfac_fx.CurvatureGraph"
"""Tells such a file from other JSON."""

VERSION = 2
"""Raised when files of an older version can no longer be read."""


def to_json(curvature: CurvatureGraph) -> str:
    """Return the whole graph as text, with blocks and dependencies as networkx writes them too.

    Under "curvature" is all that ``from_json`` needs; "graph" is for programs that know networkx's
    format, and is not read back.

    Args:
        curvature: the graph.

    Raises:
        FormatError: a rule of one's own put an object into a tap's options that JSON cannot hold.
    """
    import networkx as nx  # late, as in facts.py

    content = {
        "format": FORMAT,
        "version": VERSION,
        "curvature": curvature.to_plain(),
        "graph": nx.node_link_data(to_networkx(curvature), edges="edges"),
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def from_json(text: str) -> CurvatureGraph:
    """Return the curvature graph that ``to_json`` wrote.

    Args:
        text: JSON of this version; older ones are refused, as half a graph would be a wrong one.

    Raises:
        FormatError: the text is no curvature graph of this version.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise FormatError(f"this is no {FORMAT} of version {VERSION}")
        return CurvatureGraph.from_plain(content["curvature"])
    # A file of something else fails in one of these ways, wherever it stops looking like a graph.
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"this is no JSON of a curvature graph ({error!r})") from error


def load(path: str | Path) -> CurvatureGraph:
    """Return the curvature graph of a file that ``save("....json")`` wrote.

    Args:
        path: the path of the file.

    Raises:
        FormatError: the file holds something else.
    """
    return from_json(Path(path).read_text(encoding="utf-8"))
