"""A captured model: a GraphModule that shares the model's own submodules and parameters."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from kfac_fx.capture.guard import Guard, guarded
from kfac_fx.capture.items import OURS, hand_on, is_handed_on
from kfac_fx.capture.member_names import sets_itself
from kfac_fx.capture.mode_regions import switches_modes
from kfac_fx.capture.shared_hooks import HOOKS, HookSharing, share_hooks
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.generated_forward import (
    SPECS,
    Forward,
    set_forward,
    with_renamed_specs,
)
from kfac_fx.torch_internals.modes import modes_put_back

if TYPE_CHECKING:
    from kfac_fx.capture.graph_view import GraphView
    from kfac_fx.ir.curvature_graph import CurvatureGraph
    from kfac_fx.ir.use import ParameterUse

    UsesOfCall = Callable[
        [GraphView, fx.Node, frozenset[str], frozenset[str]], list[ParameterUse] | None
    ]
    """From one call of a running model, the parameters that rules may claim, and the weights that
    have a block without their bias, to the uses in that call; None where no rule takes it."""


Value = Any
"""An input or output of the user's model, or what a module holds under a name."""


class CapturedModule(HookSharing, fx.GraphModule):
    """The model as a graph; a drop-in with the same Parameter objects and state_dict keys.

    The model's children are this module's children, so train(), eval(), to() and hooks reach them
    through either. A model whose Python code takes different paths in training and in evaluation
    keeps two graphs: ``graph`` and ``evaluation``.

    Attributes:
        evaluation: the graph of the evaluation where it differs from that of the training.
    """

    evaluation: fx.Graph | None

    runs_model: ClassVar[bool] = False
    """Whether ``forward`` runs the model's own Python code; ``graphs`` are then an example."""

    def recordable(self, uses: Sequence[ParameterUse], graph: fx.Graph) -> list[ParameterUse]:
        """Return the uses of a graph in the forms in which taps of this module can record them.

        In a graph every use can have its tap, so this returns them as they are.
        """
        return list(uses)

    def taps_inserted(self, uses_of_call: UsesOfCall) -> None:
        """Take note that the curvature graph is final and the factor buffers are there.

        Taps in a graph need no more; the model itself does where it runs in the graph's place.

        Args:
            uses_of_call: finds uses as the blocks of the curvature graph were found.
        """
        self.__dict__["_uses_of_call"] = uses_of_call

    @property
    def uses_of_call(self) -> UsesOfCall | None:
        """Return what ``taps_inserted`` was given, None before."""
        return self.__dict__.get("_uses_of_call")

    @property
    def source(self) -> nn.Module | None:
        """Return the user's model; None where there is only a graph of it."""
        held = self.__dict__.get("_held")
        return None if held is None else held[0]

    def watch(self, model: nn.Module, guard: Guard) -> None:
        """Run the graph from now on while the model is as it was captured.

        Args:
            model: the user's model; its members are this module's.
            guard: decides at every call.
        """
        # In a tuple it is no submodule: its parameters would appear twice in the state_dict.
        self.__dict__["_held"] = (model,)
        self.__dict__["_guard"] = guard
        # The very dictionaries of the model: a parameter or buffer that is set anew, by name or by
        # load_state_dict(assign=True), is so for both.
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]
        self.__dict__["_children"] = _children(self)
        hand_on(self, model)
        self.recompile()

    @property
    def untraced(self) -> str:
        """Return why there is no graph of the evaluation, "" where there is one."""
        guard: Guard | None = self.__dict__.get("_guard")
        return "" if guard is None else guard.untraced

    def stands(self) -> bool:
        """Tell whether a call would run the graph, and not the model itself, if the inputs fit."""
        guard: Guard | None = self.__dict__.get("_guard")
        return guard is None or guard.holds(self)

    def takes(self, *args: Value, **kwargs: Value) -> bool:
        """Tell whether the graph is for inputs of this form.

        Args:
            args: positional inputs.
            kwargs: keyword inputs.
        """
        guard: Guard | None = self.__dict__.get("_guard")
        return guard is None or guard.fits(args, kwargs, self.training)

    def members_hold(self) -> bool:
        """Tell whether no child was added, removed or replaced by way of this module."""
        known: dict[str, Value] = self.__dict__["_children"]
        return known == self._modules

    def follow_source(self) -> None:
        """Take over what was changed on the model, and hand on to it what was changed here.

        Children are kept in a dictionary of this module's own, as it has some that the model lacks.
        """
        model = self.source
        assert model is not None
        known = self.__dict__["_children"]
        own = {name: child for name, child in self._modules.items() if name.startswith(OURS)}
        before = {name: child for name, child in known.items() if name not in own}
        here = {name: child for name, child in self._modules.items() if name not in own}
        if here != before:
            model._modules.clear()
            model._modules.update(here)
        elif dict(model._modules) != before:
            self._modules.clear()
            self._modules.update({**model._modules, **own})
        self.__dict__["_children"] = _children(self)
        for name in self.__dict__.get("_copied", ()):
            if name in model.__dict__:
                self.__dict__[name] = model.__dict__[name]
        # Whoever says model.eval() means the model: its children have followed, and this must too.
        if model.training != self.training:
            self.training = model.training

    def train(self, mode: bool = True) -> CapturedModule:
        """Set the mode, by the model's own ``train`` where it has one (a norm that stays frozen).

        Args:
            mode: True for training, False for evaluation.
        """
        model = self.source
        if model is None:
            super().train(mode)
            return self
        for name, child in self._modules.items():
            if name.startswith(OURS) and child is not None:
                child.train(mode)
        model.train(mode)
        # A model may refuse a mode, or be of another than it is told.
        self.training = model.training
        return self

    def state_dict(self, *args: Value, **kwargs: Value) -> Value:
        """Return the model's own state: by its hooks, and by its class where that says how.

        Args:
            args: as those of ``torch.nn.Module.state_dict``.
            kwargs: likewise.
        """
        model = self.source
        state_dict = super().state_dict if model is None else model.state_dict
        return state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Value, **kwargs: Value) -> Value:
        """Load a state into the model, as the model does it.

        Args:
            args: as those of ``torch.nn.Module.load_state_dict``.
            kwargs: likewise.
        """
        model = self.source
        load = super().load_state_dict if model is None else model.load_state_dict
        return load(*args, **kwargs)

    def __setattr__(self, name: str, value: Value) -> None:
        """Set an attribute; one that the model has is set there, where its code reads it."""
        held = self.__dict__.get("_held")
        if held is not None and (isinstance(value, nn.Module) or name in held[0]._modules):
            setattr(held[0], name, value)
        read = is_handed_on(type(self), name)
        ours = name in self.__dict__ or hasattr(type(self), name)
        if held is not None and (read or (not ours and sets_itself(type(held[0]), name))):
            setattr(held[0], name, value)  # the model's code may keep another value
            return
        if held is None or name not in held[0].__dict__:
            super().__setattr__(name, value)
            return
        copied = name in self.__dict__.get("_copied", ())
        if copied or name not in self.__dict__:
            setattr(held[0], name, value)
        if copied or name in self.__dict__:
            super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child, here and to the model."""
        super().add_module(name, module)
        if not name.startswith(OURS) and self.source is not None:
            self.source.add_module(name, module)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute, here and on the model."""
        owner = self.source or self
        handed_on = owner is not self and (name in owner._modules or name in owner.__dict__)
        if handed_on:
            delattr(owner, name)
        if not handed_on or name in self._modules or name in self.__dict__:
            super().__delattr__(name)

    @property
    def curvature(self) -> CurvatureGraph:
        """Return blocks and coverage; they are there once the uses have been found."""
        found: CurvatureGraph = self.meta["kfac_fx"]
        return found

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """Return the training graph and, where it differs, the one for evaluation."""
        return (self.graph,) if self.evaluation is None else (self.graph, self.evaluation)

    def recompile(self) -> PythonCode:
        """Generate ``forward`` again after a change of a graph, and return the training code."""
        code = super().recompile()
        evaluation = self.__dict__.get("evaluation")
        forward = type(self).forward
        if evaluation is not None:
            evaluated = fx.GraphModule(self, evaluation)
            # The two graphs may take and return other structures, and the code of either reads them
            # from the module under the same names; the evaluation's get names of their own.
            for name in SPECS:
                self.__dict__[_EVALUATION + name] = evaluated.__dict__.get(name)
            evaluation.owning_module = self
            forward = _by_mode(forward, with_renamed_specs(type(evaluated).forward, _EVALUATION))
            set_forward(self, forward)
        if not self.runs_model and any(short.applies(self.graph) for short in _shortcuts):
            set_forward(self, _Shortened(self, forward, _shortcuts[0]).forward())
        if any(map(switches_modes, filter(None, (self.graph, evaluation)))):
            set_forward(self, modes_put_back(type(self).forward))
        guard: Guard | None = self.__dict__.get("_guard")
        if guard is not None:
            set_forward(self, guarded(type(self).forward))
        return code

    def __copy__(self) -> CapturedModule:
        # As copy.copy of any module: another object with the same members. The class holds the
        # code, and is shared.
        copied: CapturedModule = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        # fx copies parameters and submodules that the graph reads; the model's others, hooks and
        # non-persistent buffers are copied here, with the same memo, so that shared ones stay so.
        source = copy.deepcopy(self.source, memo)
        copied: CapturedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        adopt(copied, copy.deepcopy(_members(self), memo))
        for name in (*HOOKS, "_ddp_params_and_buffers_to_ignore"):
            if name in self.__dict__:
                copied.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        # fx has made buffers of the tensors among these.
        for name in self.__dict__.get("_copied", ()):
            copied._buffers.pop(name, None)
            copied.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
            copied.__dict__.setdefault("_copied", set()).add(name)
        copied.__dict__["evaluation"] = copy.deepcopy(self.evaluation, memo)
        copied.__dict__["_uses_of_call"] = self.uses_of_call
        copied.training = self.training
        if source is None:
            copied.recompile()
            return copied
        if self.shares_hooks():
            share_hooks(copied, source)
        copied.watch(source, self.__dict__["_guard"].of_copy(source, self.training))
        return copied

    def __reduce__(self) -> tuple[Value, ...]:
        raise CaptureError(
            f"{type(self).__name__} is a graph with taps and cannot be pickled: save state_dict(), "
            "or pickle the model, and transform again where it is loaded"
        )


