"""Pictures through pydot and Graphviz."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

from kfac_fx.config import FlowDirection
from kfac_fx.viz.extras import DotGraph, Module, extra
from kfac_fx.viz.module_tree import Group, Leaf
from kfac_fx.viz.picture import COUPLED, FALLBACK, THIN, Line, Node, Picture

FONT = "Helvetica,Arial,sans-serif"
MANY = 400
"""Boxes from which on curved lines would take minutes."""


MARGIN = 8.0
"""Points between a heading and the frame, as Graphviz has it."""


class Point(NamedTuple):
    """A place in points from the lower left."""

    x: float
    y: float


def dot_graph(picture: Picture, *, direction: FlowDirection = "TB") -> DotGraph:
    """Return the picture as a ``pydot.Dot``.

    Args:
        picture: the boxes and lines.
        direction: the direction of the forward pass, as Graphviz has it: "TB", downwards, or "LR",
            to the right.

    Raises:
        MissingExtraError: pydot is not installed.
    """
    pydot = extra("pydot")
    graph = pydot.Dot(
        "curvature",
        graph_type="digraph",
        rankdir=direction,
        fontname=FONT,
        nodesep="0.22",
        ranksep="0.32",
        newrank="true",
        label=_legend(picture),
        labelloc="b",
        bgcolor="white",
    )
    # Beyond some hundred boxes Graphviz's search for few crossings takes minutes, for a picture
    # that nobody reads line by line.
    if len(picture.nodes) > MANY:
        for key, value in {"splines": "line", "nslimit": "1", "mclimit": "0.1"}.items():
            graph.set(key, value)
    graph.set_node_defaults(shape="box", style="filled,rounded", fontname=FONT, fontsize="11")
    graph.set_edge_defaults(fontname=FONT, fontsize="9", arrowsize="0.6")
    linked = {end for line in picture.lines for end in (line.source, line.target)}
    _fill(pydot, graph, picture.root, picture, "")
    _keep_order(pydot, graph, list(picture.nodes), linked)
    place = {name: index for index, name in enumerate(picture.nodes)}
    for line in picture.lines:
        graph.add_edge(_edge(pydot, line, place[line.source] > place[line.target]))
    return graph


def quoted(text: str) -> str:
    """Return an identifier that Graphviz and pydot read back."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _fill(pydot: Module, graph: DotGraph, group: Group, picture: Picture, path: str) -> None:
    """Add a group's blocks, and its inner groups as clusters; ``path`` makes their names unique."""
    for index, child in enumerate(group.children):
        if isinstance(child, Leaf):
            graph.add_node(_node(pydot, picture.nodes[child.block], child.copies))
            continue
        name = f"{path}_{index}"
        label = child.name if child.copies == 1 else f"{child.name}  × {child.copies}"
        cluster = pydot.Cluster(
            f"m{name}",
            label=quoted(label),
            style="rounded,filled" if child.copies == 1 else "rounded,filled,bold",
            fillcolor="#00000008",  # nearly transparent: deeper modules become darker by themselves
            color="#b6bec8" if child.copies == 1 else "#475569",
            fontname=FONT,
            fontsize="11",
            labeljust="l",
            labelloc="t",
            margin="8",  # else that of the module around it
        )
        _fill(pydot, cluster, child, picture, name)
        graph.add_subgraph(cluster)


def _node(pydot: Module, node: Node, copies: int) -> DotGraph:
    """Return a box; thick where it stands for several blocks, dashed for a fallback."""
    small = "".join(f'<BR/><FONT POINT-SIZE="9">{html.escape(line)}</FONT>' for line in node.lines)
    look = {"color": "#475569", "penwidth": "1" if copies == 1 else "2"}
    if node.fallback is not None:
        look = {"color": FALLBACK, "penwidth": "2.2", "style": '"filled,rounded,dashed"'}
    return pydot.Node(
        quoted(node.block),
        label=f"<<B>{html.escape(node.title)}</B>{small}>",
        fillcolor=node.colour,
        width=f"{1.1 + 1.5 * node.size:.2f}",
        height=f"{0.45 + 0.6 * node.size:.2f}",
        id=quoted(f"block:{node.block}"),  # by which the HTML page finds the box
        tooltip=quoted(node.fallback or node.block),
        **look,
    )


def _edge(pydot: Module, line: Line, backwards: bool) -> DotGraph:
    """Return a line; ``backwards`` where its target stands before its source."""
    look = {"color": THIN, "penwidth": "0.7", "arrowsize": "0.45"}
    if line.coupled:
        look = {"color": COUPLED, "penwidth": "2.6", "label": quoted(f"  {line.label}  ")}
        look |= {"fontcolor": COUPLED, "dir": "back" if line.upwards else "forward"}
    source, target = line.source, line.target
    if line.onward:
        look |= {"style": "dashed", "weight": "0"}
        # Drawn from the lower box, it would turn the order of the ranks around: it is drawn from
        # the upper one, with the arrow at the other end.
        if backwards:
            source, target = target, source
            look["dir"] = {"back": "forward"}.get(look.get("dir", "forward"), "back")
    return pydot.Edge(quoted(source), quoted(target), **look)


