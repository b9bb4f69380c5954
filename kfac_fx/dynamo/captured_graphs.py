"""Graphs that torch.compile captures, and the tensors of models that runs bind to their inputs.

Dynamo gives a graph the parameters as inputs, and runs one graph for all modules that look alike
(layers of one class): which parameters a graph uses is known when it runs.
"""

from __future__ import annotations

import copy
import itertools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_fx.passes.graph_inputs import placeholders
from kfac_fx.passes.options import TransformOptions
from kfac_fx.torch_internals.dynamo_frames import (
    Compiler,
    find_backend,
    frame_being_compiled,
    input_source,
)

Value = Any
"""An input or output of a compiled graph: a tensor, a size or None."""

Group = tuple[int | None, tuple[int, ...]]
"""A Python frame, and the identities of the tensors that it runs with."""

# Dynamo says where an input came from as the text of an expression, and in no other way. All that
# reads such a text is here: members of modules, tensors of their state, and sizes.
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_STATE = re.compile(r"\._(?:parameters|buffers)\['[^']+'\]$")
_SIZE = re.compile(r"(.+)\.size\(\)\[(\d+)\]")

# A backend gets graphs without a word about the model that they belong to. So all of the process
# are listed, weakly, and a model finds its own by the tensors that they have run with.
_graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_listeners: list[weakref.WeakMethod[Callable[[Binding], None]]] = []
_serial = itertools.count()


@dataclass(frozen=True)
class BackendSettings:
    """The options of a backend, the same for all models and graphs that it compiles.

    Attributes:
        inner: name or function of the backend that compiles the graphs.
        on_graph: is called with each instrumented GraphModule; None for nothing.
        options: which blocks the parameters get.
    """

    inner: str | Compiler = "inductor"
    on_graph: Callable[[fx.GraphModule], object] | None = None
    options: TransformOptions = field(default_factory=TransformOptions)

    def compile(self, module: fx.GraphModule, inputs: Sequence[Value]) -> Callable[..., Value]:
        """Return what the inner backend makes of a graph."""
        inner = find_backend(self.inner) if isinstance(self.inner, str) else self.inner
        compiled: Callable[..., Value] = inner(module, list(inputs))
        return compiled


