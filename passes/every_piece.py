"""Pieces of a parameter that the data choose: a run shows some, other runs may choose any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from kfac_fx.capture.derived import ancestors
from kfac_fx.capture.tape import CHOSEN
from kfac_fx.ir import Layout, ParameterUse


def every_piece(uses: Sequence[ParameterUse], graph: fx.Graph) -> list[ParameterUse]:
    """The uses, and for matrices that no data chose in this run the use that another one has.

    Pieces come in their order, so that block ``experts[2]`` is the third expert's.
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
        for layout in _alike(use.layouts[0]):
            key = (use.parameters[0], layout)
            if key not in done:
                done.add(key)
                result += seen.get(key, [replace(use, layouts=(layout,))])
    return result


def _alike(layout: Layout) -> list[Layout]:
    """The layouts that choose another entry of the same dimension, and this one."""
    cuts = [index for index, step in enumerate(layout.steps) if step.view == "narrow"]
    if len(cuts) != 1:
        return [layout]
    step = layout.steps[cuts[0]]
    dim, _, length = step.argument
    before, after = layout.steps[: cuts[0]], layout.steps[cuts[0] + 1 :]
    moved = (step._replace(argument=(dim, at, length)) for at in range(0, step.start[dim], length))
    return [replace(layout, steps=(*before, piece, *after)) for piece in moved]