def _keep_order(pydot: Module, graph: DotGraph, names: list[str], linked: set[str]) -> None:
    """Place a block without lines beside the block before it, where that has some, or below.

    Graphviz would put such blocks into the first rank, far from the layers that they belong to.
    """
    for before, name in itertools.pairwise(names):
        if name in linked:
            if before not in linked:
                edge = pydot.Edge(quoted(before), quoted(name), style="invis", weight="0")
                graph.add_edge(edge)
            continue
        siblings = before.rpartition(".")[0] == name.rpartition(".")[0]
        if siblings and before in linked:
            row = pydot.Subgraph(rank="same")
            row.add_node(pydot.Node(quoted(before)))
            row.add_node(pydot.Node(quoted(name)))
            graph.add_subgraph(row)
        graph.add_edge(pydot.Edge(quoted(before), quoted(name), style="invis", weight="0"))


def _legend(picture: Picture) -> str:
    """Return a table in Graphviz's HTML: kinds, lines, marks, totals; only what is drawn."""
    cells = [
        f'<TD BGCOLOR="{colour}" WIDTH="18" HEIGHT="12" FIXEDSIZE="TRUE"></TD>'
        f'<TD ALIGN="LEFT">{html.escape(kind.replace("_", " "))}</TD>'
        for kind, colour in picture.kinds
    ]
    value = "canonical correlation" if picture.measured else "weight"
    if any(line.coupled for line in picture.lines):
        cells.append(_stroke("━▶", COUPLED, f"coupling, child to parent ({value})"))
    if any(not line.coupled for line in picture.lines):
        cells.append(_stroke("─▶", THIN, "dependency"))
    if any(line.onward for line in picture.lines):
        cells.append(_stroke("╌▶", "#1f2937", "to the next copy"))
    if any(node.fallback for node in picture.nodes.values()):
        cells.append(_stroke("▢", FALLBACK, "dashed frame: fallback"))
    rows = ["".join(cells[at : at + 3]) for at in range(0, len(cells), 3)]
    body = "".join(f"<TR>{row}</TR>" for row in rows)
    note = "".join(
        f'<TR><TD COLSPAN="6" ALIGN="LEFT">{html.escape(line)}</TD></TR>'
        for line in picture.caption
    )
    return (
        '<<FONT POINT-SIZE="10"><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4">'
        f"{body}{note}</TABLE></FONT>>"
    )


def _stroke(sign: str, colour: str, text: str) -> str:
    """Return two cells of the legend: a sign and what it stands for."""
    return (
        f'<TD><FONT COLOR="{colour}"><B>{sign}</B></FONT></TD>'
        f'<TD ALIGN="LEFT">{html.escape(text)}</TD>'
    )


# Headings of modules, where no line crosses them.


def clear_headings(graph: DotGraph) -> None:
    """Move headings of clusters to where no line is; some go below, or their cluster grows.

    Graphviz places headings without regard to lines, which then run through the names. Its layout
    is read, the best of three places taken, and where none is free the next attempt made.

    Args:
        graph: a ``pydot.Dot``; its clusters' attributes change.
    """
    for attribute, value in (("labelloc", "b"), ("margin", "40")):
        for cluster in _place_headings(graph):
            cluster.set(attribute, value)
            cluster.set("labeljust", "l")
    _place_headings(graph)


def _place_headings(graph: DotGraph) -> list[DotGraph]:
    """Choose the side, which leaves all else in its place; return clusters without a free one."""
    layout = json.loads(graph.create(prog="dot", format="json", encoding="utf-8"))
    points = [
        point
        for edge in layout.get("edges", ())
        if edge.get("style") != "invis"
        for point in _curve(edge.get("pos", ""))
    ]
    found = {item["name"]: item for item in layout.get("objects", ()) if "lwidth" in item}
    crossed = []
    for cluster in _clusters(graph):
        item = found.get(cluster.get_name())
        if item is None:
            continue
        hits = _hits(item, points)
        best = min(hits, key=hits.__getitem__)
        cluster.set("labeljust", best)
        crossed += [cluster] if hits[best] else []
    return crossed


def _hits(item: dict[str, str], points: list[Point]) -> dict[str, int]:
    """Return how many points of lines would be in a heading on the left, in the middle, right."""
    # Graphviz gives corners in points, but widths and heights of labels in inches.
    left, _, right, _ = (float(part) for part in item["bb"].split(","))
    width, height = (72 * float(item[key]) for key in ("lwidth", "lheight"))
    y = float(item["lp"].split(",")[1])
    across = [point.x for point in points if abs(point.y - y) < height / 2 + 2]
    starts = {"l": left + MARGIN, "c": (left + right - width) / 2, "r": right - MARGIN - width}
    return {
        side: sum(start - 3 < x < start + width + 3 for x in across)
        for side, start in starts.items()
    }


def _clusters(graph: DotGraph) -> Iterator[DotGraph]:
    """Yield clusters, outer ones first; other subgraphs only hold ranks."""
    for part in graph.get_subgraphs():
        if part.get_name().startswith("cluster"):
            yield part
            yield from _clusters(part)


def _curve(position: str) -> Iterator[Point]:
    """Yield points on Graphviz's cubic splines, closer together than a heading is high."""
    # "s,x,y e,x,y x,y x,y ...;...": arrow heads first, then control points, three a segment.
    for spline in position.split(";"):
        pairs = [part.split(",") for part in spline.split() if part[0] not in "es"]
        ends = [Point(float(x), float(y)) for x, y in pairs]
        for at in range(0, len(ends) - 3, 3):
            part = ends[at : at + 4]
            length = sum(abs(a.x - b.x) + abs(a.y - b.y) for a, b in itertools.pairwise(part))
            steps = int(length / 4) + 2
            for step in range(steps + 1):
                t = step / steps
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                x = sum(w * p.x for w, p in zip(weights, part, strict=True))
                y = sum(w * p.y for w, p in zip(weights, part, strict=True))
                yield Point(x, y)
