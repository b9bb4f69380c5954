"""Describe a block, a dependency or a model by plain values: text, numbers, lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kfac_fx.ir.coupling import Edge
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph

if TYPE_CHECKING:
    import networkx as nx


Facts = dict[str, str | int | float]
"""Values by label."""

Json = str | int | float | list[Any] | dict[str, Any] | None
"""What JSON can hold."""


def count(number: int) -> str:
    """Return a number in three digits with a unit: 1,184 becomes "1.18 k"."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def shapes(block: CurvatureBlock) -> str:
    """Return the factors in short: "A 65×65  G 64×64"; counts of positions are left out."""
    return "  ".join(
        f"{f.name} {'×'.join(map(str, f.shape)) or '1'}" for f in block.factors if f.role != "count"
    )


def block_facts(curvature: CurvatureGraph, block: CurvatureBlock) -> Facts:
    """Return what is known of a block, by label; what does not apply is left out.

    The labels are those of the HTML page, of GraphML and of ``inspect --json``: scripts read them.

    Args:
        curvature: the graph that the block is in.
        block: the block.
    """
    facts: dict[str, str | int | None] = {
        "kind": block.kind,
        "approximation": block.approximation,
        "factors": shapes(block),
        "parameters": block.parameter_count,
        "tensors": ", ".join(block.parameters),
        "shapes": ", ".join("×".join(map(str, x.shape)) or "1" for x in block.layouts),
        "uses": len(block.uses),
        "source": block.source,
        "fallback": block.reason,
        "coupled with": curvature.parent.get(block.name),
        "not coupled": curvature.uncoupled.get(block.name),
    }
    return {label: value for label, value in facts.items() if value is not None}


def edge_facts(edge: Edge) -> Facts:
    """Return the operations between two blocks, what they do, and the preference as a coupling."""
    return {
        "path": " -> ".join(edge.path),
        "kinds": ", ".join(edge.kinds),
        "weight": edge.weight,
    }


def summary(curvature: CurvatureGraph) -> dict[str, Json]:
    """Return the whole graph for scripts: blocks, couplings, coverage and memory (bytes)."""
    coverage = curvature.coverage
    blocks = curvature.blocks.values()
    return {
        "structure": curvature.structure,
        "route": curvature.route,
        "blocks": [{"name": block.name} | block_facts(curvature, block) for block in blocks],
        "couplings": [{"child": c.child, "parent": c.parent} for c in curvature.couplings],
        "coverage": {
            "parameters": coverage.total,
            "by_kind": dict(coverage.scalars),
            "tensors_by_kind": dict(coverage.tensors),
        },
        "frozen": list(curvature.frozen),
        "excluded": list(curvature.excluded),
        "unused": list(curvature.unused),
        "bytes_float32": curvature.memory(),
    }


def to_networkx(curvature: CurvatureGraph) -> nx.DiGraph:
    """Return blocks as nodes; one edge a dependency, and a coupling without one; in forward order.

    Attributes of nodes and edges are plain values. An edge of the forest has ``coupled`` true and
    names its ``child`` and ``parent``; one that is only a coupling has ``dependency`` false.

    Args:
        curvature: the graph.
    """
    import networkx as nx  # a quarter of a second, which an import of kfac_fx need not take

    graph = nx.DiGraph(structure=curvature.structure, route=curvature.route)
    place = {name: index for index, name in enumerate(curvature.blocks)}
    for block in curvature.blocks.values():
        graph.add_node(block.name, place=place[block.name], **block_facts(curvature, block))
    for edge in curvature.edges:
        facts = edge_facts(edge)
        graph.add_edge(edge.source, edge.target, dependency=True, coupled=False, **facts)
    for coupling in curvature.couplings:
        # A child may come before its parent or after it; edges go with the forward pass, so that
        # the graph has no cycles.
        first, second = sorted((coupling.child, coupling.parent), key=place.__getitem__)
        if not graph.has_edge(first, second):
            graph.add_edge(first, second, dependency=False)
        facts = {"coupled": True, "child": coupling.child, "parent": coupling.parent}
        graph.edges[first, second].update(facts)
    return graph
