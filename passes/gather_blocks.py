"""Gather parameter uses into curvature blocks: which uses are summed, and in what form.

Uses of the same parameters add up to one block (docs/explanation/mathematics.md, section 4). Uses
of different pieces of a parameter (gates that are packed into one matrix) make a block each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch import fx

from kfac_fx.ir.curvature_graph import CurvatureBlock
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import FactorSpec, ParameterUse

_FOREIGN = ("/torch/", "/kfac_fx/capture/")
"""Parts of the names of files that are not the user's: torch's and those of the tracer."""


def pieces(name: str, uses: Iterable[ParameterUse]) -> list[list[ParameterUse]] | None:
    """Return the uses of a parameter by the piece of it that they use; None if pieces overlap.

    Args:
        name: the parameter.
        uses: all of its uses; each has a layout for it.
    """
    groups: dict[object, list[ParameterUse]] = {}
    for use in uses:
        layout = use.layouts[use.parameters.index(name)]
        groups.setdefault(_support(layout), []).append(use)
    if len(groups) == 1:
        return list(groups.values())
    layouts = [found[0].layouts[found[0].parameters.index(name)] for found in groups.values()]
    # Pieces that overlap in part have no blocks: the entries that they share would have two.
    apart = _ranges_apart(layouts) if all(map(_range, layouts)) else _entries_apart(layouts)
    return list(groups.values()) if apart else None


def _range(layout: Layout) -> tuple[int, int] | None:
    """Return the flat entries that a layout keeps, where it cuts along rows before all else.

    Ranges are compared without listing entries, of which a vocabulary's table has many millions.
    """
    steps = layout.steps
    if steps and steps[0].view == "reshape":
        steps = steps[1:]
    if not steps or steps[0].view != "narrow" or any(s.view == "narrow" for s in steps[1:]):
        return None
    dim, start, length = steps[0].argument
    row = prod(steps[0].start[1:])
    return (start * row, (start + length) * row) if dim == 0 else None


def _support(layout: Layout) -> object:
    """Return what a layout keeps, as a key: None for all, a range, or the flat indices."""
    if layout.whole:
        return None
    return _range(layout) or frozenset(_entries(layout).tolist())


def _entries(layout: Layout) -> torch.Tensor:
    indices = torch.arange(prod(layout.start)).reshape(layout.start)
    return torch.as_tensor(layout.apply(indices)).flatten()


def _ranges_apart(layouts: Sequence[Layout]) -> bool:
    """Tell whether no two ranges of flat entries overlap."""
    ranges = sorted(found for layout in layouts if (found := _range(layout)) is not None)
    return all(end <= start for (_, end), (start, _) in pairwise(ranges))


def _entries_apart(layouts: Sequence[Layout]) -> bool:
    """Tell whether no entry is kept by two layouts; counts every entry of the parameter."""
    counts = torch.zeros(prod(layouts[0].start), dtype=torch.int32)
    for layout in layouts:
        counts[_entries(layout)] += 1
    return bool(counts.max() <= 1)


def forms(uses: Iterable[ParameterUse]) -> list[list[ParameterUse]]:
    """Return uses of the same entries by the form of their factors."""
    groups: dict[object, list[ParameterUse]] = {}
    for use in uses:
        groups.setdefault((use.layouts, use.factors, use.approximation), []).append(use)
    return list(groups.values())


def summable(groups: Sequence[Sequence[ParameterUse]]) -> bool:
    """Tell whether uses of these forms have one block: one form, or two on the same sides.

    Two Kronecker products on the same sides can be inverted together by a simultaneous
    diagonalisation; of three no such form is known.
    """
    if len(groups) == 1:
        return True
    uses = [group[0] for group in groups]
    simple = all(
        use.products == 1 and len(use.parameters) == 1 and len(_matrix(use)) == 2 for use in uses
    )
    return simple and len(uses) == 2 and _same_sides(*uses) is not None


def _matrix(use: ParameterUse) -> tuple[int, ...]:
    return use.layouts[0].shape


def _same_sides(first: ParameterUse, second: ParameterUse) -> bool | None:
    """Return True if both see the same matrix, False if one sees the transpose, else None."""
    if first.layouts == second.layouts:
        return True
    # Tied weights: an embedding reads W, the output layer its transpose.
    return False if second.layouts[0].transpose(0, 1) == first.layouts[0] else None


def gather_blocks(
    uses: Iterable[ParameterUse], graph: fx.Graph, *, counted: bool = False
) -> dict[str, CurvatureBlock]:
    """Return one block for each set of parameters, or for each piece of them, by name.

    Args:
        uses: in the order of the graph, which becomes that of the blocks.
        graph: the graph that the uses were found in; its nodes know the user's lines.
        counted: positions are recorded for single uses too (their number may vary from run to run).
    """
    by_parameters: dict[tuple[str, ...], list[ParameterUse]] = {}
    for use in uses:
        by_parameters.setdefault(use.parameters, []).append(use)
    names = _block_names(by_parameters)
    nodes = {node.name: node for node in graph.nodes}
    blocks: dict[str, CurvatureBlock] = {}
    for parameters, found in by_parameters.items():
        parts = pieces(parameters[0], found) or [found]
        for index, part in enumerate(parts):
            name = names[parameters] + (f"[{index}]" if len(parts) > 1 else "")
            # Buffers and programs need an identifier; two names may become the same one.
            slot = _unique(re.sub(r"\W", "_", name).strip("_"), {b.slot for b in blocks.values()})
            blocks[name] = _block(name, slot, part, _source(nodes[part[0].node]), counted)
    return blocks


def _block(
    name: str, slot: str, uses: Sequence[ParameterUse], source: str | None, counted: bool
) -> CurvatureBlock:
    """Return the block of uses that are summed.

    Args:
        name: the name of the block.
        slot: the same as an identifier.
        uses: the uses of one form, or of the two that ``summable`` lets pass.
        source: file and line of the first use.
        counted: whether positions of a single use are recorded too.
    """
    groups = forms(uses)
    first = groups[0][0]
    gathered = _counted(groups[0], 1, counted)
    if len(groups) == 2:
        swap = _same_sides(first, groups[1][0]) is False
        gathered += _counted([_second(use, swap) for use in groups[1]], 2, counted)
    factors = {factor for use in gathered for factor in use.factors}
    # Programs and checkpoints rely on this order: A and G of each form, then the counts.
    order = sorted(factors, key=lambda f: (f.role == "count", f.form, f.side))
    return CurvatureBlock(
        name=name,
        slot=slot,
        kind=first.kind,
        parameters=first.parameters,
        layouts=first.layouts,
        factors=tuple(order),
        approximation="kronecker_sum" if len(groups) == 2 else first.approximation,
        uses=tuple(gathered),
        source=source,
        reason=first.reason or _summed_reason(uses),
    )


def _second(use: ParameterUse, swap: bool) -> ParameterUse:
    """Return a use with its factors on the sides that the first form calls A and G.

    Args:
        use: the use of the second form.
        swap: whether it sees the transposed matrix, so that its A is on the side of G.
    """
    A, G = use.factors
    renamed = (
        replace(A, side="G" if swap else "A", form=2),
        replace(G, side="A" if swap else "G", form=2),
    )
    return replace(use, factors=renamed)


def _counted(uses: Sequence[ParameterUse], form: int, single: bool = False) -> list[ParameterUse]:
    """Return the uses with a factor for their positions, where these are counted at run time.

    Several uses share A and G, and G is divided by the positions of all of them together, which
    only a run knows. A single use knows its own.
    """
    if (len(uses) == 1 and not single) or uses[0].products != 1:
        return list(uses)
    count = FactorSpec("positions", (), "count", form=form)
    return [replace(use, factors=(*use.factors, count)) for use in uses]


def _summed_reason(uses: Sequence[ParameterUse]) -> str | None:
    """Return why several uses make a weaker block, None where they do not.

    Kronecker factors of several uses add up by design; covariances lose what lies between them.
    """
    if len(uses) == 1 or uses[0].products == 1:
        return None
    return f"its {len(uses)} uses are taken as uncorrelated"


def _block_names(groups: Collection[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the blocks' names by their parameters.

    A block is named after the module where it is all that the module's weight and bias are, else
    after its first parameter.
    """
    names: dict[tuple[str, ...], str] = {}
    for parameters in groups:
        owners = {name.rpartition(".")[0] for name in parameters}
        leaves = {name.rpartition(".")[2] for name in parameters}
        whole = len(owners) == 1 and "weight" in leaves and leaves <= {"weight", "bias"}
        owner = next(iter(owners))
        names[parameters] = owner if whole and owner else parameters[0]
    counts = list(names.values())
    return {
        parameters: name if counts.count(name) == 1 else parameters[0]
        for parameters, name in names.items()
    }


def _unique(slot: str, taken: Collection[str]) -> str:
    """Return the identifier, with underscores after it where it is taken."""
    while slot in taken:
        slot += "_"
    return slot


def _source(node: fx.Node) -> str | None:
    """Return file and line of the user's code that made the node, None where that is not known."""
    trace = node.meta.get("stack_trace") or node.stack_trace
    places = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    # The last line that is neither torch's nor the tracer's; where all are (a model of torch.nn),
    # the last one.
    own = [p for p in places if not any(map(p[0].__contains__, _FOREIGN))] or places
    return ":".join(own[-1]) if own else None
