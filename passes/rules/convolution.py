"""Convolutions of one to three dimensions, also transposed ones, as Kronecker uses (KFC)."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, cast

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.ir.use import NodeRef
from kfac_fx.ops.convolution import ConvolutionOptions, PaddingMode
from kfac_fx.passes.rules.base import (
    Answer,
    GraphValue,
    Refusal,
    Site,
    kronecker_use,
    layer_kind,
    plain,
    shift_use,
)


class _Geometry(NamedTuple):
    """The arguments of a convolution's call that must be known before the graph runs.

    Attributes:
        stride: one number a spatial dimension.
        dilation: one number a spatial dimension.
        padding: the padding as ``ConvolutionOptions`` takes it.
        groups: number of independent convolutions.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int


@layer_kind()
class ConvolutionRule:
    """F.conv1d to conv3d and their modules; grouped ones get one Kronecker block a group."""

    kind = "convolution"
    operations = frozenset({"conv1d", "conv2d", "conv3d"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the use of a weight [out, in / groups, *kernel]."""
        weight, bias = site.weight(call.get("weight")), site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (1,))
        if not plain(weight.layout):
            return Refusal("convolution: the weight is reshaped or permuted on its way")
        x = call.get("input")
        if not isinstance(x, fx.Node):
            return Refusal(f"{call.operation}: the input is no tensor of the graph")
        outputs, channels, *kernel = weight.layout.shape
        geometry = _geometry(call, tuple(kernel))
        if isinstance(geometry, Refusal):
            return geometry
        groups = geometry.groups
        mode = call.get("padding_mode", "zeros")
        # Channels of different groups meet nowhere in the convolution, so their block is exactly a
        # batch of smaller ones.
        lead = (groups,) if groups > 1 else ()
        one_case = not site.view.is_per_case(x)
        return kronecker_use(
            call,
            site,
            self.kind,
            weight=weight,
            matrix=weight.layout.reshape((*lead, outputs // groups, channels * prod(kernel))),
            bias=bias,
            channels=(1,),
            operator="table_convolution" if one_case else "convolution",
            tensors=(NodeRef(x.name),),
            options=lambda biased: ConvolutionOptions(
                tuple(kernel),
                geometry.stride,
                geometry.dilation,
                geometry.padding,
                cast(PaddingMode, mode),
                groups,
                biased,
                site.reduce,
            ),
            cuttable=True,
            one_case=one_case,
        )


@layer_kind()
class TransposedConvolutionRule:
    """F.conv_transpose1d to 3d and their modules: KFC seen from the output side.

    The geometry is derived at ``kfac_fx.ops.patches.TransposedWindow``.
    """

    kind = "transposed_convolution"
    operations = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the use of a weight [in, out / groups, *kernel]."""
        dims = int(call.operation[-2])
        weight, bias = site.weight(call.get("weight")), site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (1,))
        if not plain(weight.layout):
            return Refusal(f"{call.operation}: the weight is reshaped or permuted on its way")
        x = call.get("input")
        if not isinstance(x, fx.Node):
            return Refusal(f"{call.operation}: the input is no tensor of the graph")
        channels, outputs, *kernel = weight.layout.shape
        stride = _spread(call.get("stride", 1), dims)
        dilation = _spread(call.get("dilation", 1), dims)
        padding = _spread(call.get("padding", 0), dims)
        groups = call.get("groups", 1)
        if stride is None or dilation is None or padding is None or not isinstance(groups, int):
            return Refusal(f"{call.operation}: its geometry is computed at run time")
        lead = (groups,) if groups > 1 else ()
        # The weight's first dimension counts inputs, so outputs move in front of them.
        matrix = weight.layout.reshape((groups, channels // groups, outputs, prod(kernel)))
        inputs = channels // groups * prod(kernel)
        one_case = not site.view.is_per_case(x)
        return kronecker_use(
            call,
            site,
            self.kind,
            weight=weight,
            matrix=matrix.permute(0, 2, 1, 3).reshape((*lead, outputs, inputs)),
            bias=bias,
            channels=(1,),
            operator="table_convolution" if one_case else "convolution",
            tensors=(NodeRef(x.name),),
            options=lambda biased: ConvolutionOptions(
                tuple(kernel),
                stride,
                dilation,
                padding,
                "transposed",
                groups,
                biased,
                site.reduce,
            ),
            cuttable=True,
            one_case=one_case,
        )


def _geometry(call: Call, kernel: tuple[int, ...]) -> _Geometry | Refusal:
    """Return the geometry of a convolution, or why it is not known."""
    dims = len(kernel)
    stride = _spread(call.get("stride", 1), dims)
    dilation = _spread(call.get("dilation", 1), dims)
    groups = call.get("groups", 1)
    if stride is None or dilation is None or not isinstance(groups, int):
        return Refusal("convolution: stride, dilation or groups are computed at run time")
    padding = _padding(call.get("padding", 0), kernel, dilation)
    if padding is None:
        return Refusal("convolution: the padding is computed at run time")
    return _Geometry(stride, dilation, padding, groups)


def _spread(value: GraphValue, dims: int) -> tuple[int, ...] | None:
    """Return one number a spatial dimension, or None where they are not known."""
    values = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(entry, int) for entry in values):
        return None
    return values * dims if len(values) == 1 else values


def _padding(
    value: GraphValue, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return low and high padding in the order of F.pad, the last dimension first."""
    if value == "valid":
        pairs = [(0, 0)] * len(kernel)
    elif value == "same":
        # As torch: where the total is odd, the high side gets one more.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        both = _spread(value, len(kernel))
        if both is None:
            return None
        pairs = [(entry, entry) for entry in both]
    return tuple(entry for pair in reversed(pairs) for entry in pair)
