"""F.multi_head_attention_forward, which Dynamo keeps whole, as the operations that it consists of.

torch's own code runs on symbolic values; what it asks of shapes was checked when the call was
captured, and ranks and dtypes are known from there.
"""

from __future__ import annotations

import inspect
import logging
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kfac_fx.passes.base import GraphPass
from kfac_fx.passes.inline_calls import inline
from kfac_fx.torch_internals.rebuilt_functions import traceable_attention

log = logging.getLogger("kfac_fx")

FACTS = "kfac_fx_facts"
"""Key of (rank, whether floating) in the meta of a node that attention reads."""

_ATTENTION = traceable_attention()


def note_facts(graph: fx.Graph, key: str) -> None:
    """Writes down what is known of the tensors that attention reads.

    Args:
        key: of their values in the meta of nodes.
    """
    for node in graph.find_nodes(op="call_function", target=F.multi_head_attention_forward):
        for source in node.all_input_nodes:
            value = source.meta.get(key)
            if isinstance(value, Tensor):
                source.meta[FACTS] = (value.dim(), value.is_floating_point())


class OpenAttention(GraphPass):
    """Puts the operations in the place of the call; a call that it cannot follow stays."""

    def run(self, module: fx.GraphModule) -> bool:
        """Whether there was such a call."""
        graph, changed = module.graph, False
        found = graph.find_nodes(op="call_function", target=F.multi_head_attention_forward)
        for node in found:
            try:
                inner, inputs = _trace(node)
            except (fx.proxy.TraceError, KeyError, TypeError, RuntimeError) as error:
                log.info("attention %s stays whole: %s", node.name, error)
                continue
            stack = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
            for made in inline(graph, node, inner, "", tuple(inputs), {}):
                made.meta = dict(stack)
            changed = True
        return changed


class _Tracer(fx.Tracer):
    """Knows the answers to what attention asks."""

    def __init__(self, facts: dict[fx.Node, tuple[int, bool]]) -> None:
        super().__init__()
        self.facts = facts

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Shapes are as they should be; ranks and dtypes are those of the capture."""
        node = obj.node
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

    def _rank(self, node: Any) -> int:
        if node in self.facts:
            return self.facts[node][0]
        more = 1 if node.target == "unsqueeze" else 0
        if more or node.target in (torch.zeros_like, "masked_fill_"):
            return self._rank(node.args[0]) + more
        raise KeyError(f"the rank of {node}")


def _trace(node: fx.Node) -> tuple[fx.Graph, list[fx.Node]]:
    """The operations of a call as a graph, and its inputs in the order of the placeholders."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    inputs = node.all_input_nodes
    if any(FACTS not in source.meta for source in inputs):
        raise KeyError("a tensor of unknown rank")
    graph = fx.Graph()
    tracer = _Tracer({})
    tracer.graph, tracer.root = graph, torch.nn.Module()
    values = {}
    for source in inputs:
        made = graph.placeholder(source.name)
        tracer.facts[made] = source.meta[FACTS]
        values[source] = fx.Proxy(made, tracer)
    given: dict[str, Any] = dict(bound.arguments)
    arguments = {k: values[v] if isinstance(v, fx.Node) else v for k, v in given.items()}
    graph.output(tracer.create_arg(_ATTENTION(**arguments)))
    return graph, inputs
