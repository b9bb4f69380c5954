"""What is said about a block, a dependency or a model, as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kfac_fx.ir import CurvatureBlock, CurvatureGraph, Edge

if TYPE_CHECKING:
    import networkx as nx


def count(number: int) -> str:
    """1,184 -> "1.2 k"."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def shapes(block: CurvatureBlock) -> str:
    """The factors in short: "A 65×65  G 64×64"."""
    return "  ".join(
        f"{f.name} {'×'.join(map(str, f.shape)) or '1'}" for f in block.factors if f.role != "count"
    )


def block_facts(curvature: CurvatureGraph, block: CurvatureBlock) -> dict[str, Any]:
    """By label; what does not apply is left out."""
    facts = {
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


def edge_facts(edge: Edge) -> dict[str, Any]:
    """The operations between two blocks, what they do, and the preference as a coupling."""
    return {
        "path": " -> ".join(edge.path),
        "kinds": ", ".join(edge.kinds),
        "weight": edge.weight,
    }


def summary(curvature: CurvatureGraph) -> dict[str, Any]:
    """The whole graph for scripts: blocks, couplings, coverage and memory."""
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
    """Blocks as nodes; dependencies, and couplings that are none, as edges in forward order.

    Attributes of nodes and edges are plain values. An edge of the forest has ``coupled`` true and
    names its ``child`` and ``parent``; one that is only a coupling has ``dependency`` false.
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
        first, second = sorted((coupling.child, coupling.parent), key=place.__getitem__)
        if not graph.has_edge(first, second):
            graph.add_edge(first, second, dependency=False)
        facts = {"coupled": True, "child": coupling.child, "parent": coupling.parent}
        graph.edges[first, second].update(facts)
    return graph
