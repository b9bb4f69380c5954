"""Bags of embeddings: A is over the tokens of a bag, G over the embedding's dimensions."""

from __future__ import annotations

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.config import MAX_FULL_DIM
from kfac_fx.ir.use import FactorSpec, ParameterUse, Tap
from kfac_fx.passes.rules.base import (
    Answer,
    Refusal,
    Site,
    gradient_side,
    joined,
    node_ref,
    too_wide,
)
from kfac_fx.passes.rules.embedding import NO_PADDING, changed

MODES = ("sum", "mean", "max")
TENSORS = ("input", "offsets", "per_sample_weights")


class EmbeddingBagRule:
    """F.embedding_bag and nn.EmbeddingBag that sum or average; every bag is a case.

    The tokens of one bag are correlated, so A is a matrix where the table is small enough.
    """

    kind = "embedding"
    operations = frozenset({"embedding_bag", "embedding_bag_tuple"})

    def match(self, call: Call, site: Site) -> Answer:
        weight = site.parameter(call.get("weight"))
        if weight is None:
            return None
        reason = changed(call) or _unfit(call, site, weight.layout.shape)
        tapped = _result(call)
        if reason is not None or tapped is None:
            return Refusal(f"embedding_bag: {reason or 'its result is not read once'}")
        rows, width = weight.layout.shape
        padding = call.get("padding_idx")
        padding = NO_PADDING if padding is None else padding % rows
        tensors = tuple(node_ref(call.get(name)) for name in TENSORS)
        matrix = rows <= min(MAX_FULL_DIM, site.max_factor_dim)
        A = FactorSpec("A", (rows, rows) if matrix else (rows,), "input", diagonal=not matrix)
        G = gradient_side(site, width)
        return ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,),
            layouts=(weight.layout.transpose(0, 1),),
            factors=(A, G),
            approximation="kronecker",
            tap=Tap("embedding_bag", tapped.name, tensors, (_mode(call) == "mean", padding)),
            path=(*weight.path, call.operation),
            reason=joined(None if matrix else _TOKENS, too_wide(site, (G,))),
        )


_TOKENS = f"tokens of one bag count as uncorrelated: A is a vector above {MAX_FULL_DIM} rows"


def _mode(call: Call) -> object:
    mode = call.get("mode", "sum" if call.operation == "embedding_bag_tuple" else "mean")
    return MODES[mode] if isinstance(mode, int) and mode in range(3) else mode


def _unfit(call: Call, site: Site, shape: tuple[int, ...]) -> str | None:
    """Why the call is no dense use of the table, if it is not."""
    if _mode(call) not in ("sum", "mean"):
        return f"mode={_mode(call)!r} reads another row in every dimension"
    if len(shape) != 2:
        return f"the table is seen as {shape}"
    if not isinstance(call.get("input"), fx.Node):
        return "its ids are no tensor of the graph"
    given = (call.get(name) for name in TENSORS)
    return None if any(map(site.view.is_per_case, given)) else "its bags are the same for all cases"


def _result(call: Call) -> fx.Node | None:
    """The node of the embedded bags: ATen's operator returns them with three other tensors."""
    if call.operation == "embedding_bag":
        return call.node
    first = [user for user in call.node.users if user.args[1:] == (0,)]
    return first[0] if len(first) == 1 else None
