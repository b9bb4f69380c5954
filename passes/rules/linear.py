"""Dense uses: linear, matmul, addmm and einsum with a parameter."""

from __future__ import annotations

from typing import Any

from kfac_fx.capture.view import Call, Reference
from kfac_fx.ir import Layout, NodeRef, ParameterUse, Tap
from kfac_fx.passes.rules.base import Refusal, Site, kronecker_factors, shift_use


def _use(
    call: Call,
    site: Site,
    x: Any,
    weight: Reference,
    matrix: Layout,
    dims: tuple[tuple[int, ...], tuple[int, ...]],
    bias: Reference | None = None,
) -> ParameterUse | Refusal:
    """A Kronecker use of ``matrix`` [out, in]; ``dims`` are the feature dimensions of x and y."""
    if not site.view.depends_on_data(x):
        return Refusal(f"{call.operation}: the other operand is no activation")
    outputs, inputs = matrix.shape
    parameters = [weight] if bias is None else [weight, bias]
    layouts = [matrix] if bias is None else [matrix, bias.layout.reshape((outputs,))]
    return ParameterUse(
        kind="linear",
        node=call.node.name,
        parameters=tuple(p.name for p in parameters),
        layouts=tuple(layouts),
        factors=kronecker_factors(inputs, outputs, bias=bias is not None),
        approximation="kronecker",
        tap=Tap(
            "linear",
            call.node.name,
            (NodeRef(x.name),),
            (*dims, bias is not None, site.reduce),
        ),
        path=(*weight.path, call.operation),
    )


def _matrix_bias(bias: Reference | None, outputs: int) -> Reference | None:
    """The bias where it has one entry an output."""
    if bias is None or bias.layout.shape[-1:] != (outputs,):
        return None
    return bias if all(size == 1 for size in bias.layout.shape[:-1]) else None


class LinearRule:
    """F.linear and nn.Linear; x @ W, W @ x, addmm(b, x, W); einsum with one shared weight."""

    kind = "linear"
    operations = frozenset({"linear", "matmul", "addmm", "einsum"})

    def match(self, call: Call, site: Site) -> ParameterUse | Refusal | None:
        match: dict[str, Any] = {
            "linear": self._linear,
            "matmul": self._matmul,
            "addmm": self._addmm,
            "einsum": self._einsum,
        }
        result: ParameterUse | Refusal | None = match[call.operation](call, site)
        return result

    def _linear(self, call: Call, site: Site) -> ParameterUse | Refusal | None:
        x, weight = call.get("input"), site.parameter(call.get("weight"))
        bias = site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (-1,))
        if len(weight.layout.shape) != 2:
            return Refusal(f"linear: the weight is seen as {weight.layout.shape}, not as a matrix")
        return _use(call, site, x, weight, weight.layout, ((-1,), (-1,)), bias)

    def _matmul(self, call: Call, site: Site) -> ParameterUse | Refusal | None:
        left, right = call.get("input"), call.get("other")
        weight = site.parameter(right)
        if weight is not None:
            if len(weight.layout.shape) != 2:
                return Refusal(f"matmul: the weight is seen as {weight.layout.shape}")
            return _use(call, site, left, weight, weight.layout.transpose(0, 1), ((-1,), (-1,)))
        weight = site.parameter(left)
        if weight is None:
            return None
        if len(weight.layout.shape) != 2:
            return Refusal(f"matmul: the weight is seen as {weight.layout.shape}")
        # W @ x: features lie in the last dimension but one (a vector x has no other).
        return _use(call, site, right, weight, weight.layout, ((-2,), (-2,)))

    def _addmm(self, call: Call, site: Site) -> ParameterUse | Refusal | None:
        weight = site.parameter(call.get("other"))
        bias = site.parameter(call.get("bias"))
        if weight is None:
            if site.parameter(call.get("input")) is not None:
                return Refusal("addmm: the weight is the left factor")
            return None if bias is None else shift_use(call, site, bias, (-1,))
        if call.get("alpha", 1) != 1 or (bias is not None and call.get("beta", 1) != 1):
            return Refusal("addmm: alpha and beta other than 1")
        bias = _matrix_bias(bias, weight.layout.shape[1])
        matrix = weight.layout.transpose(0, 1)
        return _use(call, site, call.get("input"), weight, matrix, ((-1,), (-1,)), bias)

    def _einsum(self, call: Call, site: Site) -> ParameterUse | Refusal | None:
        operands = call.get("operands")
        weights = [site.parameter(operand) for operand in operands]
        held = [weight for weight in weights if weight is not None]
        if not held:
            return None
        if len(operands) != 2 or len(held) != 1:
            return Refusal("einsum: not one parameter and one activation")
        at = 0 if weights[0] is not None else 1
        terms = _einsum_terms(call.get("equation"))
        if terms is None:
            return Refusal(f"einsum: {call.get('equation')!r} has an ellipsis or repeated letters")
        w, x, y = terms[at], terms[1 - at], terms[2]
        inputs = [c for c in w if c in x and c not in y]
        outputs = [c for c in w if c in y and c not in x]
        if len(inputs) + len(outputs) != len(w) or set(x) - set(inputs) - set(y):
            return Refusal(f"einsum: {call.get('equation')!r} is no product with one matrix")
        if not inputs or not outputs:
            return Refusal(f"einsum: {call.get('equation')!r} leaves the matrix without a side")
        weight = held[0]
        sizes = dict(zip(w, weight.layout.shape, strict=True))
        count = 1
        for letter in outputs:
            count *= sizes[letter]
        matrix = weight.layout.permute(*(w.index(c) for c in (*outputs, *inputs)))
        matrix = matrix.reshape((count, -1))
        x_dims = tuple(x.index(c) for c in inputs)
        y_dims = tuple(y.index(c) for c in outputs)
        return _use(call, site, operands[1 - at], weight, matrix, (x_dims, y_dims))


def _einsum_terms(equation: Any) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result, or None where they are not plain."""
    if not isinstance(equation, str) or "." in equation:
        return None
    equation = equation.replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    if not arrow:
        letters = first + second
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(set(term)) != len(term) for term in (first, second, output)):
        return None
    return first, second, output
