"""Pictures by matplotlib, where Graphviz is missing: modules as rectangles of rows (layout.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kfac_fx.viz.extras import Axes, Figure, extra, new_figure
from kfac_fx.viz.layout import Box, arranged
from kfac_fx.viz.picture import COUPLED, FALLBACK, THIN, Line, Picture

LARGEST = 300.0
"""Inches; matplotlib refuses pictures of more than 65,536 pixels a side."""

PLACES = (0.5, 0.38, 0.62)
"""Where labels stand on their lines, in turn, so that those of neighbours do not meet."""


class Point(NamedTuple):
    """A place in inches, y downwards."""

    x: float
    y: float


def plain_figure(picture: Picture) -> Figure:
    """Return the picture as a matplotlib figure; boxes carry the ids of Graphviz's.

    Args:
        picture: the boxes and lines.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    root = arranged(picture)
    legend = 0.25 + 0.2 * (len(picture.kinds) + 4 + len(picture.caption))
    width = max(root.width, 3.2) + 1.0
    height = root.height + legend + 0.4
    # Text and lines shrink with the picture: else they would cover the boxes of a large model.
    scale = min(1.0, LARGEST / max(width, height))
    figure = new_figure(width * scale, height * scale)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, width - 0.2), ylim=(root.height + legend + 0.2, -0.2))
    axes.axis("off")
    boxes = {box.block: box for box in _all(root) if box.block}
    for box in _all(root):
        if box is not root:
            _draw(axes, box, picture, scale)
    for index, line in enumerate(picture.lines):
        _connect(axes, line, boxes, scale, PLACES[index % len(PLACES)])
    _legend(axes, picture, root.height + 0.25, scale)
    return figure


def _all(box: Box) -> Iterator[Box]:
    yield box
    for part in box.inside:
        yield from _all(part)


def _draw(axes: Axes, box: Box, picture: Picture, scale: float) -> None:
    """Draw a module's frame with its name, or a block with its lines of text."""
    patches = extra("matplotlib.patches")
    node = picture.nodes.get(box.block)
    rounded = "round,pad=0,rounding_size=0.08"
    fallback = node is not None and node.fallback is not None
    edge = "#b6bec8" if node is None else "#475569"
    patch = patches.FancyBboxPatch(
        (box.x, box.y),
        box.width,
        box.height,
        boxstyle=rounded,
        facecolor="#00000008" if node is None else node.colour,
        edgecolor=FALLBACK if fallback else edge,
        linestyle="--" if fallback else "-",
        linewidth=(2 if fallback else 1) * scale,
        zorder=0 if node is None else 3,
    )
    axes.add_patch(patch)
    if node is None:
        axes.text(
            box.x + 0.1,
            box.y + 0.2,
            box.title,
            fontsize=8.5 * scale,
            weight="bold" if box.copies > 1 else "normal",
            bbox={"facecolor": "#f5f5f5", "edgecolor": "none", "pad": 0.6, "alpha": 0.9},
            zorder=4,  # above lines, which would cross the name
        )
        return
    patch.set_gid(f"block:{box.block}")
    middle = box.x + box.width / 2
    top = box.y + (box.height - 0.16 - 0.145 * len(node.lines)) / 2
    centred = {"ha": "center", "va": "center", "zorder": 5}
    axes.text(middle, top + 0.08, node.title, fontsize=8.5 * scale, weight="bold", **centred)
    for index, line in enumerate(node.lines):
        axes.text(middle, top + 0.245 + 0.145 * index, line, fontsize=7 * scale, **centred)


