"""nn.MultiheadAttention: its packed projection is three blocks, and its second axis counts cases.

The class defines both: rows [i d, (i + 1) d) of ``in_proj_weight`` make q, k and v, and every
projection of its inputs sees [length, cases, features], whatever ``batch_first`` says. Other packed
projections are cut in the graph in the same way as gates and gated units are, so what their pieces
mean is not known: they stay one block, whose G also holds how the pieces go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from kfac_fx.capture.graph_view import GraphView
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import ParameterUse, Tap
from kfac_fx.passes.rules.base import Refusal, Site, kronecker_factors, too_wide

PROJECTIONS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})


def attention_uses(site: Site, use: ParameterUse | Refusal) -> Sequence[ParameterUse | Refusal]:
    """A dense use, as one use for each projection of attention that it packs."""
    if isinstance(use, Refusal):
        return [use]
    width = _width(site.view, use.parameters[0])
    start = _first_row(use.layouts[0])
    tap = use.tap
    if width is None or start is None or tap is None or tap.scale or tap.operator != "linear":
        return [use]
    outputs, inputs = use.layouts[0].shape
    if start % width or outputs % width:
        return [use]
    bias = len(use.parameters) == 2
    factors = kronecker_factors(site, inputs, width, bias=bias, cuttable=True)
    return [
        replace(
            use,
            layouts=tuple(layout.narrow(0, row, width) for layout in use.layouts),
            factors=factors,
            tap=Tap("projection", tap.node, tap.tensors, (row, width, bias, site.reduce)),
            reason=too_wide(site, factors),
        )
        for row in range(0, outputs, width)
    ]


def _width(view: GraphView, name: str) -> int | None:
    """The number of rows of one projection, if the parameter belongs to attention."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = view.module.get_submodule(path)
    except AttributeError:
        return None
    if not isinstance(owner, nn.MultiheadAttention) or leaf not in PROJECTIONS:
        return None
    return int(owner.embed_dim)


def _first_row(layout: Layout) -> int | None:
    """Where the rows that are seen begin, or None where the matrix is seen in another way."""
    if not layout.steps:
        return 0
    (step, *more) = layout.steps
    return (
        step.argument[1] if step.view == "narrow" and step.argument[0] == 0 and not more else None
    )