CONSTANTS = f"{OURS}_constants"
"""Name of the submodule that holds what graphs read and the model lacks."""


def _children(module: nn.Module) -> dict[str, Value]:
    return dict(module._modules)


_EVALUATION = "_evaluation"
"""Prefix of the attributes in which the evaluation graph's code finds its input structures."""


def _by_mode(train: Forward, evaluate: Forward) -> Forward:
    """Return a ``forward`` that chooses by the module's flag, as ``if self.training`` would."""

    @functools.wraps(train)
    def forward(self: nn.Module, *args: Value, **kwargs: Value) -> Value:
        return (train if self.training else evaluate)(self, *args, **kwargs)

    return forward


# Graphs that may be run in a shorter form.


class Shortcut(Protocol):
    """Shorter forms of graphs, for passes in which what they leave out has no effect."""

    def applies(self, graph: fx.Graph) -> bool:
        """Say whether there is anything to leave out."""

    def shortened(self, graph: fx.Graph, module: fx.GraphModule, form: Hashable) -> fx.Graph:
        """Return a copy of a module's graph in a form that ``form`` returned."""

    def form(self, module: nn.Module) -> Hashable | None:
        """Return the form that the pass that begins can take; None for the whole graph."""


_shortcuts: list[Shortcut] = []


def register_shortcut(shortcut: Shortcut) -> None:
    """Let captured modules run shorter forms of their graphs from their next compilation on."""
    _shortcuts[:] = [shortcut]


