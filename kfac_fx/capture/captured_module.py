"""A captured model: a GraphModule that shares the model's own submodules and parameters."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from kfac_fx.capture.mode_regions import switches_modes
from kfac_fx.torch_internals.generated_forward import SPECS, set_forward, with_renamed_specs
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


class CapturedModule(fx.GraphModule):
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

        Taps in a graph need no more, so this does nothing.

        Args:
            uses_of_call: finds uses as the blocks of the curvature graph were found.
        """

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
        if evaluation is not None:
            train = type(self).forward
            evaluated = fx.GraphModule(self, evaluation)
            evaluate = with_renamed_specs(type(evaluated).forward, _EVALUATION)
            # The two graphs may take and return other structures, and the code of either reads them
            # from the module under the same names; the evaluation's get names of their own.
            for name in SPECS:
                self.__dict__[_EVALUATION + name] = evaluated.__dict__.get(name)
            evaluation.owning_module = self

            # The flag of the captured module chooses, as a model's own ``if self.training`` would.
            @functools.wraps(train)
            def forward(self: nn.Module, *args: Value, **kwargs: Value) -> Value:
                return (train if self.training else evaluate)(self, *args, **kwargs)

            set_forward(self, forward)
        if any(map(switches_modes, filter(None, (self.graph, evaluation)))):
            set_forward(self, modes_put_back(type(self).forward))
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        # fx copies parameters and submodules that the graph reads; the model's others, hooks and
        # non-persistent buffers are copied here, with the same memo, so that shared ones stay so.
        copied: CapturedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        adopt(copied, copy.deepcopy(_members(self), memo))
        for name in (*HOOKS, "_ddp_params_and_buffers_to_ignore"):
            if name in self.__dict__:
                copied.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        copied.__dict__["evaluation"] = copy.deepcopy(self.evaluation, memo)
        copied.training = self.training
        copied.recompile()
        return copied


_EVALUATION = "_evaluation"
"""Prefix of the attributes in which the evaluation graph's code finds its input structures."""


def _members(module: nn.Module) -> dict[str, Value]:
    """Return the dictionaries in which a module keeps its members."""
    names = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
    return {name: module.__dict__[name] for name in names}


# What nn.Module runs around forward. There is no public way to hand hooks on with their handles.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def share_hooks(target: nn.Module, source: nn.Module) -> None:
    """Let ``target`` run the hooks of ``source``, for a capture of ``source.forward`` alone.

    The dictionaries are shared: a hook that is added to the model later runs in the capture too.
    """
    for name in HOOKS:
        target.__dict__[name] = source.__dict__[name]


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
    for name, value in constants.items():
        # A buffer moves with the module; it is no part of the model's state_dict.
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value, persistent=False)
        else:
            setattr(module, name, value)
    for path in _reads(graph, evaluation):
        # What is neither parameter, buffer nor submodule of the model (a plain tensor attribute).
        first = path.split(".")[0]
        if not hasattr(module, first):
            setattr(module, first, getattr(model, first))
    module.graph = graph
    module.__dict__["evaluation"] = evaluation
    module.training = model.training
    module.recompile()
    return module


def _reads(*graphs: fx.Graph | None) -> Iterator[str]:
    """Yield the paths that the graphs read."""
    for graph in graphs:
        for node in graph.nodes if graph is not None else ():
            if node.op == "get_attr":
                yield str(node.target)
