"""Graphs that get parameters as inputs (exported programs, Dynamo's): read instead, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def read_members(graph: fx.Graph, paths: Mapping[str, str]) -> None:
    """Lets a graph read members of its module that it gets as inputs; the inputs stay, unused.

    Args:
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
    """The inverse: members that a graph reads come from its inputs.

    Args:
        inputs: paths -> placeholders.
    """
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in inputs:
            node.replace_all_uses_with(inputs[str(node.target)])
            graph.erase_node(node)


def reads_below(graph: fx.Graph, prefix: str) -> Iterable[str]:
    """Paths of the members below ``prefix`` that a graph reads, each once."""
    targets = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return dict.fromkeys(target for target in targets if target.startswith(prefix + "."))
