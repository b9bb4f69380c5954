"""Pictures by matplotlib, where Graphviz is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kfac_fx.viz.extras import extra, new_figure
from kfac_fx.viz.layout import Box, arranged
from kfac_fx.viz.picture import COUPLED, FALLBACK, THIN, Line, Picture

LARGEST = 300.0
"""Inches; matplotlib refuses pictures of more than 65,536 pixels a side."""

PLACES = (0.5, 0.38, 0.62)
"""Where labels stand on their lines, in turn, so that those of neighbours do not meet."""


def plain_figure(picture: Picture) -> Any:
    """The picture as a matplotlib figure; boxes and lines carry the ids of Graphviz's."""
    root = arranged(picture)
    legend = 0.25 + 0.2 * (len(picture.kinds) + 4 + len(picture.caption))
    width, height = max(root.width, 3.2) + 1.0, root.height + legend + 0.4
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


def _draw(axes: Any, box: Box, picture: Picture, scale: float) -> None:
    patches = extra("matplotlib.patches")
    node = picture.nodes.get(box.block)
    rounded = "round,pad=0,rounding_size=0.08"
    look: dict[str, Any] = {"facecolor": "#00000008", "edgecolor": "#b6bec8", "zorder": 0}
    if node is not None:
        look = {"facecolor": node.colour, "edgecolor": "#475569", "zorder": 3}
        if node.fallback is not None:
            look |= {"edgecolor": FALLBACK, "linestyle": "--", "linewidth": 2 * scale}
    patch = patches.FancyBboxPatch(
        (box.x, box.y), box.width, box.height, boxstyle=rounded, **({"linewidth": scale} | look)
    )
    axes.add_patch(patch)
    if node is None:
        weight = "bold" if box.copies > 1 else "normal"
        ground = {"facecolor": "#f5f5f5", "edgecolor": "none", "pad": 0.6, "alpha": 0.9}
        options = {"weight": weight, "bbox": ground, "zorder": 4}  # lines pass behind headings
        axes.text(box.x + 0.1, box.y + 0.2, box.title, fontsize=8.5 * scale, **options)
        return
    patch.set_gid(f"block:{box.block}")
    middle = box.x + box.width / 2
    top = box.y + (box.height - 0.16 - 0.145 * len(node.lines)) / 2
    options = {"ha": "center", "va": "center", "zorder": 5}
    axes.text(middle, top + 0.08, node.title, fontsize=8.5 * scale, weight="bold", **options)
    for index, line in enumerate(node.lines):
        axes.text(middle, top + 0.245 + 0.145 * index, line, fontsize=7 * scale, **options)


Point = tuple[float, float]


def _connect(axes: Any, line: Line, boxes: Mapping[str, Box], scale: float, place: float) -> None:
    points = _way(line, boxes)
    patches, path = extra("matplotlib.patches"), extra("matplotlib.path").Path
    codes = [path.MOVETO, *[path.LINETO if len(points) == 2 else path.CURVE4] * (len(points) - 1)]
    colour, width = (COUPLED, 2.2) if line.coupled else (THIN, 0.7)
    axes.add_patch(
        patches.FancyArrowPatch(
            path=path(points, codes),
            arrowstyle=("-|>", "<|-")[line.upwards],
            mutation_scale=8 * scale,
            color=colour,
            linewidth=width * scale,
            linestyle="--" if line.onward else "-",
            zorder=2 if line.coupled else 1,
        )
    )
    if line.label:
        rest = 1 - place
        weights = [rest**3, 3 * rest**2 * place, 3 * rest * place**2, place**3]
        weights = [rest, place] if len(points) == 2 else weights
        x, y = (sum(w * p[i] for w, p in zip(weights, points, strict=True)) for i in (0, 1))
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8}
        options = {"fontsize": 7 * scale, "color": COUPLED, "va": "center", "zorder": 4}
        axes.text(x + 0.05, y, line.label, bbox=ground, **options)


def _way(line: Line, boxes: Mapping[str, Box]) -> list[Point]:
    """Straight down where no box is in the way, else a curve on the right of all that are."""
    source, target = boxes[line.source], boxes[line.target]
    start = source.x + source.width / 2, source.y + source.height
    end = target.x + target.width / 2, target.y
    if end[1] > start[1] and not any(_crosses(box, start, end) for box in boxes.values()):
        return [start, end]
    start = source.x + source.width, source.y + source.height * 0.6
    end = target.x + target.width, target.y + target.height * 0.4
    low, high = sorted((start[1], end[1]))
    beside = [b.x + b.width for b in boxes.values() if b.y < high and b.y + b.height > low]
    bound = max(beside, default=start[0]) + 0.12 + 0.04 * min(high - low, 8.0)
    control = max(start[0], end[0]) + (bound - max(start[0], end[0])) / 0.75
    return [start, (control, start[1]), (control, end[1]), end]


def _crosses(box: Box, start: Point, end: Point) -> bool:
    """Whether a line that goes down passes through a box that lies between its ends."""
    low, high = max(box.y, start[1]), min(box.y + box.height, end[1])
    if low >= high:
        return False
    slope = (end[0] - start[0]) / (end[1] - start[1])
    x = sorted(start[0] + slope * (y - start[1]) for y in (low, high))
    return x[0] < box.x + box.width and x[1] > box.x


def _legend(axes: Any, picture: Picture, y: float, scale: float) -> None:
    rectangle = extra("matplotlib.patches").Rectangle
    options = {"fontsize": 8 * scale, "va": "center"}
    for kind, colour in picture.kinds:
        axes.add_patch(rectangle((0, y - 0.06), 0.25, 0.12, facecolor=colour, edgecolor="#475569"))
        axes.text(0.35, y, kind.replace("_", " "), **options)
        y += 0.2
    value = "canonical correlation" if picture.measured else "weight"
    lines = (
        (COUPLED, 2.2, "-", f"coupling, child to parent ({value})", lambda x: x.coupled),
        (THIN, 0.8, "-", "dependency", lambda x: not x.coupled),
        ("#1f2937", 1.0, "--", "to the next copy", lambda x: x.onward),
    )
    for colour, width, style, text, shown in lines:
        if any(shown(line) for line in picture.lines):
            axes.plot([0, 0.25], [y, y], color=colour, linewidth=width * scale, linestyle=style)
            axes.text(0.35, y, text, **options)
            y += 0.2
    if any(node.fallback for node in picture.nodes.values()):
        axes.plot([0, 0.25], [y, y], color=FALLBACK, linewidth=2 * scale, linestyle="--")
        axes.text(0.35, y, "frame of a fallback", **options)
        y += 0.2
    for text in picture.caption:
        axes.text(0, y, text, **options)
        y += 0.2