class _Shortened:
    """All forms of a module's ``forward``; a short one is made when it is needed first.

    Args:
        module: whose graphs have just been compiled.
        whole: its ``forward``.
        shortcut: makes the short forms.
    """

    def __init__(self, module: CapturedModule, whole: Forward, shortcut: Shortcut) -> None:
        self._whole = whole
        self._shortcut = shortcut
        self._short: dict[Hashable, Forward] = {}
        # fx runs a graph as it was when it was compiled, whatever was done to it since. The short
        # forms are made later, so they have to notice a graph that is another one by then.
        self._sources = _sources(module)

    def forward(self) -> Forward:
        """Return a ``forward`` that takes a short form where it may."""
        whole = self._whole
        form_of = self._shortcut.form

        @functools.wraps(whole)
        def forward(self_: nn.Module, *args: Value, **kwargs: Value) -> Value:
            form = form_of(self_)
            if form is None:
                return whole(self_, *args, **kwargs)
            return (self._short.get(form) or self._made(self_, form))(self_, *args, **kwargs)

        return forward

    def _made(self, module: nn.Module, form: Hashable) -> Forward:
        assert isinstance(module, CapturedModule)
        train = self._whole
        if _sources(module) == self._sources:
            short = (self._shortcut.shortened(graph, module, form) for graph in module.graphs)
            train, *others = [type(fx.GraphModule(module, graph)).forward for graph in short]
            for evaluate in others:
                train = _by_mode(train, with_renamed_specs(evaluate, _EVALUATION))
        self._short[form] = train
        return train


