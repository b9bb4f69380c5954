"""Find the pairs of blocks that can have cross factors, and the forest of those that do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations

from torch import fx, nn

from kfac_fx.capture.graph_view import GraphView
from kfac_fx.config import COUPLINGS, Couplings, choice
from kfac_fx.ir.coupling import Edge, couplings_of
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph, Pair
from kfac_fx.ir.use import FactorSpec
from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.base import Analysis, curvature_of
from kfac_fx.passes.case_order import may_shuffle, shuffled
from kfac_fx.passes.coupled_uses import may_come_first, why_alone
from kfac_fx.passes.find_cases import find_cases
from kfac_fx.passes.find_edges import find_edges

log = logging.getLogger("kfac_fx")

NEAREST = 3
"""Candidates a block and direction where the data choose: more are rarely better."""

_REORDERING = frozenset(
    {"flip", "fold", "index", "movedim", "permute", "roll", "sort", "swapaxes", "t", "transpose"}
    | {"unfold", "window_partition", "window_reverse"}
)


def find_couplings(
    module: nn.Module, graph: fx.Graph, curvature: CurvatureGraph, *, by_data: bool = False
) -> CurvatureGraph:
    """Return ``curvature`` with its layers' edges and the maximum spanning forest of able pairs.

    Args:
        module: owns the parameters.
        graph: without taps.
        curvature: has the blocks.
        by_data: pairs besides the forest's are recorded too, so that statistics can choose.
    """
    blocks = curvature.blocks
    view = GraphView(module, graph)
    layers = {name for name, block in blocks.items() if block.products}
    reasons = {name: why_alone(block) for name, block in blocks.items()}
    able = {name for name, reason in reasons.items() if reason is None}
    first = {name for name in able if may_come_first(blocks[name])}
    apart = shuffled(graph, find_cases(view)) if may_shuffle(graph) else set()
    edges = find_edges(view, blocks, layers, able, apart)
    place = {name: index for index, name in enumerate(blocks)}
    # Cross factors are one matrix from two blocks, so both must be of one precision and device.
    weights = {
        (edge.source, edge.target): edge.weight
        for edge in edges
        if edge.source in first and edge.target in able and _same_place(module, blocks, edge)
    }
    forest = couplings_of(weights, list(blocks))
    ordered = {(e.source, e.target) for e in edges if not _REORDERING & set(e.path)}
    chosen = {frozenset((c.child, c.parent)) for c in forest}
    # The forest alone would do for the topology's own couplings; where the data choose, pairs must
    # be recorded before it is known which of them matter.
    candidates = _nearest(weights) | _siblings(edges, weights) if by_data else set()
    found = sorted(
        {pair for pair in weights if frozenset(pair) in chosen} | candidates,
        key=lambda pair: (place[pair[1]], place[pair[0]]),
    )
    pairs = tuple(_pair(blocks, *pair, pair in ordered) for pair in found)
    coupled = {name for pair in pairs for name in (pair.earlier, pair.later)}
    uncoupled = {
        name: reason or "no other layer before or after it can be coupled"
        for name, reason in reasons.items()
        if name not in coupled
    }
    return replace(
        curvature,
        edges=edges,
        pairs=pairs,
        couplings=forest,
        uncoupled=uncoupled,
        selection="data" if by_data else "topology",
    )


def _same_place(module: nn.Module, blocks: Mapping[str, CurvatureBlock], edge: Edge) -> bool:
    """Tell whether both blocks' factors have one dtype and device."""
    one, two = (
        module.get_parameter(blocks[name].parameters[0]) for name in (edge.source, edge.target)
    )
    return one.device == two.device and one.dtype == two.dtype


def _nearest(weights: Mapping[tuple[str, str], float]) -> set[tuple[str, str]]:
    """Return the pairs that are among the nearest of either block."""
    found: set[tuple[str, str]] = set()
    for end in (0, 1):
        by_block: dict[str, list[tuple[str, str]]] = {}
        for pair in sorted(weights, key=lambda pair: -weights[pair]):
            by_block.setdefault(pair[end], []).append(pair)
        found |= {pair for pairs in by_block.values() for pair in pairs[:NEAREST]}
    return found


def _siblings(
    edges: Iterable[Edge], weights: Mapping[tuple[str, str], float]
) -> set[tuple[str, str]]:
    """Return pairs of layers that are joined before another: g is the same where they are added."""
    sources: dict[str, list[str]] = {}
    for edge in edges:
        if (edge.source, edge.target) in weights and "join" in edge.kinds:
            sources.setdefault(edge.target, []).append(edge.source)
    found: set[tuple[str, str]] = set()
    for target, names in sources.items():
        nearest = sorted(names, key=lambda name: -weights[name, target])[:NEAREST]
        found |= set(combinations([name for name in names if name in nearest], 2))
    return found


def _pair(blocks: Mapping[str, CurvatureBlock], earlier: str, later: str, ordered: bool) -> Pair:
    one, two = blocks[earlier], blocks[later]
    shapes = [(a.shape[0], b.shape[0]) for a, b in zip(one.factors, two.factors, strict=True)]
    factors = FactorSpec("A", shapes[0], "input"), FactorSpec("G", shapes[1], "gradient")
    return Pair(earlier, later, f"{one.slot}__{two.slot}", factors, ordered)


class FindCouplings(Analysis):
    """Find which blocks follow each other, and which of them are coupled.

    Args:
        couplings: "topology" or "data", as for ``kfac_fx.transform``.

    Raises:
        UnknownOptionError: it is another.
    """

    def __init__(self, *, couplings: Couplings = "topology") -> None:
        self.by_data = choice("couplings", couplings, COUPLINGS) == "data"

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """Return the curvature graph with edges, pairs and the forest."""
        curvature = curvature_of(module, "FindCouplings")
        found = find_couplings(module, graphs_of(module)[0], curvature, by_data=self.by_data)
        for coupling in found.couplings:
            log.debug("%s is coupled with %s", coupling.child, coupling.parent)
        for name, reason in found.uncoupled.items():
            log.debug("%s is coupled with none: %s", name, reason)
        return found
