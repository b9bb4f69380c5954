"""Recurrent layers and cells: two dense uses a layer and direction."""

from __future__ import annotations

from dataclasses import fields, replace

from kfac_fx.capture.dialect import Call
from kfac_fx.capture.parameter_paths import Reference
from kfac_fx.ir.use import Argument, ParameterUse, Tap
from kfac_fx.ops.recurrent import (
    CELLS,
    PACKED,
    SLOTS,
    STEPS,
    LayerOptions,
    PackedOptions,
    RecurrentOptions,
)
from kfac_fx.passes.rules.base import (
    Answer,
    GraphValue,
    Refusal,
    Site,
    gradient_side,
    kronecker_factors,
    layer_kind,
    node_ref,
    plain,
    shift_use,
    too_wide,
)

_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


@layer_kind()
class RecurrentRule:
    """nn.LSTM, nn.GRU, nn.RNN, of a PackedSequence too, and their cells, with an operator for each.

    (weight_ih, bias_ih) acts on the inputs of all steps and (weight_hh, bias_hh) on the previous
    hidden states; G is over the derivatives in each product's own outputs, gates stacked.
    """

    kind = "recurrent"
    operations = frozenset(STEPS) | frozenset(CELLS) | frozenset(PACKED)

    def match(self, call: Call, site: Site) -> Answer:
        """Return the uses at every product of the layers; all share one tap, in their slots."""
        cell = call.operation in CELLS
        params = [call.get(name) for name in _WEIGHTS] if cell else list(call.get("params"))
        held = [site.parameter(value) for value in params]
        if not any(held):
            return None
        reason = _unfit(call, site, len(params))
        if not all(plain(p.layout) for p in held if p is not None):
            reason = "a weight or bias is reshaped on its way"
        if reason is not None:
            return Refusal(f"{call.operation}: {reason}")
        # torch keeps the parameters in one flat list: four a layer and direction, or two without
        # biases.
        width = 4 if cell or call.get("has_biases") else 2
        tap = _tap(call, site, params, slots=2 * SLOTS * (len(params) // width))
        uses: list[ParameterUse] = []
        for start in range(0, len(held), width):
            group = held[start : start + width]
            for side in (0, 1):
                at = (2 * (start // width) + side) * SLOTS
                bias = group[2 + side] if width == 4 else None
                # All uses of a call fill slots of one operator, so they share a tap and differ by
                # where they begin.
                uses += self._product(call, site, group[side], bias, replace(tap, at=at))
        return uses

    def _product(
        self,
        call: Call,
        site: Site,
        weight: Reference | None,
        bias: Reference | None,
        tap: Tap,
    ) -> list[ParameterUse]:
        """Return the uses at one product: the weight with its bias, or either one alone."""
        uses: list[ParameterUse] = []
        if bias is not None and (weight is None or weight.name in site.alone):
            shift = shift_use(call, site, bias, (-1,))
            uses, bias = [replace(shift, tap=replace(tap, at=tap.at + SLOTS - 1))], None
        if weight is None:
            return uses
        found = [weight] if bias is None else [weight, bias]
        outputs, inputs = weight.layout.shape
        A, _ = kronecker_factors(site, inputs, outputs, bias=bias is not None)
        # G alone is cut, as gates stacked make it four times as long as the hidden state: whether
        # A has a bias is read off its side, which the zeros that fill up sub-blocks would hide.
        factors = (A, gradient_side(site, outputs, cuttable=True))
        use = ParameterUse(
            kind=self.kind,
            node=call.node.name,
            parameters=tuple(p.name for p in found),
            layouts=tuple(p.layout for p in found),
            factors=factors,
            approximation="kronecker",
            tap=tap,
            path=(*weight.path, call.operation),
            reason=too_wide(site, factors),
        )
        return [use, *uses]


def _unfit(call: Call, site: Site, params: int) -> str | None:
    """Return why the call as a whole cannot be recorded, if it cannot."""
    # A cell's states have the cases that its input has: a decoder begins with a learned vector.
    hx = call.get("hx") if call.operation in CELLS else None
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if not any(map(site.view.is_per_case, [call.get("input"), *states])):
        return "the input is no activation"
    if call.operation in CELLS:
        return None
    pairs = call.get("num_layers") * (2 if call.get("bidirectional") else 1)
    if params != pairs * (4 if call.get("has_biases") else 2):
        return "proj_size projects the hidden states"
    return None


def _tap(call: Call, site: Site, params: list[GraphValue], slots: int) -> Tap:
    """Return the tap of all products of a call; the layer's own options may name flags."""
    names = ["input", "hx"]
    if call.operation in PACKED:
        names.insert(1, "batch_sizes")
    tensors: tuple[Argument, ...] = tuple(node_ref(call.get(name)) for name in names)
    if call.operation in CELLS:
        tensors += tuple(node_ref(value) for value in params)
    else:
        kind = PackedOptions if call.operation in PACKED else LayerOptions
        options = [option.name for option in fields(kind)]
        tensors += (node_ref(params), *(node_ref(call.get(name)) for name in options))
    ours = RecurrentOptions(site.reduce).to_args()
    return Tap(call.operation, call.node.name, tensors, ours, slots=slots)
