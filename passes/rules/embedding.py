"""Embeddings: A holds token frequencies as a vector, G is over the embedding's dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.ir.use import FactorSpec, NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.base import (
    ONE_CASE,
    Answer,
    Refusal,
    Site,
    broadcast_with,
    expanded_over_cases,
    gradient_side,
    joined,
)

NO_PADDING = -(2**31)


class EmbeddingRule:
    """F.embedding, nn.Embedding and table[ids] with dense gradients.

    Ids that are the same for all cases (positions) are recorded where the rows looked up are added
    to what depends on the case.
    """

    kind = "embedding"
    operations = frozenset({"embedding", "index", "getitem"})

    def match(self, call: Call, site: Site) -> Answer:
        table = call.get("input" if call.operation == "getitem" else "weight")
        weight = site.parameter(table)
        if weight is None or site.view.reference(call.node) is not None:
            return None  # none, or a piece of it by a constant index
        if len(weight.layout.shape) != 2:
            return Refusal(f"embedding: the table is seen as {weight.layout.shape}")
        if (reason := changed(call)) is not None:
            return Refusal(f"embedding: {reason}")
        ids = _ids(call)
        if not isinstance(ids, fx.Node):
            return Refusal(f"{call.operation}: not one index of the table's rows")
        tapped, like, consumer, table = call.node, None, None, False
        if not site.view.is_per_case(ids):
            tapped = _last_cast(site.view, tapped)
            other = broadcast_with(site.view, tapped)
            if other is not None:
                like, consumer = NodeRef(other[0].name), other[1].name
            elif expanded_over_cases(site.view, tapped):
                tapped = next(iter(tapped.users))
            else:
                table = True
        rows, width = weight.layout.shape
        padding = call.get("padding_idx")
        if padding is None or (padding < 0 and call.aten):
            padding = NO_PADDING  # ATen says -1 where there is none
        elif padding < 0:
            padding += rows
        tap = Tap("embedding", tapped.name, (NodeRef(ids.name), like), (padding,), consumer)
        use = ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,),
            layouts=(weight.layout.transpose(0, 1),),
            factors=(
                FactorSpec("A", (rows,), "input", diagonal=True),
                gradient_side(site, width),
            ),
            approximation="kronecker",
            tap=tap,
            path=(*weight.path, call.operation),
        )
        return as_table(use) if table else use


def as_table(use: ParameterUse) -> ParameterUse:
    """The use of an embedding, recorded at its call: all cases are one."""
    assert use.tap is not None
    tap = Tap("table_embedding", use.node, use.tap.tensors[:1], use.tap.options)
    return replace(use, tap=tap, reason=joined(use.reason, ONE_CASE))


def changed(call: Call) -> str | None:
    """Which option makes the gradient another than that of a dense use, if one does."""
    for name in ("scale_grad_by_freq", "sparse"):
        if call.get(name):
            return f"{name}=True changes the gradient"
    return None if call.get("max_norm") is None else "max_norm changes the table while it is read"


def _last_cast(view: GraphView, node: fx.Node) -> fx.Node:
    """The node behind casts that are each the only use of what they cast."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        call = view.call(user)
        if call is None or call.operation != "cast":
            break
        node = user
    return node


def _ids(call: Call) -> Any:
    if call.operation == "getitem":
        return call.get("index")
    if call.operation == "index":
        indices = call.get("indices")
        return indices[0] if len(indices) == 1 else None
    return call.get("input")
