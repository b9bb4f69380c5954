"""Pictures through pydot and Graphviz."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterator
from typing import Any

from kfac_fx.viz.extras import extra
from kfac_fx.viz.module_tree import Group, Leaf
from kfac_fx.viz.picture import COUPLED, FALLBACK, THIN, Line, Node, Picture

FONT = "Helvetica,Arial,sans-serif"
MANY = 400
"""Boxes from which on curved lines would take minutes."""


def dot_graph(picture: Picture, *, direction: str = "TB") -> Any:
    """The picture as a ``pydot.Dot``.

    Args:
        direction: of the forward pass, as Graphviz has it: "TB" or "LR".
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
    """An identifier that Graphviz and pydot read back."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _fill(pydot: Any, graph: Any, group: Group, picture: Picture, path: str) -> None:
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
            fillcolor="#00000008",
            color="#b6bec8" if child.copies == 1 else "#475569",
            fontname=FONT,
            fontsize="11",
            labeljust="l",
            labelloc="t",
            margin="8",  # else that of the module around it
        )
        _fill(pydot, cluster, child, picture, name)
        graph.add_subgraph(cluster)


def _node(pydot: Any, node: Node, copies: int) -> Any:
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
        id=quoted(f"block:{node.block}"),
        tooltip=quoted(node.fallback or node.block),
        **look,
    )


def _edge(pydot: Any, line: Line, backwards: bool) -> Any:
    look = {"color": THIN, "penwidth": "0.7", "arrowsize": "0.45"}
    if line.coupled:
        look = {"color": COUPLED, "penwidth": "2.6", "label": quoted(f"  {line.label}  ")}
        look |= {"fontcolor": COUPLED, "dir": "back" if line.upwards else "forward"}
    source, target = line.source, line.target
    if line.onward:
        look |= {"style": "dashed", "weight": "0"}
        if backwards:  # drawn from the lower box, it would turn the order of the ranks around
            source, target = target, source
            look["dir"] = {"back": "forward"}.get(look.get("dir", "forward"), "back")
    return pydot.Edge(quoted(source), quoted(target), **look)


def _keep_order(pydot: Any, graph: Any, names: list[str], linked: set[str]) -> None:
    """A block without lines stands beside the block before it, where that has some, or below."""
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
    """An HTML-like table: kinds, lines, marks, totals."""
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
    return (
        f'<TD><FONT COLOR="{colour}"><B>{sign}</B></FONT></TD>'
        f'<TD ALIGN="LEFT">{html.escape(text)}</TD>'
    )


# Headings of modules, where no line crosses them.

Point = tuple[float, float]
MARGIN = 8.0
"""Points between a heading and the frame, as Graphviz has it."""


def clear_headings(graph: Any) -> None:
    """Moves headings of clusters to where no line is; some go below, or their cluster grows.

    Args:
        graph: a ``pydot.Dot``; its clusters' attributes change.
    """
    for attribute, value in (("labelloc", "b"), ("margin", "40")):
        for cluster in _place_headings(graph):
            cluster.set(attribute, value)
            cluster.set("labeljust", "l")
    _place_headings(graph)


def _place_headings(graph: Any) -> list[Any]:
    """Chooses the side, which leaves all else in its place; returns clusters without a free one."""
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
    """How many points of lines are in the heading on the left, in the middle, on the right."""
    left, _, right, _ = (float(part) for part in item["bb"].split(","))
    width, height = (72 * float(item[key]) for key in ("lwidth", "lheight"))
    y = float(item["lp"].split(",")[1])
    across = [p[0] for p in points if abs(p[1] - y) < height / 2 + 2]
    starts = {"l": left + MARGIN, "c": (left + right - width) / 2, "r": right - MARGIN - width}
    return {
        side: sum(start - 3 < x < start + width + 3 for x in across)
        for side, start in starts.items()
    }


def _clusters(graph: Any) -> Iterator[Any]:
    for part in graph.get_subgraphs():
        if part.get_name().startswith("cluster"):
            yield part
            yield from _clusters(part)


def _curve(position: str) -> Iterator[Point]:
    """Points on Graphviz's cubic splines, closer than a heading is high."""
    for spline in position.split(";"):
        pairs = [part.split(",") for part in spline.split() if part[0] not in "es"]
        ends = [(float(x), float(y)) for x, y in pairs]
        for at in range(0, len(ends) - 3, 3):
            part = ends[at : at + 4]
            steps = (
                int(
                    sum(abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in itertools.pairwise(part))
                    / 4
                )
                + 2
            )
            for step in range(steps + 1):
                t = step / steps
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                x, y = (sum(w * p[i] for w, p in zip(weights, part, strict=True)) for i in (0, 1))
                yield x, y
