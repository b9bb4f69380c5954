"""Let graphs that get parameters as inputs read them from the module instead, and back.

Exported programs and graphs of Dynamo take every parameter as an input. The passes know parameters
by ``get_attr`` nodes with a path, so the inputs are read for the passes and taken again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def read_members(graph: fx.Graph, paths: Mapping[str, str]) -> None:
    """Let a graph read members of its module that it gets as inputs; the inputs stay, unused.

    Args:
        graph: is changed in place.
        paths: names of placeholders -> paths of what they stand for.
    """
    inputs = placeholders(graph)
    for node in inputs:
        path = paths.get(node.name)
        if path is not None and node.users:
            with graph.inserting_after(inputs[-1]):
                read = graph.create_node("get_attr", path, name=f"{node.name}_read")
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)


def take_inputs(graph: fx.Graph, inputs: Mapping[str, fx.Node]) -> None:
    """Let members that a graph reads come from its inputs: the inverse of ``read_members``.

    Args:
        graph: is changed in place.
        inputs: paths -> placeholders.
    """
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in inputs:
            node.replace_all_uses_with(inputs[str(node.target)])
            graph.erase_node(node)


def reads_below(graph: fx.Graph, prefix: str) -> Iterable[str]:
    """Return the paths of the members below ``prefix`` that a graph reads, each once."""
    targets = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return dict.fromkeys(target for target in targets if target.startswith(prefix + "."))
