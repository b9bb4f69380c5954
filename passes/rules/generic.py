"""Find what can be recorded of a parameter that no rule takes, and say why it is no more.

Where the parameter is broadcast over the cases, a tap records its per-case gradients; their
covariance is full, or that of rows, or a diagonal. Elsewhere the block has the squared gradient of
the batch. docs/explanation/mathematics.md, section 4, "any other parameter".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import fx
from torch.nn.utils.parametrize import is_parametrized

from kfac_fx.capture.dialect import operation_name, row_of
from kfac_fx.capture.graph_view import Consumer, GraphView
from kfac_fx.capture.parameter_paths import ancestors
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import FactorSpec, NodeRef, ParameterUse, Tap
from kfac_fx.ops.cases import RowOptions
from kfac_fx.passes.rules.base import (
    BROADCASTING,
    Site,
    broadcast_with,
    covariance_factor,
    gradient_side,
    joined,
    too_large,
    too_wide,
)

# Entry by entry: the gradient of each entry of the result is that of the same entry of the
# parameter times a slope, so a tap on either side sees one gradient a case.
POINTWISE = BROADCASTING | frozenset(
    {"abs", "clamp", "clamp_min", "clamp_max", "cos", "elu", "exp", "expm1", "gelu", "log"}
    | {"log1p", "logsigmoid", "neg", "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid"}
    | {"silu", "sin", "softplus", "sqrt", "square", "tanh", "to", "float", "type_as", "truediv"}
)


def _through(view: GraphView, consumer: Consumer, refusals: Mapping[str, str]) -> str:
    """Return a consumer's operations and what is in the way at the last of them."""
    label = operation_name(consumer.node) or str(consumer.node.target)
    path = " -> ".join((*consumer.path, label))
    # What a weight is computed into is refused where that is used.
    nodes = [consumer.node, *sorted(view.ends(consumer.node))]
    found = [refusals[node.name] for node in nodes if node.name in refusals]
    return f"{path}: {found[0] if found else _unknown(view, consumer.node)}"


def _unknown(view: GraphView, node: fx.Node) -> str:
    """Return why no rule was even asked about a node."""
    if node.op == "call_module":
        module = view.module.get_submodule(str(node.target))
        if module._forward_hooks or module._forward_pre_hooks:
            return "its forward hooks may change what goes in and out"
        if is_parametrized(module):
            return "its weight is computed by a parametrization that only torch.export follows"
        if any(p.dim() > 1 for p in module.parameters()):
            return (
                f"{type(module).__name__} is kept whole by symbolic tracing: torch.export looks "
                "into it, if the transform is given example_inputs=(...)"
            )
    return "no rule for this operation"


def _strangers(view: GraphView, consumers: Sequence[Consumer]) -> str | None:
    """Name the operations between a parameter and the data that no table has a word for.

    One of them may be a well-known operation that this version of torch spells in another way, so
    that the parameter has a weaker block than with the version before.
    """
    found: dict[str, None] = {}
    todo = [consumer.node for consumer in consumers]
    seen = set(todo)
    while todo:
        node = todo.pop(0)
        named = row_of(node.op, node.target) is not None or operation_name(node) in POINTWISE
        if node.op in ("call_function", "call_method") and not named:
            found[_spelled(node)] = None
        if not view.depends_on_data(node):
            new = [user for user in node.users if user not in seen]
            seen.update(new)
            todo += new
    names = ", ".join(found)
    version = torch.__version__
    return f"torch {version} has names here that kfac_fx does not know: {names}" if names else None


def _spelled(node: fx.Node) -> str:
    """Return the whole name of what a node calls: "aten.mul.Tensor", "torch.mul", "Tensor.mul"."""
    target = node.target
    if isinstance(target, str):
        return f"Tensor.{target}"
    if target is getattr:
        return f"Tensor.{node.args[1]}"
    name = getattr(target, "__name__", None)
    if name is None or isinstance(target, type(torch.ops.aten.mm.default)):
        return str(target)
    module = getattr(target, "__module__", None) or "torch"
    return f"{module}.{name}"


