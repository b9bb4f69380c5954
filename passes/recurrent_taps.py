"""Taps of recurrent layers: one operator runs in the layer's place and records all its uses.

A recurrent layer is one call for all its steps, and the derivatives that its factors need arise
inside of it. So the tap is no operator on its output, but one that computes the layer and whose
backward forms the statistics of every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx, nn

from kfac_fx.capture.dialect import Argument
from kfac_fx.ir.use import Tap
from kfac_fx.ops.recurrent import CELLS, PACKED, STEPS
from kfac_fx.ops.recurrent_results import in_packed_order, nested, repacked
from kfac_fx.passes.annotations import annotate, annotation, take_over, without_annotation

_OPERATORS = {getattr(torch.ops.kfac_fx, name).default: name for name in (*STEPS, *CELLS, *PACKED)}


def replaces_node(node: fx.Node) -> bool:
    """Tell whether the node is an operator that took another one's place."""
    return node.op == "call_function" and node.target in _OPERATORS


def fill(
    graph: fx.Graph,
    nodes: dict[str, fx.Node],
    tap: Tap,
    block: str,
    read_factors: Callable[[], list[fx.Node]],
    resolve: Callable[[Argument], Argument],
) -> None:
    """Put a use's factors into the operator at its node, which the first use puts there.

    Args:
        graph: is changed in place.
        nodes: the nodes by name; the node's entry becomes what took its place.
        tap: that of the use; says the operator, its arguments, and where its factors go.
        block: name of the use's block.
        read_factors: makes the nodes that read the block's factors.
        resolve: a function from an argument of the tap to a node or value of the graph.
    """
    result = nodes[tap.node]
    if not replaces_node(_operator(result)):
        result = nodes[tap.node] = _replace(graph, result, tap, resolve)
    call = _operator(result)
    with graph.inserting_before(call):
        found = read_factors()
    # The operator's arguments are tensors, factors, options: factors are one list, in which every
    # use has its place.
    place = len(tap.tensors)
    factors: list[Argument] = list(call.args[place])  # type: ignore[arg-type]
    factors[tap.at : tap.at + len(found)] = found
    call.update_arg(place, factors)
    # The operator records several blocks, and names them all.
    facts = dict(annotation(call))
    annotate(call, **facts | {"blocks": [*facts.get("blocks", ()), block]})


def _operator(result: fx.Node) -> fx.Node:
    """Return the operator whose result a node hands on in the nesting that the layer returns."""
    return result.all_input_nodes[0] if result.target in (nested, repacked) else result


def _replace(
    graph: fx.Graph, node: fx.Node, tap: Tap, resolve: Callable[[Argument], Argument]
) -> fx.Node:
    """Put the operator without factors in a node's place, and return what its users read.

    That takes over the node's name, since uses of other blocks refer to it by name.
    """
    name = node.name
    is_module = node.op == "call_module"
    read = _read_by(node)
    with graph.inserting_before(node):
        tensors: Sequence[Argument] = fx.node.map_arg(
            [resolve(t) for t in tap.tensors], lambda n: read.get(n, n)
        )
        operator = getattr(torch.ops.kfac_fx, tap.operator).default
        packed = tensors[0] if is_module and tap.operator in PACKED else None
        if packed is not None:
            tensors = _unpacked(graph, tensors)
        no_factors = [None] * tap.slots
        call = graph.call_function(operator, (*tensors, no_factors, *tap.options))
        result = call
        # The module returns (outputs, (h, c)) and the operator three tensors.
        if packed is not None:
            result = graph.call_function(repacked, (call, packed))
        elif is_module and tap.operator == "lstm":
            result = graph.call_function(nested, (call,))
    take_over(call, node, same_value=False, **({"module": str(node.target)} if is_module else {}))
    kept = {k: v for k, v in node.meta.items() if k != "is_wrapped"}
    result.meta = kept | ({"custom": call.meta["custom"]} if result is call else {})
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    result._rename(name)
    return result


