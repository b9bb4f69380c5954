"""Graphs that torch.compile captures, and the tensors of models that runs bind to their inputs.

Dynamo gives a graph the parameters as inputs, and runs one graph for all modules that look alike
(layers of one class): which parameters a graph uses is known when it runs.
"""

from __future__ import annotations

import copy
import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import CompileContext

_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_STATE = re.compile(r"\._(?:parameters|buffers)\['[^']+'\]$")
_SIZE = re.compile(r"(.+)\.size\(\)\[(\d+)\]")

_graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
_serial = itertools.count()


class Watcher:
    """Is told of graphs that run with a model's tensors for the first time."""

    def met(self, binding: Binding) -> None:
        """Looks whether the tensors are its model's."""
        raise NotImplementedError


class CompiledGraph:
    """A captured graph: what Dynamo calls in its place.

    Args:
        module: as Dynamo hands it to a backend; it is copied.
        compiled: what the inner backend made of it.
        owner: the backend, with its options.

    Attributes:
        frame: number of the Python frame that was compiled, the same for all its recompilations.
        graph: a copy, with the inputs of its node in ``sources`` by name.
        with_gradients: whether it was captured for runs with gradients.
    """

    def __init__(self, module: fx.GraphModule, compiled: Callable[..., Any], owner: Any) -> None:
        self.owner, self.compiled = owner, compiled
        self.with_gradients = torch.is_grad_enabled()
        compile_id = CompileContext.current_compile_id()
        self.frame = None if compile_id is None else compile_id.frame_id
        self.sources = {node.name: _source(node) for node in _inputs(module.graph)}
        self.module = fx.GraphModule(module, copy.deepcopy(module.graph))
        for node in self.module.graph.nodes:  # fake tensors of a capture that is over
            node.meta.pop("example_value", None)
            node.meta.pop("grapharg", None)
        names = list(self.sources)
        self.places = [i for i, name in enumerate(names) if _STATE.search(self.sources[name])]
        self.bindings: dict[tuple[int, ...], Binding] = {}
        _graphs.add(self)

    @property
    def is_dynamic(self) -> bool:
        """Whether some sizes of its inputs are open."""
        return any(_SIZE.fullmatch(source) for source in self.sources.values())

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph: the form that records, while statistics are asked for."""
        key = tuple(id(inputs[place]) for place in self.places)
        binding = self.bindings.get(key)
        if binding is None:
            binding = self.bindings[key] = Binding(self, key, [inputs[p] for p in self.places])
            for watcher in list(_watchers):
                watcher.met(binding)
        run = self.compiled if binding.recorded is None else binding.recorded
        return run(*inputs)


class Binding:
    """A graph with one set of tensors.

    Attributes:
        paths: where each input is a tensor of the module whose code was compiled, its name there.
        recorded: what runs instead of the compiled graph, once there are taps.
    """

    def __init__(self, graph: CompiledGraph, key: tuple[int, ...], tensors: list[Tensor]) -> None:
        self._graph = weakref.ref(graph)
        self.serial = next(_serial)
        self.group = (graph.frame, key)
        self.recorded: Callable[..., Any] | None = None

        def forget(_: Any) -> None:
            held = self._graph()
            if held is not None:
                held.bindings.pop(key, None)

        self._tensors = [weakref.ref(tensor, forget) for tensor in tensors]

    @property
    def graph(self) -> CompiledGraph:
        """The graph; it lives as long as Dynamo keeps it."""
        graph = self._graph()
        assert graph is not None
        return graph

    def names(self, model: nn.Module) -> dict[str, str]:
        """Input -> name in the model, for those that are its parameters and buffers."""
        state = itertools.chain(model.named_parameters(), model.named_buffers())
        known = {id(tensor): name for name, tensor in state}
        inputs = list(self.graph.sources)
        places = zip(self.graph.places, self._tensors, strict=True)
        bound = {inputs[place]: known.get(id(tensor())) for place, tensor in places}
        return {name: path for name, path in bound.items() if path is not None}

    def in_model_itself(self, names: dict[str, str]) -> bool:
        """Whether the compiled code is the model's own ``forward``, which runs once a pass.

        Code of a submodule may run several times, with the same tensors too.
        """
        sources = self.graph.sources
        return all(".".join(_MEMBER.findall(sources[n])) == path for n, path in names.items())


def bindings_of(model: nn.Module) -> list[Binding]:
    """All that have run with tensors of the model, in the order of their first run."""
    found = [b for graph in list(_graphs) for b in graph.bindings.values() if b.names(model)]
    return sorted(found, key=lambda binding: binding.serial)


def watch(watcher: Watcher) -> None:
    """Lets ``watcher`` know of new bindings while it is alive."""
    _watchers.add(watcher)


def sizes_from_inputs(graph: fx.Graph, sources: dict[str, str]) -> None:
    """Sizes that Dynamo hands over as inputs are read from the tensors instead; the inputs stay.

    Args:
        sources: Dynamo's expression for each input, by its name.
    """
    inputs = _inputs(graph)
    by_source = dict(zip(sources.values(), inputs, strict=True))
    for source, node in by_source.items():
        match = _SIZE.fullmatch(source)
        tensor = by_source.get(match[1]) if match else None
        if match is not None and tensor is not None and node.users:
            with graph.inserting_after(inputs[-1]):
                size = graph.call_function(torch.ops.aten.sym_size.int, (tensor, int(match[2])))
            node.replace_all_uses_with(size)


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _source(node: fx.Node) -> str:
    """Where Dynamo took an input from, as a Python expression."""
    argument = node.meta.get("grapharg")
    return str(getattr(getattr(argument, "source", None), "name", ""))