def case_tap(view: GraphView, consumer: Consumer) -> Tap | None:
    """Return a tap on the parameter's side of a consumer that keeps one gradient a case.

    Between the parameter and the consumer there may be operations that work entry by entry. If they
    also reshape, or run before the other operand is there, the tap stands after them and multiplies
    by their slope.

    Args:
        view: reads the graph.
        consumer: where the parameter is used.

    Returns:
        None where something else than entry by entry happens, or nothing knows the cases.
    """
    value, node = consumer.value, consumer.node
    if value is None or not _same_order(view, consumer):
        return None
    carrier = value  # the parameter, then what is computed from it entry by entry
    reshaped = False
    while not view.depends_on_data(node):
        reshapes = _reshapes(view, node)
        if not reshapes and operation_name(node) not in POINTWISE:
            return None
        if len(node.users) != 1 or node.all_input_nodes != [carrier]:
            return None
        reshaped |= reshapes
        carrier, node = node, next(iter(node.users))
    other = broadcast_with(view, carrier) if node in carrier.users else None
    if other is None:
        return None
    like = NodeRef(other[0].name)
    # The copies for the cases take their number from the other operand, which must exist by then.
    if reshaped or not other[0] < consumer.node:
        return Tap("cases", carrier.name, (like, NodeRef(value.name)), (), other[1].name)
    return Tap("cases", value.name, (like, None), (), consumer.node.name)


def _reshapes(view: GraphView, node: fx.Node) -> bool:
    """Tell whether a node only gives its entries another shape, in the same order."""
    call = view.call(node)
    if call is None:
        return False
    if call.operation == "getitem":
        index = call.get("index")
        index = index if isinstance(index, tuple) else (index,)
        return all(entry is None or entry == slice(None) for entry in index)
    return call.operation in ("unsqueeze", "reshape", "flatten")


def _expanded_tap(view: GraphView, consumer: Consumer) -> Tap | None:
    """Return a tap after ``expand(cases, ...)`` or ``repeat(cases, 1, ...)`` of a parameter.

    Its copies are one a case already.
    """
    call = view.call(consumer.node)
    if call is None or call.operation not in ("expand", "repeat") or consumer.value is None:
        return None
    reference = view.reference(consumer.value)
    sizes = call.get("shape")
    if reference is None or not sizes or not isinstance(sizes[0], fx.Node):
        return None
    # The first size is computed, so it is the number of cases; all others must be the parameter's,
    # or the copies would be of something else.
    lead = len(sizes) - len(reference.layout.shape)
    wanted = (1,) * lead + reference.layout.shape
    # What ``repeat`` is given are numbers of copies, and not sizes.
    others = (1,) * len(wanted) if call.operation == "repeat" else wanted
    same = all(s == -1 or s == w for s, w in zip(sizes[1:], others[1:], strict=True))
    if lead < 0 or wanted[0] != 1 or not same:
        return None
    return Tap("cases", consumer.node.name, (None, None))


def generic_use(
    site: Site, name: str, reason: str | None, refusals: Mapping[str, str]
) -> ParameterUse | None:
    """Return the use of a parameter that no rule took; None if the outputs do not depend on it.

    Args:
        site: the graph, and the options that shape uses.
        name: the name of the parameter.
        reason: why its uses do not fit together, if they do not.
        refusals: what the rules that looked at a node said, by its name.
    """
    view = site.view
    consumers = list(view.consumers(name))
    if not consumers:
        return None
    shape = tuple(view.parameters[name].shape)
    size = prod(shape)
    first = consumers[0]
    tap = None
    hidden = _hidden(view, name, consumers)
    reason = hidden or reason
    if len(consumers) == 1 and hidden is None:
        tap = case_tap(view, first) or _expanded_tap(view, first)
    if tap is not None and _same_order(view, first):
        return _elementwise_use(site, name, first, tap)
    alone = name in site.open and not _refused(view, consumers, refusals)
    if alone and (root := _table(view, consumers, shape)) is not None:
        return _row_use(site, name, first, Tap("cases", root.name, (None, None)), one_case=True)
    if reason is None and len(consumers) > 1 and all(case_tap(view, c) for c in consumers):
        reason = f"it is used in {', '.join(c.node.name for c in consumers)} in different ways"
    # No rule, no tap: the squared gradient of the batch is a statistic of sorts, and the report
    # says what stood in the way, as that is what a user can change.
    why = reason or "; ".join(_through(view, consumer, refusals) for consumer in consumers[:3])
    if not hidden:
        why = joined(why, _strangers(view, consumers)) or why
    return ParameterUse(
        kind="generic",
        node=first.node.name,
        parameters=(name,),
        layouts=(Layout(shape),),
        factors=(FactorSpec("C", (size,), "gradient"),),
        approximation="diagonal",
        tap=None,
        path=first.path,
        reason=f"squared gradient of the batch; {why}",
    )


