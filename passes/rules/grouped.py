"""Grouped products of a mixture of experts: one Kronecker block an expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.use import NodeRef, ParameterUse, Tap
from kfac_fx.ops.grouped import GroupedOptions
from kfac_fx.passes.rules.base import Answer, Refusal, Site, kronecker_factors, layer_kind

_WORDS = "grouped_mm input weight offsets"
_FUNCTIONS = (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))


# Operators that may not be there are known by their qualified names; functions that are not there
# are left out.
@layer_kind(
    {
        "aten::_grouped_mm": _WORDS,
        "transformers::grouped_mm_fallback": _WORDS,
    }
    | {function: _WORDS for function in _FUNCTIONS if function is not None}
)
class GroupedRule:
    """grouped_mm(x [rows, in], W [experts, in, out], offsets [experts])."""

    kind = "grouped"
    operations = frozenset({"grouped_mm"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the use of the experts' matrices; rows that belong to none are not looked at."""
        weight = site.parameter(call.get("weight"))
        if weight is None:
            return None
        if len(weight.layout.shape) != 3 or call.get("offsets") is None:
            return Refusal(f"grouped_mm: the weight is seen as {weight.layout.shape}")
        experts, inputs, outputs = weight.layout.shape
        factors = kronecker_factors(site, inputs, outputs, bias=False, lead=(experts,))
        if any(factor.diagonal for factor in factors):
            return Refusal(f"grouped_mm: a side exceeds max_factor_dim={site.limits.matrix}")
        return ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=(weight.name,),
            layouts=(weight.layout.transpose(-2, -1),),
            factors=factors,
            approximation="kronecker",
            tap=Tap(
                "grouped",
                call.node.name,
                (NodeRef(call.get("input").name), NodeRef(call.get("offsets").name)),
                GroupedOptions().to_args(),
            ),
            path=(*weight.path, call.operation),
        )