class CompiledGraph:
    """A captured graph: what Dynamo calls in its place.

    Args:
        module: the module as Dynamo hands it to a backend; it is copied before the inner backend
            changes it.
        inputs: example inputs, as Dynamo hands them over.
        settings: those of the backend.

    Attributes:
        compiled: what the inner backend made of the graph.
        frame: number of the Python frame that was compiled, the same for all its recompilations.
        module: the copy; the inputs of its graph are in ``sources`` by name.
        sources: Dynamo's Python expression for each input.
        places: indices of the inputs that are parameters or buffers of a module.
        with_gradients: whether it was captured for runs with gradients.
        bindings: what runs with other tensors know of the graph, by the tensors' identities.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Value], settings: BackendSettings
    ) -> None:
        self.settings = settings
        self.with_gradients = torch.is_grad_enabled()
        self.frame = frame_being_compiled()
        self.sources = {node.name: input_source(node) for node in placeholders(module.graph)}
        self.module = fx.GraphModule(module, copy.deepcopy(module.graph))
        for node in self.module.graph.nodes:  # fake tensors of a capture that is over
            node.meta.pop("example_value", None)
            node.meta.pop("grapharg", None)
        names = list(self.sources)
        self.places = [i for i, name in enumerate(names) if _STATE.search(self.sources[name])]
        self.bindings: dict[tuple[int, ...], Binding] = {}
        self.compiled = settings.compile(module, inputs)
        _graphs.add(self)

    @property
    def is_dynamic(self) -> bool:
        """Tell whether some sizes of its inputs are open."""
        return any(_SIZE.fullmatch(source) for source in self.sources.values())

    def __call__(self, *inputs: Value) -> Value:
        """Run the graph: the form that records, while statistics are asked for."""
        # This runs at every call of a compiled graph: identities of the parameters, and no names.
        key = tuple(id(inputs[place]) for place in self.places)
        binding = self.bindings.get(key)
        if binding is None:
            binding = self.bindings[key] = Binding(self, key, [inputs[p] for p in self.places])
            _tell_listeners(binding)
        run = self.compiled if binding.recorded is None else binding.recorded
        return run(*inputs)


class Binding:
    """A graph with one set of tensors.

    The tensors are known by their identities and held weakly: a binding must neither keep a model
    alive nor be found for another tensor that gets a freed one's address.

    Args:
        graph: the captured graph.
        key: identities of the tensors.
        tensors: those that the graph got at its places.

    Attributes:
        serial: a number that grows with every binding, for the order of first runs.
        group: the same for all recompilations of a frame with these tensors.
        recorded: what runs instead of the compiled graph, once there are taps.
    """

    def __init__(self, graph: CompiledGraph, key: tuple[int, ...], tensors: list[Tensor]) -> None:
        self._graph = weakref.ref(graph)
        self.serial = next(_serial)
        self.group: Group = (graph.frame, key)
        self.recorded: Callable[..., Value] | None = None

        def forget(_: object) -> None:
            held = self._graph()
            if held is not None:
                held.bindings.pop(key, None)

        self._tensors = [weakref.ref(tensor, forget) for tensor in tensors]

    @property
    def graph(self) -> CompiledGraph:
        """Return the graph; it lives as long as Dynamo keeps it."""
        graph = self._graph()
        assert graph is not None
        return graph

    def record_with(self, run: Callable[..., Value]) -> None:
        """Let ``run`` take the place of the compiled graph for these tensors."""
        self.recorded = run

    def names(self, model: nn.Module) -> dict[str, str]:
        """Return input -> name in the model, for those that are its parameters and buffers."""
        state = itertools.chain(model.named_parameters(), model.named_buffers())
        known = {id(tensor): name for name, tensor in state}
        inputs = list(self.graph.sources)
        places = zip(self.graph.places, self._tensors, strict=True)
        bound = {inputs[place]: known.get(id(tensor())) for place, tensor in places}
        return {name: path for name, path in bound.items() if path is not None}

    def in_model_itself(self, names: Mapping[str, str]) -> bool:
        """Tell whether the compiled code is the model's own ``forward``, which runs once a pass.

        Code of a submodule may run several times, with the same tensors too.

        Args:
            names: those of ``self.names(model)``.
        """
        sources = self.graph.sources
        return all(".".join(_MEMBER.findall(sources[n])) == path for n, path in names.items())


def bindings_of(model: nn.Module) -> list[Binding]:
    """Return all that have run with tensors of the model, in the order of their first run."""
    found = [b for graph in list(_graphs) for b in graph.bindings.values() if b.names(model)]
    return sorted(found, key=lambda binding: binding.serial)


def call_for_new_bindings(listener: Callable[[Binding], None]) -> None:
    """Call a method with every graph that runs with new tensors, while its object is alive.

    Args:
        listener: a bound method; it is held weakly, so that a model that is gone hears no more.
    """
    _listeners.append(weakref.WeakMethod(listener))


def _tell_listeners(binding: Binding) -> None:
    for reference in list(_listeners):
        listener = reference()
        if listener is None:
            _listeners.remove(reference)
        else:
            listener(binding)


def sizes_from_inputs(graph: fx.Graph, sources: Mapping[str, str]) -> None:
    """Read sizes that Dynamo hands over as inputs from the tensors instead; the inputs stay.

    The analyses know a batch by the first size of a tensor, and an input of its own would hide it.

    Args:
        graph: is changed in place.
        sources: Dynamo's expression for each input, by its name.
    """
    inputs = placeholders(graph)
    by_source = dict(zip(sources.values(), inputs, strict=True))
    for source, node in by_source.items():
        match = _SIZE.fullmatch(source)
        tensor = by_source.get(match[1]) if match else None
        if match is not None and tensor is not None and node.users:
            with graph.inserting_after(inputs[-1]):
                size = graph.call_function(torch.ops.aten.sym_size.int, (tensor, int(match[2])))
            node.replace_all_uses_with(size)
