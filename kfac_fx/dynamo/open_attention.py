"""Open F.multi_head_attention_forward, which Dynamo keeps whole, into its operations.

torch's own code runs on symbolic values; what it asks of shapes was checked when the call was
captured, and ranks and dtypes are known from there.
"""

from __future__ import annotations

import inspect
import logging
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kfac_fx.capture.dialect import Argument
from kfac_fx.passes.base import GraphPass
from kfac_fx.passes.inline_calls import inline
from kfac_fx.torch_internals.rebuilt_functions import traceable_attention

log = logging.getLogger("kfac_fx")

FACTS = "kfac_fx_facts"
"""Key in the meta of a node that attention reads: its rank, and whether it is floating."""

_ATTENTION = traceable_attention()


def note_facts(graph: fx.Graph, key: str) -> None:
    """Write down what is known of the tensors that attention reads.

    Their values are fake tensors of a capture, which are gone when the taps are inserted.

    Args:
        graph: the graph as Dynamo captured it.
        key: the key of the values in the meta of its nodes.
    """
    for node in graph.find_nodes(op="call_function", target=F.multi_head_attention_forward):
        for source in node.all_input_nodes:
            value = source.meta.get(key)
            if isinstance(value, Tensor):
                # Plain values: a fake tensor would keep its capture's whole mode alive.
                source.meta[FACTS] = (value.dim(), value.is_floating_point())


class OpenAttention(GraphPass):
    """Put the operations in the place of the call; a call that it cannot follow stays whole."""

    def run(self, module: fx.GraphModule) -> bool:
        """Tell whether there was such a call."""
        graph = module.graph
        changed = False
        found = graph.find_nodes(op="call_function", target=F.multi_head_attention_forward)
        for node in found:
            try:
                inner, inputs = _trace(node)
            except (fx.proxy.TraceError, KeyError, TypeError, RuntimeError) as error:
                log.info("attention %s stays whole: %s", node.name, error)
                continue
            # Where the call stood in the model's code: blocks show it as their source.
            stack = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
            for made in inline(graph, node, inner, "", tuple(inputs), {}):
                made.meta = dict(stack)
            changed = True
        return changed


class _Tracer(fx.Tracer):
    """Answer what attention asks of symbolic values.

    Args:
        facts: rank and whether it is floating, of the inputs.
    """

    def __init__(self, facts: dict[fx.Node, tuple[int, bool]]) -> None:
        super().__init__()
        self.facts = facts

    def start(self, graph: fx.Graph) -> None:
        """Record into a graph, as ``trace`` would for a module."""
        self.graph = graph
        self.root = torch.nn.Module()

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer that shapes are as they should be, and ranks and dtypes as in the capture."""
        node = obj.node
        # Attention compares sizes with "!=" only to raise; the capture has passed those checks.
        if node.target is operator.ne:
            return False
        if node.target is torch.is_floating_point:
            return self.facts[node.args[0]][1]  # type: ignore[index]
        if node.target is operator.eq and isinstance(node.args[0], fx.Node):
            asked, wanted = node.args[0], node.args[1]
            if asked.target == "dim":
                return bool(self._rank(asked.args[0]) == wanted)
            if asked.target == "size" and wanted == 1:
                return bool(getattr(asked.args[0], "target", None) == "unsqueeze")
        return super().to_bool(obj)

    def _rank(self, node: Argument) -> int:
        """Return the rank of an input, or of what attention makes of one before it asks."""
        if node in self.facts:
            return self.facts[node][0]
        more = 1 if node.target == "unsqueeze" else 0
        if more or node.target in (torch.zeros_like, "masked_fill_"):
            return self._rank(node.args[0]) + more
        raise KeyError(f"the rank of {node}")


def _trace(node: fx.Node) -> tuple[fx.Graph, list[fx.Node]]:
    """Return the operations of a call as a graph, and its inputs in the placeholders' order."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    inputs = node.all_input_nodes
    if any(FACTS not in source.meta for source in inputs):
        raise KeyError("a tensor of unknown rank")
    graph = fx.Graph()
    tracer = _Tracer({})
    tracer.start(graph)
    values = {}
    for source in inputs:
        made = graph.placeholder(source.name)
        tracer.facts[made] = source.meta[FACTS]
        values[source] = fx.Proxy(made, tracer)
    given: dict[str, Argument] = dict(bound.arguments)
    arguments = {k: values[v] if isinstance(v, fx.Node) else v for k, v in given.items()}
    graph.output(tracer.create_arg(_ATTENTION(**arguments)))
    return graph, inputs
