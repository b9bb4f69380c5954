"""Embeddings and bags of them: A is over the tokens, G over the embedding's dimensions."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.config import MAX_FULL_DIM
from kfac_fx.ir.use import FactorSpec, NodeRef, ParameterUse, Tap
from kfac_fx.ops.embedding import NO_PADDING, EmbeddingOptions
from kfac_fx.ops.embedding_bag import EmbeddingBagOptions
from kfac_fx.passes.rules.base import (
    ONE_CASE,
    Answer,
    GraphValue,
    Refusal,
    Site,
    broadcast_with,
    expanded_over_cases,
    gradient_side,
    joined,
    layer_kind,
    node_ref,
    too_wide,
)

BAG_MODES = ("sum", "mean", "max")
"""The modes of a bag, in the order of the numbers that ATen's operator has for them."""

BAG_TENSORS = ("input", "offsets", "per_sample_weights")

TOKENS_UNCORRELATED = (
    f"tokens of one bag count as uncorrelated: A is a vector above {MAX_FULL_DIM} rows"
)


@layer_kind()
class EmbeddingRule:
    """F.embedding, nn.Embedding and table[ids] with dense gradients.

    Ids that are the same for all cases (positions) are recorded where the rows looked up are added
    to what depends on the case.
    """

    kind = "embedding"
    operations = frozenset({"embedding", "index", "getitem"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the use of a table [rows, width] as a matrix [width, rows] with diagonal A."""
        table = call.get("input" if call.operation == "getitem" else "weight")
        weight = site.parameter(table)
        if weight is None or site.view.reference(call.node) is not None:
            return None  # none, or a piece of it by a constant index
        if len(weight.layout.shape) != 2:
            return Refusal(f"embedding: the table is seen as {weight.layout.shape}")
        # These options change the gradient but not the outputs, so no derivative of a tap would
        # show it.
        if (reason := _changed(call)) is not None:
            return Refusal(f"embedding: {reason}")
        ids = _ids(call)
        if not isinstance(ids, fx.Node):
            return Refusal(f"{call.operation}: not one index of the table's rows")
        tapped, like, consumer, table = call.node, None, None, False
        # Ids of positions are the same for all cases: the rows looked up get a copy for each case
        # only where they are added to something that has cases, so that is where they are tapped.
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
        options = EmbeddingOptions(padding).to_args()
        tap = Tap("embedding", tapped.name, (NodeRef(ids.name), like), options, consumer)
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
    """Return the use of an embedding, recorded at its call: all cases are one."""
    assert use.tap is not None
    tap = Tap("table_embedding", use.node, use.tap.tensors[:1], use.tap.options)
    return replace(use, tap=tap, reason=joined(use.reason, ONE_CASE))


def _changed(call: Call) -> str | None:
    """Return which option makes the gradient another than that of a dense use, if one does."""
    for name in ("scale_grad_by_freq", "sparse"):
        if call.get(name):
            return f"{name}=True changes the gradient"
    return None if call.get("max_norm") is None else "max_norm changes the table while it is read"


def _last_cast(view: GraphView, node: fx.Node) -> fx.Node:
    """Return the last of casts that are each the only use of what they cast."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        call = view.call(user)
        if call is None or call.operation != "cast":
            break
        node = user
    return node


def _ids(call: Call) -> GraphValue:
    """Return what the table is indexed by; None where it is more than one index."""
    if call.operation == "getitem":
        return call.get("index")
    if call.operation == "index":
        indices = call.get("indices")
        return indices[0] if len(indices) == 1 else None
    return call.get("input")


@layer_kind()
class EmbeddingBagRule:
    """F.embedding_bag and nn.EmbeddingBag that sum or average; every bag is a case.

    The tokens of one bag are correlated, so A is a matrix where the table is small enough.
    """

    kind = "embedding"
    operations = frozenset({"embedding_bag", "embedding_bag_tuple"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the use of a table [rows, width] as a matrix [width, rows]."""
        weight = site.parameter(call.get("weight"))
        if weight is None:
            return None
        reason = _changed(call) or _unfit(call, site, weight.layout.shape)
        tapped = _result(call)
        if reason is not None or tapped is None:
            return Refusal(f"embedding_bag: {reason or 'its result is not read once'}")
        rows, width = weight.layout.shape
        padding = call.get("padding_idx")
        padding = NO_PADDING if padding is None else padding % rows
        tensors = tuple(node_ref(call.get(name)) for name in BAG_TENSORS)
        options = EmbeddingBagOptions(_mode(call) == "mean", padding)
        # A is V by V: beyond the limit of full covariances its refresh would take longer than all
        # others.
        matrix = rows <= min(MAX_FULL_DIM, site.limits.matrix)
        A = FactorSpec("A", (rows, rows) if matrix else (rows,), "input", diagonal=not matrix)
        G = gradient_side(site, width)
        return ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,),
            layouts=(weight.layout.transpose(0, 1),),
            factors=(A, G),
            approximation="kronecker",
            tap=Tap("embedding_bag", tapped.name, tensors, options.to_args()),
            path=(*weight.path, call.operation),
            reason=joined(None if matrix else TOKENS_UNCORRELATED, too_wide(site, (G,))),
        )


def _mode(call: Call) -> object:
    """Return the name of a bag's mode."""
    mode = call.get("mode", "sum" if call.operation == "embedding_bag_tuple" else "mean")
    return BAG_MODES[mode] if isinstance(mode, int) and mode in range(3) else mode


def _unfit(call: Call, site: Site, shape: tuple[int, ...]) -> str | None:
    """Return why the call is no dense use of the table, if it is not."""
    if _mode(call) not in ("sum", "mean"):
        return f"mode={_mode(call)!r} reads another row in every dimension"
    if len(shape) != 2:
        return f"the table is seen as {shape}"
    if not isinstance(call.get("input"), fx.Node):
        return "its ids are no tensor of the graph"
    given = (call.get(name) for name in BAG_TENSORS)
    return None if any(map(site.view.is_per_case, given)) else "its bags are the same for all cases"


def _result(call: Call) -> fx.Node | None:
    """Return the node of the embedded bags: ATen's operator returns three other tensors too."""
    if call.operation == "embedding_bag":
        return call.node
    first = [user for user in call.node.users if user.args[1:] == (0,)]
    return first[0] if len(first) == 1 else None
