"""Dependencies between curvature blocks, and the forest of those that are coupled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from kfac_fx.ir.use import FactorSpec


@dataclass(frozen=True)
class Edge:
    """A path in the graph from a block's use to the next.

    Attributes:
        source, target: names of blocks, in the order of the forward pass.
        path: the operations between them.
        kinds: what they do: "fork", "join", "skip", "pooling", "flatten", "sequence mixing".
        weight: preference as a coupling while there are no statistics; a direct successor has
            almost 1, a skip past k blocks 1 / (k + 1).
    """

    source: str
    target: str
    path: tuple[str, ...]
    kinds: tuple[str, ...]
    weight: float

    def __str__(self) -> str:
        kinds = f" ({', '.join(self.kinds)})" if self.kinds else ""
        return " -> ".join((self.source, *self.path, self.target)) + kinds


@dataclass(frozen=True)
class Coupling:
    """A child whose Gaussian conditional is taken given its parent's."""

    child: str
    parent: str


@dataclass(frozen=True)
class Pair:
    """Two blocks whose cross factors are recorded.

    Attributes:
        earlier, later: names of blocks, in the order of the forward pass.
        slot: the pair as an identifier.
        factors: A [d_in of earlier, d_in of later] and G [d_out, d_out].
        ordered: whether nothing on the way changes the order of positions.
    """

    earlier: str
    later: str
    slot: str
    factors: tuple[FactorSpec, FactorSpec]
    ordered: bool

    tapped = True

    @property
    def name(self) -> str:
        """Both blocks, for logs."""
        return f"{self.earlier} -> {self.later}"


def couplings_of(
    weights: Mapping[tuple[str, str], float], order: Sequence[str]
) -> tuple[Coupling, ...]:
    """The maximum spanning forest of weighted pairs, each tree rooted at its last block.

    For a chain that is the paper's: the parent of a layer is the next one.

    Args:
        weights: by (earlier, later).
        order: blocks in the order of the forward pass.
    """
    place = {name: index for index, name in enumerate(order)}
    graph = nx.Graph()
    # Of equal weights the first counts: of attention's projections that is the values'.
    for earlier, later in sorted(weights, key=lambda pair: place[pair[0]], reverse=True):
        graph.add_edge(earlier, later, weight=weights[earlier, later])
    forest = nx.maximum_spanning_tree(graph)  # of every component
    found: list[Coupling] = []
    for tree in nx.connected_components(forest):
        root = max(tree, key=place.__getitem__)
        found += [Coupling(child, parent) for child, parent in nx.bfs_predecessors(forest, root)]
    return tuple(sorted(found, key=lambda coupling: place[coupling.child]))


def parents(couplings: Iterable[Coupling]) -> dict[str, str]:
    """Child -> parent."""
    return {coupling.child: coupling.parent for coupling in couplings}
