"""Place boxes where Graphviz is missing: every module is a rectangle of rows of its parts.

This is no drawing of a graph in general. Models are nested and mostly go straight on, so that rows
by the longest way, module by module, need no search and are readable.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kfac_fx.viz.module_tree import Group, Item, Leaf, leaves
from kfac_fx.viz.picture import Line, Picture

# Inches: between boxes of a row, between rows, around the parts of a module, for its heading.
GAP = 0.35
ROW_GAP = 0.55
PAD = 0.18
HEAD = 0.26


@dataclass
class Box:
    """A rectangle in inches, y downwards, its corner relative to the box that holds it.

    Attributes:
        title: what is written in it.
        block: the block of a leaf; empty for a module.
        width: the width of the whole.
        height: the height of the whole.
        copies: how many equal modules it stands for.
        x: the x coordinate of the left edge.
        y: the y coordinate of the upper edge.
        inside: the boxes of a module's parts.
    """

    title: str
    block: str
    width: float
    height: float
    copies: int = 1
    x: float = 0.0
    y: float = 0.0
    inside: list[Box] = field(default_factory=list)


def arranged(picture: Picture) -> Box:
    """Return boxes that overlap nowhere: parts of a module are ranked by the lines between them.

    Args:
        picture: the boxes and lines.
    """
    root = _box(picture.root, picture)
    _shift(root, 0.0, 0.0)
    return root


def _box(item: Item, picture: Picture) -> Box:
    """Return the box of a block or module, with corners relative to it."""
    if isinstance(item, Leaf):
        node = picture.nodes[item.block]
        # matplotlib knows the width of a text only once it is drawn: these are widths of letters.
        widths = [0.088 * len(node.title), *(0.066 * len(line) for line in node.lines)]
        height = 0.3 + 0.145 * len(node.lines) + 0.3 * node.size
        width = max(1.0 + 1.2 * node.size, 0.2 + max(widths))
        return Box(node.title, item.block, width, height, item.copies)
    parts = [_box(child, picture) for child in item.children]
    rows: dict[int, list[Box]] = {}
    for rank, part in zip(_ranks(item, picture.lines), parts, strict=True):
        rows.setdefault(rank, []).append(part)
    widest = max(sum(p.width for p in row) + GAP * (len(row) - 1) for row in rows.values())
    outer = 0.0 if not item.name else PAD
    y = outer + (HEAD if item.name else 0.0)
    for rank in sorted(rows):
        row = rows[rank]
        x = outer + (widest - sum(p.width for p in row) - GAP * (len(row) - 1)) / 2
        for part in row:
            part.x = x
            part.y = y
            x += part.width + GAP
        y += max(part.height for part in row) + ROW_GAP
    title = item.name if item.copies == 1 else f"{item.name}  × {item.copies}"
    width = max(widest + 2 * outer, 0.3 + 0.085 * len(title))
    return Box(title, "", width, y - ROW_GAP + outer, item.copies, inside=parts)


def _ranks(group: Group, lines: list[Line]) -> list[int]:
    """Return the longest way to each child; one without lines stands beside the one before it."""
    # Lines between blocks deep inside count for the children that hold them; lines to the outside
    # rank nothing here, but say that a child is part of the flow.
    of = {leaf.block: at for at, child in enumerate(group.children) for leaf in leaves(child)}
    before: dict[int, set[int]] = {at: set() for at in range(len(group.children))}
    linked = set()
    for line in lines:
        source, target = of.get(line.source), of.get(line.target)
        if source is None and target is None:
            continue
        linked |= {source, target}
        if source is not None and target is not None and source < target:
            before[target].add(source)
    ranks: list[int] = []
    for at in range(len(group.children)):
        if at and at not in linked:
            beside = at - 1 in linked and isinstance(group.children[at], Leaf)
            ranks.append(ranks[-1] if beside else ranks[-1] + 1)
        else:
            ranks.append(max((ranks[earlier] + 1 for earlier in before[at]), default=0))
    return ranks


def _shift(box: Box, x: float, y: float) -> None:
    """Make corners absolute."""
    box.x += x
    box.y += y
    for part in box.inside:
        _shift(part, box.x, box.y)
