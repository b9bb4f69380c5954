"""Headings of modules where no line crosses them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

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