def _sources(module: CapturedModule) -> list[str]:
    """Return the code of a module's graphs, by which a graph is told from one that was changed."""
    # While fx copies a module it has no second graph yet, not even the name of one.
    graphs = module.graph, module.__dict__.get("evaluation")
    return [graph.python_code("self").src for graph in graphs if graph is not None]


def _members(module: nn.Module) -> dict[str, Value]:
    """Return the dictionaries in which a module keeps its members."""
    names = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
    return {name: module.__dict__[name] for name in names}


def adopt(target: nn.Module, members: dict[str, Value]) -> None:
    """Give ``target`` the submodules, parameters and buffers of another module, in their order.

    The order is that of ``state_dict()`` and of optimizers' parameter groups, so members that the
    target has already come after the model's.

    Args:
        target: a captured module.
        members: name of one of a module's dictionaries -> the model's own.
    """
    for name, value in members.items():
        held = getattr(target, name)
        kept = type(held)(held)
        held.clear()
        held.update(value)
        for key in kept:
            if isinstance(kept, dict):
                held.setdefault(key, kept[key])


def captured_module(
    model: nn.Module,
    graph: fx.Graph,
    evaluation: fx.Graph | None,
    constants: Mapping[str, Value] = types.MappingProxyType({}),
) -> CapturedModule:
    """Return a CapturedModule with the members of ``model``.

    Args:
        model: parameters, buffers and submodules are shared with it.
        graph: what the result runs, in training at least.
        evaluation: what it runs in evaluation; None for the same.
        constants: what the graphs read at the root and the model lacks.
    """
    # fx copies only what a graph reads, and in the graph's order. An empty module that adopts the
    # model's members has all of them, in the model's order and under the model's names.
    module = CapturedModule(nn.Module(), fx.Graph(), type(model).__name__)
    module.evaluation = None
    adopt(module, _members(model))
    if constants:
        _own_constants(module, constants, graph, evaluation)
    for path in _reads(graph, evaluation):
        # What is neither parameter, buffer nor submodule of the model (a plain tensor attribute).
        first = path.split(".")[0]
        if not hasattr(module, first):
            setattr(module, first, getattr(model, first))
            module.__dict__.setdefault("_copied", set()).add(first)
    module.graph = graph
    module.__dict__["evaluation"] = evaluation
    module.training = model.training
    module.recompile()
    return module


def _own_constants(
    module: CapturedModule, constants: Mapping[str, Value], *graphs: fx.Graph | None
) -> None:
    """Put constants into a submodule of their own, and let the graphs read them there.

    The dictionaries of the root are the model's, which is to stay as it is.
    """
    owner = nn.Module()
    for name, value in constants.items():
        # A buffer moves with the module; it is no part of the model's state_dict.
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            owner.register_buffer(name, value, persistent=False)
        else:
            setattr(owner, name, value)
    module.add_module(CONSTANTS, owner)
    for graph in graphs:
        for node in graph.nodes if graph is not None else ():
            if node.op in ("get_attr", "call_module") and node.target in constants:
                node.target = f"{CONSTANTS}.{node.target}"


def _reads(*graphs: fx.Graph | None) -> Iterator[str]:
    """Yield the paths that the graphs read."""
    for graph in graphs:
        for node in graph.nodes if graph is not None else ():
            if node.op == "get_attr":
                yield str(node.target)
