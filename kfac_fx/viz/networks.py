"""Curvature graphs as networkx graphs."""

from __future__ import annotations

import networkx as nx

from kfac_fx.ir import CurvatureGraph
from kfac_fx.viz.facts import block_facts, edge_facts


def to_networkx(curvature: CurvatureGraph) -> nx.DiGraph:
    """Blocks as nodes; dependencies, and couplings that are none, as edges in forward order.

    Attributes of nodes and edges are plain values. An edge of the forest has ``coupled`` true and
    names its ``child`` and ``parent``; one that is only a coupling has ``dependency`` false.
    """
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
