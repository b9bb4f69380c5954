"""Training and evaluation: flags that a capture froze are read from the modules again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


@contextmanager
def all_in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every submodule in one mode; each one's own mode comes back afterwards."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def capture_both(
    model: nn.Module, capture: Callable[[nn.Module], fx.Graph]
) -> tuple[fx.Graph, fx.Graph | None]:
    """One graph that follows train() and eval(), or one for each mode where they differ."""
    with all_in_mode(model, True):
        training = capture(model)
    with all_in_mode(model, False):
        evaluation = capture(model)
    flags = _differing_flags(training, evaluation)
    if flags is None:
        return training, evaluation
    for node, key in flags:
        _read_flag(training, node, key)
    return training, None


def _differing_flags(
    training: fx.Graph, evaluation: fx.Graph
) -> list[tuple[fx.Node, int | str]] | None:
    """Arguments that are True in one graph and False in the other; None for other differences."""
    if len(training.nodes) != len(evaluation.nodes):
        return None
    matching: dict[Any, Any] = {}
    flags: list[tuple[fx.Node, int | str]] = []
    for here, there in zip(training.nodes, evaluation.nodes, strict=True):
        matching[there] = here
        if (here.op, here.target) != (there.op, there.target):
            return None
        if len(here.args) != len(there.args) or here.kwargs.keys() != there.kwargs.keys():
            return None
        mapped = [fx.node.map_arg(arg, matching.__getitem__) for arg in there.args]
        named = {k: fx.node.map_arg(arg, matching.__getitem__) for k, arg in there.kwargs.items()}
        pairs: list[tuple[int | str, Any, Any]] = [
            *((i, a, b) for i, (a, b) in enumerate(zip(here.args, mapped, strict=True))),
            *((k, here.kwargs[k], named[k]) for k in here.kwargs),
        ]
        for key, a, b in pairs:
            if a is True and b is False:
                flags.append((here, key))
            elif type(a) is not type(b) or a != b:
                return None
    return flags


def _read_flag(graph: fx.Graph, node: fx.Node, key: int | str) -> None:
    """Replaces a frozen flag by the ``training`` attribute of the module whose code made it."""
    stack = node.meta.get("nn_module_stack") or {}
    owners = [entry[0] for entry in stack.values()]
    owner = owners[-1] if owners else ""
    path = f"{owner}.training" if owner else "training"
    with graph.inserting_before(node):
        flag = graph.create_node("get_attr", path, name="training")
    if isinstance(key, int):
        node.update_arg(key, flag)
    else:
        node.update_kwarg(key, flag)