def _hidden(view: GraphView, name: str, consumers: Sequence[Consumer]) -> str | None:
    """Return why no tap can record the parameter's per-case gradients, wherever it is used."""
    if view.parameters[name].is_complex():
        return "the statistics of complex parameters are not defined here"
    if any(view.is_mapped(consumer.node) for consumer in consumers):
        return "it runs inside vmap, where a tap sees no cases"
    return None


def _elementwise_use(site: Site, name: str, consumer: Consumer, tap: Tap) -> ParameterUse:
    """Return the use with a full covariance; with that of a matrix's rows where it is too large."""
    shape = tuple(site.view.parameters[name].shape)
    size = prod(shape)
    # A matrix of positions or tokens: rows that count as uncorrelated keep what is within a row.
    if too_large(size) and _rows(shape):
        return _row_use(site, name, consumer, tap)
    factor, approximation = covariance_factor(size)
    return ParameterUse(
        kind="elementwise",
        node=consumer.node.name,
        parameters=(name,),
        layouts=(Layout(shape),),
        factors=(factor,),
        approximation=approximation,
        tap=tap,
        path=consumer.path,
        reason=too_large(size),
    )


def _rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows if there are rows of several entries, else 0."""
    rows = prod(shape[:-1])
    return rows if rows > 1 and shape[-1] > 1 else 0


def _row_use(
    site: Site, name: str, consumer: Consumer, tap: Tap, *, one_case: bool = False
) -> ParameterUse:
    """Return the use of rows of the last dimension as embeddings that every case looks up once."""
    shape = tuple(site.view.parameters[name].shape)
    rows = _rows(shape)
    why = too_large(prod(shape))
    if one_case:
        why = "it is computed with before it meets the data, the batch counts as one case"
    factors = (FactorSpec("A", (rows,), "input", diagonal=True), gradient_side(site, shape[-1]))
    return ParameterUse(
        kind="elementwise",
        node=consumer.node.name,
        parameters=(name,),
        layouts=(Layout(shape).reshape((rows, shape[-1])).transpose(0, 1),),
        factors=factors,
        approximation="kronecker",
        tap=as_rows(tap, one_case),
        path=consumer.path,
        reason=joined("its rows count as uncorrelated", why, too_wide(site, factors[1:])),
    )


def as_rows(tap: Tap, one_case: bool = False) -> Tap:
    """Return a tap for the rows of the same gradients."""
    return replace(tap, operator="case_rows", options=RowOptions(one_case).to_args())


def _refused(view: GraphView, consumers: list[Consumer], refusals: Mapping[str, str]) -> bool:
    """Tell whether a rule looked at one of the uses and said no."""
    nodes = {c.node for c in consumers} | {e for c in consumers for e in view.ends(c.node)}
    return any(node.name in refusals for node in nodes)


def _table(view: GraphView, consumers: list[Consumer], shape: tuple[int, ...]) -> fx.Node | None:
    """Return the one node that reads a matrix which is computed with before it meets the data.

    What it is computed into is used by every case alike: the derivative that arrives at the node is
    summed over them, so the batch is one case.
    """
    roots = [n for n in view.graph.nodes if n.op == "get_attr" and n in _read(view, consumers)]
    direct = any(view.depends_on_data(c.node) or c.value is None for c in consumers)
    ends = {end for c in consumers for end in view.ends(c.node)}
    computed = not direct and any(map(view.depends_on_data, ends))
    return roots[0] if computed and len(roots) == 1 and _rows(shape) else None


def _read(view: GraphView, consumers: list[Consumer]) -> set[fx.Node]:
    """Return all nodes that what the consumers read is computed from."""
    return {a for c in consumers if c.value is not None for a in ancestors(c.value)}


def _same_order(view: GraphView, consumer: Consumer) -> bool:
    """Tell whether the parameter's entries keep their order on the way to the consumer."""
    reference = view.reference(consumer.value)
    return reference is not None and all(step.view == "reshape" for step in reference.layout.steps)
