"""Give the uses of an example run the forms in which a running model can record them.

The example shows one path through the model's code. A tap can only stand at the call that is about
to run, since what the model does next is unknown; and where the data choose a piece of a parameter
(an expert), another run may choose another piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import fx

from kfac_fx.capture.parameter_paths import ancestors
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import FactorSpec, NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.embedding import as_table

CHOSEN = "kfac_fx_chosen"
"""Key in a node's meta: the data chose this piece of the parameter, another run may differ."""


def placeable(uses: Sequence[ParameterUse], graph: fx.Graph) -> list[ParameterUse]:
    """Return the uses, in a weaker form where a tap cannot stand at the call that it belongs to.

    Args:
        uses: found in ``graph``.
        graph: the recorded example run.
    """
    nodes = {node.name: node for node in graph.nodes}
    uses = [
        as_table(use)
        if use.kind == "embedding" and use.tap and not at_its_call(use, use.tap, nodes[use.node])
        else use
        for use in uses
    ]
    weak: dict[str, ParameterUse] = {}
    # A block sums all uses of its parameters, so one use that has no tap takes the others with it;
    # those may hold further parameters (a bias), hence the repetition.
    while True:
        new = [
            use
            for use in uses
            if weak.keys() & set(use.parameters)
            or (use.tap is not None and not at_its_call(use, use.tap, nodes[use.node]))
        ]
        found = {name: use for use in new for name in use.parameters if name not in weak}
        if not found:
            break
        weak |= found
    kept = [use for use in uses if not weak.keys() & set(use.parameters)]
    return kept + [_weakened(use, name) for name, use in weak.items()]


def _weakened(use: ParameterUse, name: str) -> ParameterUse:
    """Return the form that needs no tap: the squared gradient of the batch."""
    shape = use.layouts[use.parameters.index(name)].start
    return ParameterUse(
        kind="generic",
        node=use.node,
        parameters=(name,),
        layouts=(Layout(shape),),
        factors=(FactorSpec("C", (prod(shape),), "gradient"),),
        approximation="diagonal",
        tap=None,
        path=use.path,
        reason="squared gradient of the batch; its tap needs what the model computes later",
    )


def at_its_call(use: ParameterUse, tap: Tap, node: fx.Node) -> bool:
    """Tell whether a tap needs no more than the tensors that its call is given or returns.

    Args:
        use: whose tap it is.
        tap: the tap.
        node: the node of ``use``.
    """
    known = {argument.name for argument in node.all_input_nodes}
    if tap.scale is not None and (tap.scale.result.name not in known or not tap.scale.whole):
        return False
    refs = {r.name for r in (*tap.tensors, *tap.options) if isinstance(r, NodeRef)}
    if tap.consumer is None:
        return tap.node == use.node and all(r in known or r.startswith(".") for r in refs)
    return tap.consumer == use.node and refs | {tap.node} <= known


def every_piece(uses: Sequence[ParameterUse], graph: fx.Graph) -> list[ParameterUse]:
    """Return the uses, and for pieces that no data chose in this run the use that others have.

    Without them, an expert that the example inputs did not reach would have no block, although
    later batches train it. Pieces come in their order: block ``experts[2]`` is the third expert's.

    Args:
        uses: found in ``graph``.
        graph: the recorded example run.
    """
    chosen = [node for node in graph.nodes if CHOSEN in node.meta]
    stacks = {str(n.target) for node in chosen for n in ancestors(node) if n.op == "get_attr"}
    seen: dict[tuple[str, Layout], list[ParameterUse]] = {}
    for use in uses:
        seen.setdefault((use.parameters[0], use.layouts[0]), []).append(use)
    result: list[ParameterUse] = []
    done: set[tuple[str, Layout]] = set()
    for use in uses:
        if use.parameters[0] not in stacks or len(use.parameters) > 1:
            result.append(use)
            continue
        for layout in _entries_alike(use.layouts[0]):
            key = (use.parameters[0], layout)
            if key not in done:
                done.add(key)
                result += seen.get(key, [replace(use, layouts=(layout,))])
    return result


def _entries_alike(layout: Layout) -> list[Layout]:
    """Return the layouts that choose any entry of the same dimension, this one among them."""
    cuts = [index for index, step in enumerate(layout.steps) if step.view == "narrow"]
    if len(cuts) != 1:
        return [layout]
    step = layout.steps[cuts[0]]
    dim, _, length = step.argument
    before = layout.steps[: cuts[0]]
    after = layout.steps[cuts[0] + 1 :]
    moved = (step._replace(argument=(dim, at, length)) for at in range(0, step.start[dim], length))
    return [replace(layout, steps=(*before, piece, *after)) for piece in moved]
