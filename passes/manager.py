"""Run passes in order, and check the module after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from kfac_fx.errors import KFACError, PassError
from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.invariants import check_module

Pass = Callable[[fx.GraphModule], Any]
"""A pass returns a PassResult, a GraphModule, or None where it changes the one given."""


class PassReport(NamedTuple):
    """A callback's report of a pass that has run.

    Attributes:
        name: the class or function name of the pass.
        seconds: the time that it took, checks left out.
        modified: whether it said that it changed a graph.
        module: the module that it returned.
    """

    name: str
    seconds: float
    modified: bool
    module: fx.GraphModule

    def __str__(self) -> str:
        nodes = sum(len(graph.nodes) for graph in graphs_of(self.module))
        change = "changed" if self.modified else "unchanged"
        return f"{self.name}: {self.seconds * 1e3:.1f} ms, {change}, {nodes} nodes"


class PassManager:
    """Run passes of this library and of others, one after the other.

    After each the graphs are linted, taps must fit their buffers, and a pass that says that it
    changed nothing must not have.

    Args:
        passes: callables that take a GraphModule and return a PassResult, a GraphModule, or None
            where they change the one given (torch's PassBase, or plain functions).
        on_pass: called with a PassReport after each; ``print`` shows them.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        on_pass: Callable[[PassReport], object] | None = None,
    ) -> None:
        self.passes = list(passes)
        self.on_pass = on_pass

    def __call__(self, module: fx.GraphModule) -> PassResult:
        """Run all passes.

        Args:
            module: is given to the first; each gets what the one before returned.

        Returns:
            The module that the last pass returned, and whether any pass changed a graph.

        Raises:
            PassError: a pass failed, or left the module in disorder; names the pass. Errors of this
                library that a pass raises come as they are, with ``pass_name`` set.
        """
        changed = False
        for one in self.passes:
            name = getattr(one, "__name__", type(one).__name__)
            module, modified = self._run(one, name, module)
            changed |= modified
        return PassResult(module, changed)

    def _run(self, one: Pass, name: str, module: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
        """Run one pass and the checks, and return its module and whether it changed a graph."""
        # Node objects are compared, not only their texts: a pass that replaces a node by an equal
        # one has changed the graph for all who hold on to the node.
        before = _snapshot(module)
        start = time.perf_counter()
        try:
            result, modified = _result(one(module), module)
        except KFACError as error:
            error.pass_name = name
            raise
        except Exception as error:  # any code of others may run here
            raise _failed(name, f"failed: {error}") from error
        seconds = time.perf_counter() - start
        if not modified and (result is not module or _snapshot(result) != before):
            raise _failed(name, "said that it changed nothing, but the graph is another")
        try:
            check_module(result)
        except Exception as error:  # lint raises many kinds
            raise _failed(name, f"left a graph in disorder: {error}") from error
        if self.on_pass is not None:
            self.on_pass(PassReport(name, seconds, modified, result))
        return result, modified


def _failed(name: str, what: str) -> PassError:
    error = PassError(f"pass {name} {what}")
    error.pass_name = name
    return error


def _result(given: object, module: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    """Return what a pass returned as a module and a flag."""
    if given is None:
        return module, True
    if isinstance(given, fx.GraphModule):
        return given, True
    if hasattr(given, "graph_module") and hasattr(given, "modified"):
        return given.graph_module, bool(given.modified)
    raise TypeError(f"it returned {type(given).__name__}, not a PassResult or GraphModule")


def _snapshot(module: fx.GraphModule) -> list[tuple[object, ...]]:
    """Return the graphs as lists that are equal while nothing changes."""
    return [
        (node, node.name, node.op, node.target, node.args, node.kwargs)
        for graph in graphs_of(module)
        for node in graph.nodes
    ]
