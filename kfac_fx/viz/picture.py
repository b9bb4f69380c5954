"""The content of a picture of a curvature graph, whoever draws it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.viz.facts import count, shapes
from kfac_fx.viz.module_tree import Group, Leaf, Tree, leaves, module_tree

if TYPE_CHECKING:
    # A type only: a picture without a preconditioner needs nothing of what makes reports.
    from kfac_fx.reading.report import CurvatureReport

COLOURS: Mapping[str, str] = {
    "linear": "#9ecae1",
    "convolution": "#a1d99b",
    "transposed_convolution": "#74c476",
    "embedding": "#fdd0a2",
    "normalization": "#dadaeb",
    "recurrent": "#fa9fb5",
    "grouped": "#c7a76c",
    "bilinear": "#9edae5",
    "shift": "#e6d5f5",
    "generic": "#d9d9d9",
}
# Of kinds that rules of one's own add.
OTHERS = ("#ffed6f", "#b3de69", "#80cdc1", "#f4a582", "#bebada")
COUPLED = "#c2410c"
THIN = "#8a94a0"
FALLBACK = "#b91c1c"

NEAR = 0.25
"""Dependencies of smaller weight (past more than three blocks) are left out where they are many."""
FEW = 0.5
"""How many of these there may be for each block."""


@dataclass
class Node:
    """A box.

    Attributes:
        block: the name of the block that is drawn.
        title: its name relative to its module.
        lines: below the title.
        colour: the colour of its kind.
        size: a size from 0 (100 parameters or fewer) to 1 (100 millions).
        fallback: why the block is weaker than its kind allows, if it is.
    """

    block: str
    title: str
    lines: list[str]
    colour: str
    size: float
    fallback: str | None


@dataclass
class Line:
    """Dependencies and couplings between two boxes.

    Attributes:
        source: the block that comes first in the forward pass.
        target: the other one.
        coupled: how many of the pairs that it stands for are couplings.
        pairs: how many it stands for.
        onward: whether it leads from one copy of a fold to the next.
        upwards: whether the parent of the coupling is the source.
        values: weights, or strengths, of the couplings.
    """

    source: str
    target: str
    onward: bool
    coupled: int = 0
    pairs: int = 0
    upwards: bool = False
    values: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Return the couplings' values or range, and how many are coupled where not all are."""
        if not self.coupled:
            return ""
        low, high = (f"{value:.2f}" for value in (min(self.values), max(self.values)))
        text = low if low == high else f"{low}–{high}"
        return text if self.coupled == self.pairs else f"{text} ({self.coupled} of {self.pairs})"


@dataclass
class Picture:
    """Boxes by block, the hierarchy that holds them, and lines.

    Attributes:
        tree: the hierarchy, and which block stands for which.
        nodes: boxes by the block that is drawn.
        lines: between boxes.
        kinds: (name, colour) of the legend.
        caption: lines of the legend.
        measured: whether couplings are labelled by strength rather than weight.
    """

    tree: Tree
    nodes: dict[str, Node]
    lines: list[Line]
    kinds: list[tuple[str, str]]
    caption: list[str]
    measured: bool

    @property
    def root(self) -> Group:
        """Return the outermost group, the model."""
        return self.tree.root


def picture(
    curvature: CurvatureGraph, report: CurvatureReport | None = None, *, fold: bool = True
) -> Picture:
    """Return the boxes and lines of a curvature graph.

    Args:
        curvature: the graph.
        report: the report of a preconditioner. It adds statistics to boxes, and the couplings
            that are drawn are those in use.
        fold: whether three or more equal modules in a row become one.
    """
    tree = module_tree(curvature, fold=fold)
    colours = _colours(curvature.blocks.values())
    nodes = {}
    for leaf in leaves(tree.root):
        block = curvature.blocks[leaf.block]
        nodes[block.name] = _node(leaf, block, colours[block.kind], report)
    lines, hidden = _lines(curvature, tree, report)
    caption = [_total(curvature), "larger boxes have more parameters"]
    if hidden:
        caption.append(f"{hidden:,} dependencies that skip blocks are not drawn")
    if report is not None and len(nodes) < len(curvature.blocks):
        caption.append("statistics of a folded block are those of its first copy")
    kinds = [(kind, colours[kind]) for kind in colours]
    return Picture(tree, nodes, lines, kinds, caption, report is not None)


