"""Tell whether a model that has changed would be captured as the graph that there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.changes import Change
from kfac_fx.capture.layer_calls import ModuleCall, translate
from kfac_fx.capture.train_and_eval import Graphs
from kfac_fx.errors import CaptureError

Value = Any
"""An argument of a node, or what a module holds under a name."""


class _Flag(NamedTuple):
    """Stands for the flag of a module that a graph reads as it runs."""

    path: str


class _Step(NamedTuple):
    """One node, with the numbers of nodes in place of the nodes."""

    op: str
    target: Value
    args: Value
    kwargs: Value
    constant: Value


def digest(graph: fx.Graph, constants: Mapping[str, Tensor]) -> list[_Step]:
    """Return a graph as values that can be compared after its nodes are gone.

    Args:
        graph: a captured graph, without taps.
        constants: what it reads and the model lacks, by name.
    """
    found: list[_Step] = []
    names: dict[fx.Node, Value] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" and target.split(".")[-1] == "training":
            names[node] = _Flag(target.rpartition(".")[0])
            continue
        names[node] = ("node", len(found))
        # The name of a constant depends on what was traced before. What the model holds itself is
        # read as the graph runs.
        constant = constants.get(target) if node.op == "get_attr" else None
        if constant is not None:
            target = ""
        elif node.op == "call_function":
            target = node.target
        args = _named(node.args, names)
        found.append(_Step(node.op, target, args, _named(node.kwargs, names), constant))
    return found


def _named(value: Value, names: dict[fx.Node, Value]) -> Value:
    """Return an argument with other values in the place of nodes."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, slice):
        return ("slice", *(_named(v, names) for v in (value.start, value.stop, value.step)))
    if isinstance(value, (tuple, list)):
        return [_named(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _named(item, names) for key, item in value.items()}
    return value


def _with_flags(value: Value, flags: dict[str, bool]) -> Value:
    """Return an argument with the present flags of modules."""
    if isinstance(value, _Flag):
        return flags.get(value.path)
    if isinstance(value, list):
        return [_with_flags(item, flags) for item in value]
    if isinstance(value, dict):
        return {key: _with_flags(item, flags) for key, item in value.items()}
    return value


def _equal(one: Sequence[_Step], other: Sequence[_Step], flags: dict[str, bool]) -> bool:
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if (a.op, a.target) != (b.op, b.target) or not _same(a.constant, b.constant):
            return False
        for here, there in ((a.args, b.args), (a.kwargs, b.kwargs)):
            if not _same(_with_flags(here, flags), _with_flags(there, flags)):
                return False
    return True


def _same(one: Value, other: Value) -> bool:
    """Tell whether two arguments or constants are equal, True and 1 apart."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one is other:
            return True
        alike = one.dtype == other.dtype and one.device == other.device
        return alike and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


class Tracer(Protocol):
    """Knows how a model was traced; ``kfac_fx.eager.guarded`` has it."""

    @property
    def live(self) -> frozenset[str]:
        """Return the paths of the layers that the graphs call as they are."""

    def again(self, model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
        """Return the graph of a model in its present mode, and the constants that it reads."""


class TracedAgain:
    """Trace a model again in its present state, and compare with its graphs.

    Args:
        model: the user's model.
        graphs: the captures.
        constants: what they read and the model lacks, by name.
        tracer: traces it again.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: Graphs,
        constants: Mapping[str, Tensor],
        tracer: Tracer,
    ) -> None:
        self._model = model
        self._tracer = tracer
        self._live = tracer.live
        training, evaluation, _ = graphs
        first = digest(training, constants)
        self._digests = {True: first, False: digest(evaluation, constants) if evaluation else first}
        self._layers = self._translated()

    def holds(self, changes: Sequence[Change], training: bool) -> bool:
        """Tell whether the model is traced as before, and its layers are what taps expect."""
        if self._translated() != self._layers:
            return False
        # What a layer holds that is called as it is, the graph reads as it runs.
        if all(change.place.module in self._live for change in changes):
            return True
        try:
            graph, constants = self._tracer.again(self._model)
        except CaptureError:
            return False
        flags = {path: module.training for path, module in self._model.named_modules()}
        return _equal(self._digests[training], digest(graph, constants), flags)

    def of_copy(self, model: nn.Module) -> TracedAgain:
        """Return the same for a copy of the model."""
        copied = object.__new__(TracedAgain)
        copied.__dict__.update(self.__dict__)
        copied._model = model
        return copied

    def _translated(self) -> dict[str, ModuleCall | None]:
        """Return which operation each layer runs that a graph calls as it is."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        return {p: translate(modules[p], p) if p in modules else None for p in self._live}


class ExportedOnce:
    """Know of an exported graph which changes it follows; to export again would take seconds.

    Args:
        model: the user's model.
        graphs: the captures.
        constants: whether the graphs hold tensors of their own.
    """

    def __init__(self, model: nn.Module, graphs: Graphs, *, constants: bool) -> None:
        self._model = model
        training, evaluation, untraced = graphs
        # The graph of one mode has its flags as constants.
        one = evaluation is None and not untraced
        self._follows_flags = one and all(map(self._owns_flag, _flags(training)))
        captured = [graph for graph in (training, evaluation) if graph is not None]
        self._fixes_dtypes = constants or any(map(_names_dtype, captured))

    def holds(self, changes: Sequence[Change], training: bool) -> bool:
        """Tell whether only flags or dtypes differ, and the graph reads these as it runs."""
        followed = {"training": self._follows_flags, "tensors": not self._fixes_dtypes}
        return all(followed.get(change.key, False) for change in changes)

    def of_copy(self, model: nn.Module) -> ExportedOnce:
        """Return the same for a copy of the model."""
        copied = object.__new__(ExportedOnce)
        copied.__dict__.update(self.__dict__)
        copied._model = model
        return copied

    def _owns_flag(self, path: str) -> bool:
        """Tell whether the flag at a path is surely the one that the code reads.

        A layer of torch.nn reads its own. A user's module may read that of a child, or be handed
        the one of its parent, and the graph would look the same.
        """
        return type(self._model.get_submodule(path)).__module__.startswith("torch.nn.modules.")


def _flags(graph: fx.Graph) -> list[str]:
    """Return the paths of the modules whose flags a graph reads."""
    reads = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    return [path.rpartition(".")[0] for path in reads if path.split(".")[-1] == "training"]


def _names_dtype(graph: fx.Graph) -> bool:
    """Tell whether a dtype or a device is written into a graph."""
    settings = (torch.dtype, torch.device)
    for node in graph.nodes:
        if any(isinstance(a, settings) for a in (*node.args, *node.kwargs.values())):
            return True
    return False


def called_as_they_are(model: nn.Module, *graphs: fx.Graph | None) -> frozenset[str]:
    """Return the paths of modules that graphs call, and of those inside them.

    Args:
        model: the user's model.
        graphs: its captures.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[str] = set()
    for graph in graphs:
        for node in graph.nodes if graph is not None else ():
            called = modules.get(str(node.target)) if node.op == "call_module" else None
            # A GraphModule is inlined by a pass, and a checkpoint is looked through.
            if called is None or isinstance(called, fx.GraphModule):
                continue
            if not type(called).__module__.startswith(("torch.nn.", "torch.jit.")):
                continue
            for path, _ in called.named_modules(remove_duplicate=False):
                found.add(f"{node.target}.{path}".strip("."))
    return frozenset(found)