def _connect(axes: Axes, line: Line, boxes: Mapping[str, Box], scale: float, place: float) -> None:
    """Draw a line, with its label at ``place``, a part of its length."""
    points = _way(line, boxes)
    patches, path = extra("matplotlib.patches"), extra("matplotlib.path").Path
    codes = [path.MOVETO, path.LINETO]
    if len(points) > 2:
        codes = [path.MOVETO, path.CURVE4, path.CURVE4, path.CURVE4]
    axes.add_patch(
        patches.FancyArrowPatch(
            path=path(points, codes),
            arrowstyle=("-|>", "<|-")[line.upwards],
            mutation_scale=8 * scale,
            color=COUPLED if line.coupled else THIN,
            linewidth=(2.2 if line.coupled else 0.7) * scale,
            linestyle="--" if line.onward else "-",
            zorder=2 if line.coupled else 1,
        )
    )
    if line.label:
        rest = 1 - place
        weights = [rest, place]
        if len(points) > 2:  # a cubic curve, by its Bernstein polynomials
            weights = [rest**3, 3 * rest**2 * place, 3 * rest * place**2, place**3]
        axes.text(
            sum(w * p.x for w, p in zip(weights, points, strict=True)) + 0.05,
            sum(w * p.y for w, p in zip(weights, points, strict=True)),
            line.label,
            fontsize=7 * scale,
            color=COUPLED,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
            zorder=4,
        )


def _way(line: Line, boxes: Mapping[str, Box]) -> list[Point]:
    """Return a line's ends, straight down where no box is in the way; else a curve around them."""
    source = boxes[line.source]
    target = boxes[line.target]
    start = Point(source.x + source.width / 2, source.y + source.height)
    end = Point(target.x + target.width / 2, target.y)
    if end.y > start.y and not any(_crosses(box, start, end) for box in boxes.values()):
        return [start, end]
    start = Point(source.x + source.width, source.y + source.height * 0.6)
    end = Point(target.x + target.width, target.y + target.height * 0.4)
    low, high = sorted((start.y, end.y))
    beside = [b.x + b.width for b in boxes.values() if b.y < high and b.y + b.height > low]
    bound = max(beside, default=start.x) + 0.12 + 0.04 * min(high - low, 8.0)
    # A cubic curve whose inner control points have one x reaches three quarters of the way there.
    right = max(start.x, end.x)
    control = right + (bound - right) / 0.75
    return [start, Point(control, start.y), Point(control, end.y), end]


def _crosses(box: Box, start: Point, end: Point) -> bool:
    """Say whether a line that goes down passes through a box that lies between its ends."""
    low = max(box.y, start.y)
    high = min(box.y + box.height, end.y)
    if low >= high:
        return False
    slope = (end.x - start.x) / (end.y - start.y)
    left, right = sorted(start.x + slope * (y - start.y) for y in (low, high))
    return left < box.x + box.width and right > box.x


class _Stroke(NamedTuple):
    """A kind of line in the legend."""

    colour: str
    width: float
    style: str
    text: str
    drawn: bool


def _legend(axes: Axes, picture: Picture, y: float, scale: float) -> None:
    """Draw kinds, lines, marks and totals below the picture, from ``y`` on; only what is drawn."""
    rectangle = extra("matplotlib.patches").Rectangle
    look = {"fontsize": 8 * scale, "va": "center"}
    for kind, colour in picture.kinds:
        axes.add_patch(rectangle((0, y - 0.06), 0.25, 0.12, facecolor=colour, edgecolor="#475569"))
        axes.text(0.35, y, kind.replace("_", " "), **look)
        y += 0.2
    value = "canonical correlation" if picture.measured else "weight"
    coupled = any(line.coupled for line in picture.lines)
    thin = any(not line.coupled for line in picture.lines)
    onward = any(line.onward for line in picture.lines)
    fallback = any(node.fallback for node in picture.nodes.values())
    for stroke in (
        _Stroke(COUPLED, 2.2, "-", f"coupling, child to parent ({value})", coupled),
        _Stroke(THIN, 0.8, "-", "dependency", thin),
        _Stroke("#1f2937", 1.0, "--", "to the next copy", onward),
        _Stroke(FALLBACK, 2.0, "--", "frame of a fallback", fallback),
    ):
        if stroke.drawn:
            axes.plot(
                [0, 0.25],
                [y, y],
                color=stroke.colour,
                linewidth=stroke.width * scale,
                linestyle=stroke.style,
            )
            axes.text(0.35, y, stroke.text, **look)
            y += 0.2
    for text in picture.caption:
        axes.text(0, y, text, **look)
        y += 0.2
