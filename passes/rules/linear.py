"""Dense uses: linear, matmul, addmm and einsum with a parameter."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.capture.parameter_paths import Reference
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.attention import attention_uses
from kfac_fx.passes.rules.base import (
    ONE_CASE,
    Answer,
    Refusal,
    Site,
    joined,
    kronecker_factors,
    shift_use,
    too_wide,
)
from kfac_fx.passes.rules.derived import apart, through_derivation, weight_of

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


def dense_use(
    call: Call,
    site: Site,
    x: Any,
    weight: Reference,
    matrix: Layout,
    dims: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    bias: Reference | None = None,
    group_dims: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Answer:
    """Kronecker uses of a matrix, layout [out, in] or [groups, out, in], and of its bias.

    Args:
        dims: the feature dimensions of x and y.
        group_dims: the dimensions of x and y that count the groups.
    """
    if not isinstance(x, fx.Node):
        return Refusal(f"{call.operation}: the other operand is no tensor of the graph")
    table = not site.view.is_per_case(x)
    *lead, outputs, inputs = matrix.shape
    extra: list[ParameterUse] = []
    if bias is not None and (apart(weight, site) or prod(bias.layout.shape) != outputs):
        extra, bias = [shift_use(call, site, bias, dims[1])], None
    parameters, layouts = [weight.name], [matrix]
    if bias is not None:
        parameters.append(bias.name)
        layouts.append(bias.layout.reshape((outputs,)))
    factors = kronecker_factors(
        site,
        inputs,
        outputs,
        bias=bias is not None,
        lead=tuple(lead),
        cuttable=True,
    )
    use = ParameterUse(
        kind="linear",
        node=call.node.name,
        parameters=tuple(parameters),
        layouts=tuple(layouts),
        factors=factors,
        approximation="kronecker",
        tap=Tap(
            "table" if table else "linear",
            call.node.name,
            (NodeRef(x.name),),
            (*dims, *group_dims, bias is not None, site.reduce),
        ),
        path=(*weight.path, call.operation),
        reason=joined(too_wide(site, factors), ONE_CASE if table else None),
    )
    return [through_derivation(use, weight), *extra]


class LinearRule:
    """F.linear and nn.Linear; x @ W, W @ x, addmm(b, x, W); bmm and einsum, also with groups."""

    kind = "linear"
    operations = frozenset({"linear", "matmul", "addmm", "baddbmm", "einsum"})

    def match(self, call: Call, site: Site) -> Answer:
        if call.operation == "linear":
            return self._linear(call, site)
        if call.operation == "matmul":
            return self._matmul(call, site, call.get("input"), call.get("other"), None)
        if call.operation == "einsum":
            return self._einsum(call, site)
        return self._addmm(call, site)

    def _linear(self, call: Call, site: Site) -> Answer:
        x, weight = call.get("input"), weight_of(call.get("weight"), site)
        bias = site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (-1,))
        if len(weight.layout.shape) != 2:
            return Refusal(f"linear: the weight is seen as {weight.layout.shape}, not as a matrix")
        answer = dense_use(call, site, x, weight, weight.layout, ((-1,), (-1,)), bias=bias)
        if not isinstance(answer, list):
            return answer
        return [*attention_uses(site, answer[0]), *answer[1:]]

    def _matmul(
        self, call: Call, site: Site, left: Any, right: Any, bias: Reference | None
    ) -> Answer:
        weight, x, side = weight_of(right, site), left, -1
        if weight is None:
            weight, x, side = weight_of(left, site), right, -2
        if weight is None:
            return None
        axes = len(weight.layout.shape)
        if axes not in (2, 3):
            return Refusal(f"{call.operation}: the weight is seen as {weight.layout.shape}")
        matrix = weight.layout.transpose(-2, -1) if side == -1 else weight.layout
        groups: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        if axes == 3:
            # Batches of matrices: the dimension before the last two counts the groups.
            groups = ((-3,), (-3,))
        return dense_use(
            call, site, x, weight, matrix, ((side,), (side,)), bias=bias, group_dims=groups
        )

    def _addmm(self, call: Call, site: Site) -> Answer:
        bias = site.parameter(call.get("bias"))
        left, right = call.get("input"), call.get("other")
        if weight_of(left, site) is None and weight_of(right, site) is None:
            return None if bias is None else shift_use(call, site, bias, (-1,))
        if call.get("alpha", 1) != 1 or (bias is not None and call.get("beta", 1) != 1):
            return Refusal(f"{call.operation}: alpha and beta other than 1")
        if weight_of(right, site) is None or call.operation == "baddbmm":
            bias = None  # no bias of the output's features: it goes its own way
        return self._matmul(call, site, left, right, bias)

    def _einsum(self, call: Call, site: Site) -> Answer:
        operands = call.get("operands")
        weights = [weight_of(operand, site) for operand in operands]
        held = [weight for weight in weights if weight is not None]
        if not held:
            return None
        if len(operands) != 2 or len(held) != 1:
            return Refusal("einsum: not one parameter and one activation")
        at = 0 if weights[0] is not None else 1
        terms = _einsum_terms(call.get("equation"))
        if terms is None:
            return Refusal(f"einsum: {call.get('equation')!r} has repeated letters")
        w, x, y = terms[at], terms[1 - at], terms[2]
        inputs = [c for c in w if c in x and c not in y]
        outputs = [c for c in w if c in y and c not in x]
        groups = [c for c in w if c in y and c in x]
        if (
            len(inputs) + len(outputs) + len(groups) != len(w)
            or set(x) - set(inputs) - set(y)
            or ELLIPSIS in w
        ):
            return Refusal(f"einsum: {call.get('equation')!r} is no product with matrices")
        if not inputs or not outputs:
            return Refusal(f"einsum: {call.get('equation')!r} leaves the matrix without a side")
        weight = held[0]
        sizes = dict(zip(w, weight.layout.shape, strict=True))
        order = (*groups, *outputs, *inputs)
        shape = [prod(sizes[c] for c in letters) for letters in (groups, outputs, inputs)]
        matrix = weight.layout.permute(*(w.index(c) for c in order))
        matrix = matrix.reshape(shape if groups else shape[1:])

        dims = (_dims(x, inputs), _dims(y, outputs))
        group_dims = (_dims(x, groups), _dims(y, groups))
        return dense_use(call, site, operands[1 - at], weight, matrix, dims, group_dims=group_dims)


def _dims(term: str, letters: list[str]) -> tuple[int, ...]:
    """Where the letters stand; behind an ellipsis they are counted from the end."""
    gap = term.find(ELLIPSIS) if ELLIPSIS in term else len(term)
    places = [term.index(c) for c in letters]
    return tuple(place if place < gap else place - len(term) for place in places)


def _einsum_terms(equation: Any) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, or None where they are not plain."""
    if not isinstance(equation, str):
        return None
    equation = equation.replace(" ", "").replace("...", ELLIPSIS)
    inputs, arrow, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    if not arrow:
        letters = first + second
        once = sorted(c for c in set(letters) - {ELLIPSIS} if letters.count(c) == 1)
        output = ELLIPSIS * (ELLIPSIS in letters) + "".join(once)
    if any(len(set(term)) != len(term) for term in (first, second, output)):
        return None
    return first, second, output
