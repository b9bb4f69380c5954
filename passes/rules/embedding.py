"""Embeddings: A holds token frequencies as a vector, G is over the embedding's dimensions."""

from __future__ import annotations

from typing import Any

from kfac_fx.capture.view import Call
from kfac_fx.ir import FactorSpec, NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.base import Answer, Refusal, Site, broadcast_with, gradient_side

NO_PADDING = -(2**31)


class EmbeddingRule:
    """F.embedding, nn.Embedding and table[ids] with dense gradients.

    Ids that are the same for all cases (positions) are recorded where the rows looked up are added
    to what depends on the case.
    """

    kind = "embedding"
    operations = frozenset({"embedding", "index"})

    def match(self, call: Call, site: Site) -> Answer:
        weight = site.parameter(call.get("weight"))
        if weight is None:
            return None
        if len(weight.layout.shape) != 2:
            return Refusal(f"embedding: the table is seen as {weight.layout.shape}")
        for name in ("scale_grad_by_freq", "sparse"):
            if call.get(name):
                return Refusal(f"embedding: {name}=True changes the gradient")
        if call.get("max_norm") is not None:
            return Refusal("embedding: max_norm changes the table while it is read")
        ids: Any = call.get("input")
        if call.operation == "index":
            indices = call.get("indices")
            if len(indices) != 1:
                return Refusal("index: more than one dimension of the table is indexed")
            ids = indices[0]
        like, consumer = None, None
        if not site.view.depends_on_data(ids):
            other = broadcast_with(site.view, call.node)
            if other is None:
                return Refusal("embedding: the rows looked up are the same for all cases")
            like, consumer = NodeRef(other[0].name), other[1].name
        rows, width = weight.layout.shape
        padding = call.get("padding_idx")
        if padding is None or (padding < 0 and call.aten):
            padding = NO_PADDING  # ATen says -1 where there is none
        elif padding < 0:
            padding += rows
        return ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,),
            layouts=(weight.layout.transpose(0, 1),),
            factors=(
                FactorSpec("A", (rows,), "input", diagonal=True),
                gradient_side(site, width),
            ),
            approximation="kronecker",
            tap=Tap("embedding", call.node.name, (NodeRef(ids.name), like), (padding,), consumer),
            path=(*weight.path, call.operation),
        )
