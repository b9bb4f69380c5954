"""Builds a program as an fx graph whose generated code reads like text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from torch import fx, nn

from kfac_fx.codegen.leaf import own_functions

if TYPE_CHECKING:
    from kfac_fx.codegen.leaf import Value

V = TypeVar("V")


def _operation(target: object) -> str:
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return str(name).strip("_").removeprefix("linalg_")


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Names every node after its operation and the section that it belongs to.

    fx numbers nodes otherwise, and a program of forty layers is not read by numbers.
    """

    suffix = ""

    def create_node(
        self,
        kind: str,
        target: fx.node.Target,
        args: tuple[fx.node.Argument, ...],
        kwargs: dict[str, fx.node.Argument],
        name: str | None = None,
        type_expr: object = None,
    ) -> fx.Node:
        if name is None and self.suffix:
            name = f"{_operation(target)}_{self.suffix}"
        return super().create_node(kind, target, args, kwargs, name, type_expr)


class ProgramBuilder:
    """A graph under construction; values are ``fx.Proxy`` objects that torch functions accept.

    Attributes:
        graph: what has been emitted.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._tracer = _Tracer(self.graph)
        self._inputs: set[str] = set()

    def input(self, name: str) -> Value:
        """Return a new argument of the program, under a name that is like ``name``.

        Names of parameters have dots, and two may become the same identifier: the later one gets
        underscores. So arguments are told by their places, not by their names.
        """
        name = re.sub(r"\W", "_", name)
        while name in self._inputs:
            name += "_"
        self._inputs.add(name)
        node = self.graph.create_node("placeholder", name, name=name)
        return fx.Proxy(node, self._tracer)

    def name(self, value: V, name: str) -> V:
        """Give the node of ``value`` a name of its own, and return the value."""
        node: fx.Node = value.node  # type: ignore[attr-defined]
        node._rename(name)
        return value

    @contextmanager
    def section(self, suffix: str, comment: str) -> Iterator[None]:
        """Let nodes made inside carry a suffix, with a comment above the first of them.

        Args:
            suffix: at the end of their names; a block's slot.
            comment: what the section computes.
        """
        # fx keeps no comments: they stand in the meta of the first node until ``source``.
        before = len(self.graph.nodes)
        self._tracer.suffix = suffix
        yield
        self._tracer.suffix = ""
        nodes = list(self.graph.nodes)[before:]
        if nodes:
            nodes[0].meta["comment"] = comment

    def finish(self, outputs: Mapping[str, Value], class_name: str) -> fx.GraphModule:
        """Return the module that computes ``outputs`` as a dict by name."""
        self.graph.output({name: value.node for name, value in outputs.items()})
        own = {_operation(node.target) for node in self.graph.nodes if node.op == "call_function"}
        for node in self.graph.nodes:  # a value must not hide a function that is called by name
            if node.name in own and node.op != "placeholder":
                node._rename(f"{node.name}_value")
        self.graph.lint()
        return fx.GraphModule(nn.Module(), self.graph, class_name)


def source(module: fx.GraphModule, name: str) -> str:
    """Return the code of a program as a function called ``name``, with its sections' comments.

    fx writes a method that frees values line by line and calls functions by long names; people
    need neither.
    """
    comments = {
        node.name: node.meta["comment"] for node in module.graph.nodes if "comment" in node.meta
    }
    # fx writes a.b.c as a_b_c: only the function itself tells where its own name begins.
    short_names = {
        f"{function.__module__}_{function.__name__}".replace(".", "_"): function.__name__
        for function in own_functions(module.graph)
    }
    lines: list[str] = []
    # Text is edited line by line, as fx writes one statement a line and has no hook for more.
    for line in module.code.strip().splitlines():
        line = re.sub(r";\s+[\w\s=]+ = None$", "", line)
        line = re.sub(r"\bkfac_fx_linalg_\w+(?=\()", lambda found: short_names[found[0]], line)
        target = line.strip().split(" = ", 1)[0].split(" :", 1)[0]
        if target in comments:
            lines += ["", f"    # {comments[target]}"]
        lines.append(line)
    text = "\n".join(line for line in lines if line.strip() or line == "")
    return re.sub(r"^def forward\(self(, )?", f"def {name}(", text) + "\n"
