"""Dependencies between curvature blocks, and the forest of those that are coupled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Edge:
    """A path in the graph from a block's use to the next block's.

    Attributes:
        source: name of the block that comes first in the forward pass.
        target: name of the block that reads what became of its output.
        path: names of the operations between the two, in order.
        kinds: what these operations do: "fork", "join", "skip", "pooling", "flatten",
            "sequence mixing".
        weight: preference as a coupling while there are no statistics, in (0, 1]: a direct
            successor has almost 1, a skip past k blocks 1 / (k + 1).
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
    """One edge of the forest: the child's Gaussian conditional is taken given its parent's.

    See docs/explanation/mathematics.md, section 7: each child has one parent, and the
    approximation depends on the undirected forest only.

    Attributes:
        child: name of the block whose Psi and Sigma are formed.
        parent: name of the block that it is conditioned on.
    """

    child: str
    parent: str


def couplings_of(
    weights: Mapping[tuple[str, str], float], order: Sequence[str]
) -> tuple[Coupling, ...]:
    """Return the maximum spanning forest of weighted pairs, each tree rooted at its last block.

    With mutual information for weights this is the Chow-Liu forest, the closest one in
    Kullback-Leibler divergence. For a chain of layers it is the paper's: the parent of a layer is
    the next one. See docs/explanation/mathematics.md, section 7.

    Args:
        weights: preference of each pair (earlier, later) of block names; larger is better.
        order: all blocks' names in the order of the forward pass.

    Returns:
        One coupling for each block that is not a root, in the order of the children.
    """
    place = {name: index for index, name in enumerate(order)}
    import networkx as nx  # a quarter of a second, which an import of kfac_fx need not take

    graph = nx.Graph()
    # Kruskal's algorithm keeps the first of several equal weights. Later pairs go first, so that
    # of attention's projections, which tie, the values' is chosen: it is the one that the output
    # is linear in.
    for earlier, later in sorted(weights, key=lambda pair: place[pair[0]], reverse=True):
        graph.add_edge(earlier, later, weight=weights[earlier, later])
    forest = nx.maximum_spanning_tree(graph)  # of every component
    found: list[Coupling] = []
    for tree in nx.connected_components(forest):
        # The root's conditional is its own block. The choice does not change the result; the last
        # block of the forward pass makes a chain the paper's.
        root = max(tree, key=place.__getitem__)
        found += [Coupling(child, parent) for child, parent in nx.bfs_predecessors(forest, root)]
    return tuple(sorted(found, key=lambda coupling: place[coupling.child]))


def parents(couplings: Iterable[Coupling]) -> dict[str, str]:
    """Return the forest as a mapping from child to parent; roots are missing."""
    return {coupling.child: coupling.parent for coupling in couplings}
