"""Bilinear forms: y_o = x1^T W_o x2 is dense in the outer product of x1 and x2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from kfac_fx.capture.dialect import Call
from kfac_fx.capture.layer_calls import Member, ModuleCall
from kfac_fx.ir.use import NodeRef
from kfac_fx.ops.bilinear import BilinearOptions
from kfac_fx.passes.rules.base import (
    Answer,
    Refusal,
    Site,
    kronecker_use,
    layer_kind,
    shift_use,
)

_WORDS = "bilinear input other weight bias"


def _layer_call(layer: nn.Bilinear, member: Callable[[str], Member | None]) -> ModuleCall:
    """Return what nn.Bilinear runs, which takes two inputs."""
    held = {"weight": member("weight"), "bias": member("bias")}
    return ModuleCall("bilinear", held, inputs=("input", "other"))


@layer_kind(
    {F.bilinear: _WORDS, torch.bilinear: _WORDS, torch.ops.aten.bilinear.default: _WORDS},
    modules={nn.Bilinear: _layer_call},
)
class BilinearRule:
    """F.bilinear and nn.Bilinear; weight [out, in1, in2]."""

    kind = "bilinear"
    operations = frozenset({"bilinear"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the use of the weight as a matrix [out, in1 * in2]."""
        weight, bias = site.parameter(call.get("weight")), site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (-1,))
        if len(weight.layout.shape) != 3:
            return Refusal(f"bilinear: the weight is seen as {weight.layout.shape}")
        inputs = (call.get("input"), call.get("other"))
        # With a constant for one input the other's use is linear, but in a weight that is computed:
        # the generic rule says so rather than this one guess.
        if not all(site.view.is_per_case(x) for x in inputs):
            return Refusal("bilinear: an input is no activation")
        outputs, first, second = weight.layout.shape
        return kronecker_use(
            call,
            site,
            self.kind,
            weight=weight,
            matrix=weight.layout.reshape((outputs, first * second)),
            bias=bias,
            channels=(-1,),
            operator="bilinear",
            tensors=[NodeRef(x.name) for x in inputs],
            options=lambda biased: BilinearOptions(biased, site.reduce),
        )
