"""Dense uses: linear, matmul, addmm and einsum with a parameter; projections of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from string import ascii_letters

from torch import fx, nn

from kfac_fx.capture.dialect import Call
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.capture.parameter_paths import Reference
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import NodeRef, ParameterUse, Tap
from kfac_fx.ops.kronecker import LinearOptions
from kfac_fx.ops.linear import ProjectionOptions
from kfac_fx.passes.rules.base import (
    Answer,
    GraphValue,
    Refusal,
    Site,
    kronecker_factors,
    kronecker_use,
    layer_kind,
    shift_use,
    too_wide,
)

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

PROJECTIONS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})
"""Parameters of nn.MultiheadAttention whose rows make queries, keys and values."""


def dense_use(
    call: Call,
    site: Site,
    x: GraphValue,
    weight: Reference,
    matrix: Layout,
    dims: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    bias: Reference | None = None,
    group_dims: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Answer:
    """Return the Kronecker uses of a matrix and of its bias, for a call that is dense in both.

    Args:
        call: what multiplies by the weight.
        site: the graph around it.
        x: what the weight multiplies; anything but a node of the graph is refused.
        weight: the parameter, or the one that the weight is computed from.
        matrix: the views from its shape to [out, in], or [groups, out, in].
        dims: the feature dimensions of x and of the result.
        bias: what is added to the result's features.
        group_dims: the dimensions of x and of the result that count the groups.
    """
    if not isinstance(x, fx.Node):
        return Refusal(f"{call.operation}: the other operand is no tensor of the graph")
    x_dims, y_dims = dims
    x_groups, y_groups = group_dims
    # An input that no case has a part in (positions, prompts) gives one derivative, summed over the
    # cases: the operator then counts its rows as the positions of one case.
    one_case = not site.view.is_per_case(x)
    return kronecker_use(
        call,
        site,
        LinearRule.kind,
        weight=weight,
        matrix=matrix,
        bias=bias,
        channels=y_dims,
        operator="table" if one_case else "linear",
        tensors=(NodeRef(x.name),),
        options=lambda biased: LinearOptions(
            x_dims, y_dims, x_groups, y_groups, biased, site.reduce
        ),
        cuttable=True,
        one_case=one_case,
    )


@layer_kind()
class LinearRule:
    """F.linear and nn.Linear; x @ W, W @ x, addmm(b, x, W); bmm and einsum, also with groups."""

    kind = "linear"
    operations = frozenset({"linear", "matmul", "addmm", "baddbmm", "einsum"})

    def match(self, call: Call, site: Site) -> Answer:
        """Return the dense use of the one operand that is a parameter."""
        if call.operation == "linear":
            return self._linear(call, site)
        if call.operation == "matmul":
            return self._matmul(call, site, call.get("input"), call.get("other"), None)
        if call.operation == "einsum":
            return self._einsum(call, site)
        return self._addmm(call, site)

    def _linear(self, call: Call, site: Site) -> Answer:
        x, weight = call.get("input"), site.weight(call.get("weight"))
        bias = site.parameter(call.get("bias"))
        if weight is None:
            return None if bias is None else shift_use(call, site, bias, (-1,))
        if len(weight.layout.shape) != 2:
            return Refusal(f"linear: the weight is seen as {weight.layout.shape}, not as a matrix")
        answer = dense_use(call, site, x, weight, weight.layout, ((-1,), (-1,)), bias=bias)
        if not isinstance(answer, list):
            return answer
        return [*_by_projection(site, answer[0]), *answer[1:]]

    def _matmul(
        self, call: Call, site: Site, left: GraphValue, right: GraphValue, bias: Reference | None
    ) -> Answer:
        weight, x, side = site.weight(right), left, -1
        if weight is None:
            weight, x, side = site.weight(left), right, -2
        if weight is None:
            return None
        shape = weight.layout.shape
        if len(shape) == 1 and side == -1:
            # A matrix of one row, whose output has no dimension for it.
            row = weight.layout.reshape((1, *shape))
            return dense_use(call, site, x, weight, row, ((-1,), ()), bias=bias)
        if len(shape) < 2:
            return Refusal(f"{call.operation}: the weight is seen as {shape}")
        matrix = weight.layout.transpose(-2, -1) if side == -1 else weight.layout
        # Batches of matrices: dimensions before the last two count the groups. One of a single
        # matrix is no group: it multiplies all that x counts there.
        dims = tuple(k - len(shape) for k, size in enumerate(shape[:-2]) if size > 1)
        groups = [prod(shape[:-2])] if dims else []
        if len(shape) != len(groups) + 2:
            matrix = matrix.reshape([*groups, *matrix.shape[-2:]])
        return dense_use(
            call, site, x, weight, matrix, ((side,), (side,)), bias=bias, group_dims=(dims, dims)
        )

    def _addmm(self, call: Call, site: Site) -> Answer:
        bias = site.parameter(call.get("bias"))
        left, right = call.get("input"), call.get("other")
        if site.weight(left) is None and site.weight(right) is None:
            return None if bias is None else shift_use(call, site, bias, (-1,))
        # A factor between the product and the output would scale g unseen.
        if call.get("alpha", 1) != 1 or (bias is not None and call.get("beta", 1) != 1):
            return Refusal(f"{call.operation}: alpha and beta other than 1")
        if site.weight(right) is None or call.operation == "baddbmm":
            bias = None  # not one number an output feature: the generic rule takes it
        return self._matmul(call, site, left, right, bias)

    def _einsum(self, call: Call, site: Site) -> Answer:
        operands = call.get("operands")
        weights = [site.weight(operand) for operand in operands]
        held = [weight for weight in weights if weight is not None]
        if not held:
            return None
        if len(operands) != 2 or len(held) != 1:
            return Refusal("einsum: not one parameter and one activation")
        at = 0 if weights[0] is not None else 1
        terms = _einsum_terms(call.get("equation"))
        if terms is None:
            return Refusal(f"einsum: {call.get('equation')!r} has repeated letters")
        weight = held[0]
        w, x, y = _with_groups(terms[at], terms[1 - at], terms[2], len(weight.layout.shape))
        inputs = [c for c in w if c in x and c not in y]
        outputs = [c for c in w if c in y and c not in x]
        shared = [c for c in w if c in y and c in x]
        if (
            # Every letter of the weight is an input, an output or both; what is summed in x
            # alone, or hidden in an ellipsis of the weight, makes it something else.
            len(inputs) + len(outputs) + len(shared) != len(w)
            or set(x) - set(inputs) - set(y)
            or ELLIPSIS in w
        ):
            return Refusal(f"einsum: {call.get('equation')!r} is no product with matrices")
        if not inputs or not outputs:
            return Refusal(f"einsum: {call.get('equation')!r} leaves the matrix without a side")
        sizes = dict(zip(w, weight.layout.shape, strict=True))
        # Of a single matrix it is no group: that one multiplies all that x counts there.
        groups = [c for c in shared if sizes[c] > 1]
        order = (*shared, *outputs, *inputs)
        shape = [prod(sizes[c] for c in letters) for letters in (groups, outputs, inputs)]
        matrix = weight.layout.permute(*(w.index(c) for c in order))
        matrix = matrix.reshape(shape if groups else shape[1:])

        dims = (_dims(x, inputs), _dims(y, outputs))
        group_dims = (_dims(x, groups), _dims(y, groups))
        return dense_use(call, site, operands[1 - at], weight, matrix, dims, group_dims=group_dims)


def _by_projection(site: Site, use: ParameterUse | Refusal) -> Sequence[ParameterUse | Refusal]:
    """Return a dense use as one use for each projection of attention that it packs.

    nn.MultiheadAttention defines both: rows [i d, (i + 1) d) of ``in_proj_weight`` make q, k and v,
    and every projection sees [length, cases, features], whatever ``batch_first`` says. Other packed
    projections are cut in the graph in the same way as gates and gated units are, so what their
    pieces mean is not known: they stay one block, whose G also holds how the pieces go together.
    """
    if isinstance(use, Refusal):
        return [use]
    width = _width(site.view, use.parameters[0])
    start = _first_row(use.layouts[0])
    tap = use.tap
    if width is None or start is None or tap is None or tap.scale or tap.operator != "linear":
        return [use]
    outputs, inputs = use.layouts[0].shape
    if start % width or outputs % width:
        return [use]
    bias = len(use.parameters) == 2
    factors = kronecker_factors(site, inputs, width, bias=bias, cuttable=True)
    found = []
    for row in range(0, outputs, width):
        options = ProjectionOptions(row, width, bias, site.reduce)
        found.append(
            replace(
                use,
                layouts=tuple(layout.narrow(0, row, width) for layout in use.layouts),
                factors=factors,
                tap=Tap("projection", tap.node, tap.tensors, options.to_args()),
                reason=too_wide(site, factors),
            )
        )
    return found


def _width(view: GraphView, name: str) -> int | None:
    """Return the number of rows of one projection, if the parameter belongs to attention."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = view.module.get_submodule(path)
    except AttributeError:
        return None
    if not isinstance(owner, nn.MultiheadAttention) or leaf not in PROJECTIONS:
        return None
    return int(owner.embed_dim)


