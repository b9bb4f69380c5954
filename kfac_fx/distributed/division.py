"""Who computes which inverses, and who keeps them (Pauloski et al. 2021, KAISA)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kfac_fx.ir.coupling import Coupling, parents


@dataclass(frozen=True)
class Division:
    """The blocks' owners.

    Attributes:
        owner: block -> the process that computes its inverses.
        everywhere: blocks whose inverses all processes keep. Of the others the owner alone has
            them, and sends the preconditioned gradient.
    """

    owner: Mapping[str, int]
    everywhere: frozenset[str]

    def computed_by(self, rank: int) -> list[str]:
        """Return the blocks that a process refreshes."""
        return [block for block, owner in self.owner.items() if owner == rank]

    def kept_alone(self, rank: int) -> list[str]:
        """Return the blocks of which a process alone has the inverses."""
        return [block for block in self.computed_by(rank) if block not in self.everywhere]


def divide(
    size: int,
    couplings: Collection[Coupling],
    costs: Mapping[str, float],
    elements: Mapping[str, int],
    gradients: Mapping[str, int],
    memory_fraction: float,
) -> Division:
    """Balance the costs, by longest processing time first (Graham 1969).

    Inverses are kept everywhere as long as they take at most ``memory_fraction`` of all entries:
    first those that save the most communication for an entry kept. Trees of coupled blocks of
    which one process has the inverses stay with it, unless a tree costs more than its share.

    Args:
        size: the number of processes.
        costs: block -> cost of its refresh.
        elements, gradients: block -> entries of its inverses and of its gradients.
    """
    if memory_fraction >= 1:
        everywhere = frozenset(costs)
    else:
        everywhere = _everywhere(elements, gradients, memory_fraction)
    alone = [block for block in costs if block not in everywhere]
    limit = sum(costs[block] for block in alone) / size
    units = [[block] for block in everywhere]
    for tree in _trees(alone, couplings):
        units += _cut(tree, costs, limit)
    place = {block: index for index, block in enumerate(costs)}
    units.sort(key=lambda unit: (-sum(costs[b] for b in unit), place[unit[0]]))
    loads = [0.0] * size
    owner: dict[str, int] = {}
    for unit in units:
        rank = loads.index(min(loads))
        loads[rank] += sum(costs[block] for block in unit)
        owner |= dict.fromkeys(unit, rank)
    return Division({block: owner[block] for block in costs}, everywhere)


def _everywhere(
    elements: Mapping[str, int], gradients: Mapping[str, int], fraction: float
) -> frozenset[str]:
    room = fraction * sum(elements.values())
    kept = set()
    for block in sorted(elements, key=lambda b: -gradients[b] / max(elements[b], 1)):
        if elements[block] <= room:
            kept.add(block)
            room -= elements[block]
    return frozenset(kept)


def _trees(blocks: Sequence[str], couplings: Collection[Coupling]) -> list[list[str]]:
    """Return the blocks of each tree of couplings; children come right before their parents."""
    parent = {c: p for c, p in parents(couplings).items() if c in blocks and p in blocks}
    children: dict[str, list[str]] = {block: [] for block in blocks}
    for child, above in parent.items():
        children[above].append(child)

    def below(block: str) -> list[str]:
        found: list[str] = []
        todo = [block]
        while todo:
            found.append(todo.pop())
            todo += children[found[-1]]
        return found[::-1]

    return [below(root) for root in blocks if root not in parent]


def _cut(tree: Sequence[str], costs: Mapping[str, float], limit: float) -> list[list[str]]:
    """Return neighbours in a tree, together as far as they cost no more than ``limit``."""
    pieces: list[list[str]] = []
    spent = 0.0
    for block in tree:
        if not pieces or spent + costs[block] > limit * (1 + 1e-9):
            pieces.append([])
            spent = 0.0
        pieces[-1].append(block)
        spent += costs[block]
    return pieces
