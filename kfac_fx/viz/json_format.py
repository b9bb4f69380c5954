"""Curvature graphs as JSON and back, equal to what they were."""

from __future__ import annotations

import json
from pathlib import Path

from kfac_fx import ir
from kfac_fx.errors import FormatError
from kfac_fx.viz.facts import to_networkx

FORMAT = "kfac_fx.CurvatureGraph"
VERSION = 1


def to_json(curvature: ir.CurvatureGraph) -> str:
    """The whole graph, and under "graph" the same blocks and dependencies as networkx writes them.

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


def from_json(text: str) -> ir.CurvatureGraph:
    """The inverse of ``to_json``.

    Raises:
        FormatError: the text is no curvature graph of this version.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise FormatError(f"this is no {FORMAT} of version {VERSION}")
        return ir.CurvatureGraph.from_plain(content["curvature"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"this is no JSON of a curvature graph ({error!r})") from error


def load(path: str | Path) -> ir.CurvatureGraph:
    """A curvature graph from a file that ``save("....json")`` wrote.

    Raises:
        FormatError: the file holds something else.
    """
    return from_json(Path(path).read_text(encoding="utf-8"))