def _unpacked(graph: fx.Graph, tensors: Sequence[Argument]) -> list[Argument]:
    """Return an operator's arguments from those of a layer that is given a PackedSequence."""
    packed, _, hx, *rest = tensors
    data, sizes = (graph.call_function(getattr, (packed, n)) for n in ("data", "batch_sizes"))
    # The layer takes states in the order of the cases, which the packed batch sorts by length.
    if hx is not None:
        hx = graph.call_function(in_packed_order, (hx, packed))
    return [data, sizes, hx, *rest]


def _read_by(node: fx.Node) -> dict[fx.Node, fx.Node]:
    """Return what a node reads, by the model's own node in front of the taps.

    The tap names the model's nodes; some of them may have taps already, which stay in between.
    """
    result: dict[fx.Node, fx.Node] = {}
    for given in node.all_input_nodes:
        source = given
        while getattr(source.target, "namespace", None) == "kfac_fx" and not replaces_node(source):
            source = source.all_input_nodes[0]
        result[source] = given
    return result


def restore(graph: fx.Graph, call: fx.Node, module: nn.Module | None) -> None:
    """Put the module's or ATen's own call back in the operator's place.

    Args:
        graph: is changed in place.
        call: the operator.
        module: whose graph it is; torch.export keeps annotations, but not the layers' modules.
    """
    assert call.op == "call_function"
    operation = _OPERATORS[call.target]
    users = [user for user in call.users if user.target in (nested, repacked)]
    result = users[0] if users else call
    given: list[Argument] = [arg for arg in call.args[:2] if arg is not None]
    made_for_it: list[fx.Node] = []
    if result.target is repacked:
        made_for_it = [arg for arg in call.args[:3] if isinstance(arg, fx.Node)]
        given = [result.args[1]]
        given += [states.args[0] for states in made_for_it[2:]]
    # A graph of layers gets its module back. In an exported graph, where the module is not there or
    # is no recurrent layer, ATen's own operator does the same.
    path = annotation(call).get("module")
    if path is not None and module is not None:
        layer = dict(module.named_modules()).get(path)
        path = path if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) else None
    with graph.inserting_before(call):
        if path is not None:
            node = graph.create_node("call_module", path, tuple(given))
        else:
            packet = getattr(torch.ops.aten, PACKED.get(operation, operation))
            overload = "data" if operation in PACKED else "input"
            target = getattr(packet, "default" if operation in CELLS else overload)
            arguments = list(call.args[:-2])
            if operation not in PACKED and arguments[1] is None:
                arguments[1] = _zero_states(graph, operation, arguments)
            node = graph.create_node("call_function", target, tuple(arguments))
    node.meta = without_annotation(result.meta)
    name = result.name
    result.replace_all_uses_with(node)
    for made in (result, call) if users else (call,):
        graph.erase_node(made)
    for made in made_for_it:
        graph.erase_node(made)
    node._rename(name)


def _zero_states(graph: fx.Graph, operation: str, arguments: list[Argument]) -> Argument:
    """Return the states that a layer's module starts from by itself, and ATen's operator does not.

    Args:
        graph: gets the nodes that make zeros in the size of the batch.
        operation: name of the layer's operation.
        arguments: the arguments of the operator for batches of inputs.
    """
    cell = operation in CELLS
    x = arguments[0]
    weight = arguments[3] if cell else arguments[2][1]

    def size(node: Argument, dim: int) -> fx.Node:
        return graph.call_function(torch.ops.aten.sym_size.int, (node, dim))

    shape = [size(x, 0 if cell or arguments[8] else 1), size(weight, 1)]
    if not cell:
        shape.insert(0, arguments[4] * (2 if arguments[7] else 1))
    zeros = graph.call_function(torch.ops.aten.new_zeros.default, (x, shape))
    return [zeros, zeros] if operation.startswith("lstm") else zeros