def _first_row(layout: Layout) -> int | None:
    """Return where the rows that are seen begin; None where the matrix is seen in another way."""
    if not layout.steps:
        return 0
    step = layout.steps[0]
    rows = len(layout.steps) == 1 and step.view == "narrow" and step.argument[0] == 0
    return step.argument[1] if rows else None


def _with_groups(w: str, x: str, y: str, dims: int) -> tuple[str, str, str]:
    """Return the terms with letters for what the ellipsis of a weight of so many dimensions hides.

    Operands are broadcast, so these are the last dimensions of the other ellipses: groups, each
    with a matrix of its own. Where there is none in the result, they are summed, and w stays.
    """
    hidden = dims - len(w.replace(ELLIPSIS, ""))
    if ELLIPSIS not in w or hidden < 0 or (hidden and ELLIPSIS not in y):
        return w, x, y
    free = [c for c in ascii_letters if c not in w + x + y]
    letters = "".join(free[:hidden])
    x, y = (term.replace(ELLIPSIS, ELLIPSIS + letters) for term in (x, y))
    return w.replace(ELLIPSIS, letters), x, y


def _dims(term: str, letters: list[str]) -> tuple[int, ...]:
    """Return where the letters stand; after an ellipsis they are counted from the end."""
    gap = term.find(ELLIPSIS) if ELLIPSIS in term else len(term)
    places = [term.index(c) for c in letters]
    return tuple(place if place < gap else place - len(term) for place in places)


def _einsum_terms(equation: GraphValue) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the result; None where one is repeated."""
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