def _colours(blocks: Iterable[CurvatureBlock]) -> dict[str, str]:
    """Return the colours of the kinds that occur; kinds of rules of one's own take other ones."""
    found: dict[str, str] = {}
    for block in blocks:
        spare = OTHERS[sum(kind not in COLOURS for kind in found) % len(OTHERS)]
        found.setdefault(block.kind, COLOURS.get(block.kind, spare))
    return found


def _node(leaf: Leaf, block: CurvatureBlock, colour: str, report: CurvatureReport | None) -> Node:
    """Return the box of a leaf, of which ``block`` is the first."""
    title = leaf.name if leaf.copies == 1 else f"{leaf.name}  × {leaf.copies}"
    lines = [f"{shapes(block)}", f"{count(block.parameter_count)} parameters"]
    if report is not None and block.name in report.blocks:
        lines += report.blocks[block.name].lines()
    # Areas by the logarithm: parameters of blocks differ by factors of a million.
    size = (math.log10(max(block.parameter_count, 1)) - 2) / 6
    if block.reason is not None:
        lines.append(f"fallback: {block.approximation}")
    return Node(block.name, title, lines, colour, min(max(size, 0.0), 1.0), block.reason)


def _total(curvature: CurvatureGraph) -> str:
    """Return blocks and parameters in all, and parameters that have no block."""
    blocks, total = len(curvature.blocks), curvature.coverage.total
    text = f"{blocks:,} blocks, {count(total)} parameters"
    left = {kind: len(getattr(curvature, kind)) for kind in ("frozen", "excluded", "unused")}
    return ", ".join([text, *(f"{number} {kind}" for kind, number in left.items() if number)])


def _lines(
    curvature: CurvatureGraph, tree: Tree, report: CurvatureReport | None
) -> tuple[list[Line], int]:
    """Return the lines between the boxes, and how many dependencies are left out."""
    weights = {(edge.source, edge.target): edge.weight for edge in curvature.edges}
    place = {name: index for index, name in enumerate(curvature.blocks)}
    values: dict[tuple[str, str], float] = {}
    children = {}
    for child, parent in _forest(curvature, report):
        source, target = sorted((child, parent), key=place.__getitem__)
        pair = source, target
        values[pair] = (
            report.couplings[child, parent].strength if report else weights.get(pair, 0.0)
        )
        children[pair] = child
    # Residual networks have a dependency for every pair of layers along the stream: all of them
    # would hide the picture. A few more than the near ones are no harm.
    near = _near(weights)
    if len(weights) - len(near) <= len(place) * FEW:
        near = set(weights)
    found: dict[tuple[str, str, bool], Line] = {}
    hidden = 0
    for pair in dict.fromkeys([*values, *weights]):
        source, target = (tree.shown[name] for name in pair)
        onward = tree.apart(*pair)
        # Between copies, a skip would look like a direct way.
        if pair not in values and (pair not in near or (onward and weights[pair] < 0.9)):
            hidden += 1
            continue
        line = found.setdefault((source, target, onward), Line(source, target, onward))
        line.pairs += 1
        if pair in values:
            line.coupled += 1
            line.values.append(values[pair])
            line.upwards = children[pair] == pair[1]
    return list(found.values()), hidden


def _forest(curvature: CurvatureGraph, report: CurvatureReport | None) -> Iterator[tuple[str, str]]:
    """Yield (child, parent) of the couplings in use, or of the transform's own without a report."""
    if report is not None:
        yield from report.couplings
    else:
        yield from ((coupling.child, coupling.parent) for coupling in curvature.couplings)


def _near(weights: Mapping[tuple[str, str], float]) -> set[tuple[str, str]]:
    """Return pairs of a large weight, or of the largest at one of their ends.

    So every block keeps its nearest neighbours, however far away they are.
    """
    into: dict[str, float] = {}
    out: dict[str, float] = {}
    for (source, target), weight in weights.items():
        out[source] = max(out.get(source, 0.0), weight)
        into[target] = max(into.get(target, 0.0), weight)
    return {
        (source, target)
        for (source, target), weight in weights.items()
        if weight >= min(NEAR, out[source]) or weight >= into[target]
    }
