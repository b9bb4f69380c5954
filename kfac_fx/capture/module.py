"""A captured model: a GraphModule that shares the model's own submodules and parameters."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from kfac_fx.ir import CurvatureGraph


class CapturedModule(fx.GraphModule):
    """The model as a graph; a drop-in with the same Parameter objects and state_dict keys.

    The model's children are this module's children, so train(), eval(), to() and hooks reach them
    through either. A model whose Python code takes different paths in training and in evaluation
    keeps two graphs: ``graph`` and ``evaluation``.
    """

    evaluation: fx.Graph | None

    @property
    def curvature(self) -> CurvatureGraph:
        """Blocks and coverage; there once the uses have been found."""
        found: CurvatureGraph = self.meta["kfac_fx"]
        return found

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """The training graph and, where it differs, the one for evaluation."""
        return (self.graph,) if self.evaluation is None else (self.graph, self.evaluation)

    def recompile(self) -> Any:
        """Generates ``forward`` again after a change of a graph."""
        code = super().recompile()
        evaluation = self.__dict__.get("evaluation")
        if evaluation is not None:
            train = type(self).forward
            evaluated = fx.GraphModule(self, evaluation)
            evaluate = _with_own_specs(type(evaluated).forward)
            for name in _SPECS:  # the graphs may return other structures
                self.__dict__[_OWN + name] = evaluated.__dict__.get(name)
            evaluation.owning_module = self

            @functools.wraps(train)
            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return (train if self.training else evaluate)(self, *args, **kwargs)

            type(self).forward = forward  # each GraphModule has a class of its own
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        copied: CapturedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        adopt(copied, copy.deepcopy(_members(self), memo))
        for name in (*HOOKS, "_ddp_params_and_buffers_to_ignore"):
            if name in self.__dict__:
                copied.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        copied.__dict__["evaluation"] = copy.deepcopy(self.evaluation, memo)
        copied.training = self.training
        copied.recompile()
        return copied


_SPECS = ("_in_spec", "_out_spec")
_OWN = "_evaluation"


def _with_own_specs(forward: Any) -> Any:
    """A generated forward that reads the structures of inputs and outputs under other names."""
    code = forward.__code__
    names = tuple(_OWN + name if name in _SPECS else name for name in code.co_names)
    return types.FunctionType(
        code.replace(co_names=names), forward.__globals__, forward.__name__, forward.__defaults__
    )


def _members(module: nn.Module) -> dict[str, Any]:
    names = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
    return {name: module.__dict__[name] for name in names}


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def share_hooks(target: nn.Module, source: nn.Module) -> None:
    """Lets ``target`` run the hooks of ``source``, for a capture of ``source.forward`` alone."""
    for name in HOOKS:
        target.__dict__[name] = source.__dict__[name]


def adopt(target: nn.Module, members: dict[str, Any]) -> None:
    """Gives ``target`` the submodules, parameters and buffers of another module, in their order."""
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
    constants: Mapping[str, Any] = types.MappingProxyType({}),
) -> CapturedModule:
    """A CapturedModule with the members of ``model``.

    Args:
        constants: what the graphs read at the root and the model lacks.
    """
    module = CapturedModule(nn.Module(), fx.Graph(), type(model).__name__)
    module.evaluation = None
    adopt(module, _members(model))
    for name, value in constants.items():
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
    for graph in graphs:
        for node in graph.nodes if graph is not None else ():
            if node.op == "get_attr":
                yield str(node.target)


def lift_constants(model: nn.Module, captured: fx.GraphModule, constants: dict[str, Any]) -> None:
    """Moves to ``constants`` what a capture owns and the model lacks, under names of its own.

    A constant of the same place and value in an earlier capture of the model is shared.
    """
    number = 0
    names: dict[str, str] = {}
    for node in captured.graph.nodes:
        path = str(node.target)
        if node.op != "get_attr" or _attribute(model, path) is not None:
            continue
        if path not in names:
            value = _attribute(captured, path)
            name = f"_constant_{number}"
            while name in constants and not _same(constants[name], value):
                name += "_"
            constants[name] = value
            names[path], number = name, number + 1
        node.target = names[path]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is other


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
