"""Blocks by the modules that hold them, and repeated modules folded into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph

LEAST = 3
"""How many equal modules in a row are folded."""
LEAST_SLICES = 4
"""The same for slices of one parameter: the three of packed attention stay apart."""
LONGEST_PERIOD = 4
"""How many siblings a repeated pattern may have (convolution, norm, convolution, norm, ...)."""


@dataclass
class Leaf:
    """A block, or equal blocks that it stands for.

    Attributes:
        name: relative to the group that holds it.
        members: the names of the blocks, its own first.
        signature: equal for blocks of equal form.
        copies: how many siblings of this very leaf are folded into it.
    """

    name: str
    members: list[str]
    signature: tuple[object, ...]
    copies: int = 1

    @property
    def block(self) -> str:
        """Return the block that is drawn."""
        return self.members[0]


@dataclass
class Group:
    """A module that holds several blocks, or equal modules that it stands for.

    Attributes:
        name: relative to the group that holds it; empty for the model.
        children: in the order of the forward pass.
        copies: how many equal modules it stands for.
    """

    name: str
    children: list[Leaf | Group] = field(default_factory=list)
    copies: int = 1

    @property
    def signature(self) -> tuple[object, ...]:
        """Return a value that is equal for modules of equal structure."""
        return self.copies, *((child.name, child.signature) for child in self.children)


Item = Leaf | Group

Places = dict[str, tuple[tuple[int, int], ...]]
"""Block -> (fold, number of its copy) of every fold that it is in, the innermost first."""


@dataclass
class Tree:
    """The module hierarchy.

    Attributes:
        root: the model.
        shown: block -> the block that stands for it.
        places: where each block is in folds.
    """

    root: Group
    shown: dict[str, str]
    places: Places

    def apart(self, one: str, other: str) -> bool:
        """Say whether two blocks lie in different copies of one fold."""
        mine = dict(self.places[one])
        others = dict(self.places[other])
        return any(others.get(fold, copy) != copy for fold, copy in mine.items())


def module_tree(curvature: CurvatureGraph, *, fold: bool = True) -> Tree:
    """Return the hierarchy of a model's blocks, in the order of the forward pass.

    Args:
        curvature: its blocks' names are paths of modules.
        fold: whether equal modules in a row become one; a transformer's picture has a dozen boxes
            then, not hundreds.
    """
    root = Group("")
    for block in curvature.blocks.values():
        _place(root, block)
    root.children = [_merged(child) for child in root.children]
    places: Places = dict.fromkeys(curvature.blocks, ())
    if fold:
        _fold(root, places)
        # A fold may leave a group with one child, whose names are joined as before.
        root.children = [_merged(child) for child in root.children]
    shown = {member: leaf.block for leaf in leaves(root) for member in leaf.members}
    return Tree(root, shown, places)


def leaves(item: Item) -> Iterator[Leaf]:
    """Yield the leaves of a group from left to right, or the leaf itself."""
    if isinstance(item, Leaf):
        yield item
    else:
        for child in item.children:
            yield from leaves(child)


def _place(root: Group, block: CurvatureBlock) -> None:
    """Add a block to the group of its module; groups on the way are made."""
    *path, last = block.name.split(".")
    group = root
    for part in path:
        inner = next((c for c in group.children if isinstance(c, Group) and c.name == part), None)
        if inner is None:
            group.children.append(inner := Group(part))
        group = inner
    # The text of a fallback's reason may name the block: whether there is one must be equal.
    plain = block.reason is None
    signature = block.kind, block.approximation, block.factors, block.parameter_count, plain
    group.children.append(Leaf(last, [block.name], signature))


def _merged(item: Item) -> Item:
    """Return the item without groups of one child, whose names are joined."""
    if isinstance(item, Leaf):
        return item
    item.children = [_merged(child) for child in item.children]
    if len(item.children) > 1 or item.copies > 1 < max(c.copies for c in item.children):
        return item
    (child,) = item.children
    child.name = f"{item.name}.{child.name}"
    child.copies *= item.copies
    return child


def _fold(group: Group, places: Places) -> None:
    """Fold the children of a group, innermost first: groups are equal if what they hold is."""
    for child in group.children:
        if isinstance(child, Group):
            _fold(child, places)
    keys = [(_pattern(child.name), child.signature) for child in group.children]
    result: list[Item] = []
    start = 0
    while start < len(keys):
        period, copies = _repetition(keys, start)
        part = group.children[start : start + period * copies]
        result += part if copies == 1 else [_folded(part, period, places)]
        start += period * copies
    group.children = result


def _pattern(name: str) -> str:
    """Return a name without its numbers, in which copies differ."""
    return re.sub(r"\d+", "#", name)


def _repetition(keys: Sequence[tuple[str, object]], start: int) -> tuple[int, int]:
    """Return (period, copies) of the longest repetition from here on; (1, 1) if there is none."""
    best = (1, 1)
    for period in range(1, LONGEST_PERIOD + 1):
        first = keys[start : start + period]
        if not all("#" in name for name, _ in first):
            break  # names without a number are not copies, however equal their layers are
        copies = 1
        while keys[start + copies * period : start + (copies + 1) * period] == first:
            copies += 1
        least = LEAST_SLICES if any(name.endswith("[#]") for name, _ in first) else LEAST
        if copies >= least and period * copies > best[0] * best[1]:
            best = period, copies
    return best


def _folded(items: Sequence[Item], period: int, places: Places) -> Item:
    """Return the first ``period`` items, standing for all; note the copy that each block is in."""
    fold = sum(map(len, places.values()))  # a number that no other fold has
    copies = [items[at : at + period] for at in range(0, len(items), period)]
    for number, copy in enumerate(copies):
        for mine, other in zip(_leaves(copies[0]), _leaves(copy), strict=True):
            for member in other.members[:]:
                places[member] += ((fold, number),)
            if number:
                mine.members += other.members
    name = f"{items[0].name} … {items[-1].name}"
    if period > 1:
        return Group(name, list(copies[0]), len(copies))
    (first,) = copies[0]
    first.name = name
    first.copies *= len(copies)
    return first


def _leaves(items: Iterable[Item]) -> Iterator[Leaf]:
    for item in items:
        yield from leaves(item)
