"""Capture of models that no tracer follows: the model itself runs and is recorded as it does.

A data-dependent branch, ``.item()``, a round trip through numpy: the Python code is run every time,
so the module is right on every path. While statistics are asked for, each torch function that reads
a parameter is matched with the blocks and tapped on the spot; at other times nothing is watched.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.modes import all_in_mode
from kfac_fx.capture.module import CapturedModule, adopt
from kfac_fx.capture.modules import translate
from kfac_fx.capture.placement import Taps
from kfac_fx.capture.symbolic import user_line
from kfac_fx.capture.tape import Seen, Tape
from kfac_fx.capture.undisturbed import fresh, tensors_in, undisturbed
from kfac_fx.errors import CaptureError

log = logging.getLogger("kfac_fx")

RUNNER = "_kfac_fx_model"
"""Name of the submodule that runs the model."""


class StoredTaps(Taps, Protocol):
    """Taps with the buffers that they fill."""

    def recording(self) -> bool:
        """Whether statistics are asked for."""

    def of_copy(self, module: nn.Module) -> StoredTaps:
        """The same for a copy of the module that owns the buffers."""


class Runner(nn.Module):
    """Calls the model; it is held out of sight, since its members are the captured module's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = (model,)
        self.taps: StoredTaps | None = None
        self.training = model.training

    def train(self, mode: bool = True) -> Runner:
        """The model's own flag follows that of the captured module."""
        self.held[0].training = mode
        return super().train(mode)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.taps is not None and torch.is_grad_enabled() and self.taps.recording():
            if torch.compiler.is_compiling():
                return torch.compiler.disable(self.recorded)(args, kwargs)
            return self.recorded(args, kwargs)
        return self.held[0](*args, **kwargs)

    def recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward pass with taps."""
        with _compilers_off(), Tape(self.held[0], self.taps):
            return self.held[0](*args, **kwargs)


class EagerModule(CapturedModule):
    """A captured module whose graph is one call of the model.

    Attributes:
        example: what the model did with the example inputs, as a graph. It is the ground of the
            analysis and is not run.
    """

    example: fx.Graph

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """The graph that tells the uses: that of the example inputs."""
        return (self.example,)

    @property
    def runner(self) -> Runner:
        """What calls the model."""
        runner = self._modules[RUNNER]
        assert isinstance(runner, Runner)
        return runner

    @property
    def source(self) -> nn.Module:
        """The model itself."""
        return self.runner.held[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> EagerModule:
        copied = eager_module(copy.deepcopy(self.source, memo), self.example)
        memo[id(self)] = copied
        copied.meta.update(self.meta)
        copied.training = self.training
        for name, child in self._modules.items():
            if name not in copied._modules:
                copied.add_module(name, copy.deepcopy(child, memo))
        if self.runner.taps is not None:
            copied.runner.taps = self.runner.taps.of_copy(copied)
        return copied

    def __reduce__(self) -> Any:
        raise CaptureError(
            f"{type(self).__name__} runs the model's own code and cannot be pickled: save "
            "state_dict() and transform the model again"
        )


def eager_module(model: nn.Module, example: fx.Graph) -> EagerModule:
    """An EagerModule with the members of ``model``."""
    graph = fx.Graph()
    inputs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    graph.output(graph.create_node("call_module", RUNNER, inputs))
    module = EagerModule(nn.Module(), fx.Graph(), type(model).__name__)
    module.__dict__["example"] = example
    module.__dict__["evaluation"] = None
    adopt(module, {"_modules": model._modules})
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        module.__dict__[name] = model.__dict__[name]  # a buffer set anew is so for both
    module.add_module(RUNNER, Runner(model))
    module.graph = graph
    module.training = model.training
    module.recompile()
    type(module).forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    return module


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    """What the model does with the example inputs in training, as a graph.

    Layers that these inputs do not reach are called at its beginning, so that they have uses too.

    Raises:
        CaptureError: the model fails; names the user's line.
    """
    tape = Tape(model, mark=True)
    args, kwargs = fresh((args, kwargs))
    with undisturbed(model), all_in_mode(model, True), _compilers_off():
        try:
            with tape:
                outputs = model(*args, **kwargs)
        except Exception as error:  # any code of the user's may run here
            raise CaptureError(f"{user_line(error)}: {error}") from error
    returned = list(tensors_in(outputs))
    for name in _used_unseen(returned, tape):
        tape.consume(name, untraced_operation)
    hidden = _used_detached(returned, tape)
    if hidden:
        log.warning("a custom autograd.Function hides the uses of %s: no block", ", ".join(hidden))
    for path in _unreached(model, tape.touched):
        tape.graph.call_module(path, (tape.placeholder("unreached"),))
    tape.graph.output(tuple(tape.node(tensor) for tensor in returned))
    return tape.graph


def untraced_operation() -> None:
    """Stands in a recorded graph for what is no torch function (an autograd.Function, say)."""


def _used_unseen(outputs: list[Tensor], tape: Tape) -> list[str]:
    """Parameters with a path to the outputs that no recorded call begins."""
    names = {id(p): name for name, p in tape.view.parameters.items()}
    found: dict[str, None] = {}
    for node in _autograd_nodes(outputs):
        for following, _ in node.next_functions:
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None and not isinstance(node, Seen._backward_cls):
                found[name] = None
    return list(found)


def _autograd_nodes(outputs: list[Tensor]) -> Iterator[Any]:
    """The nodes of the graph that backward would walk."""
    todo: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _used_detached(outputs: list[Tensor], tape: Tape) -> list[str]:
    """Parameters without a recorded use that a custom autograd.Function may have used.

    Its forward runs without gradients; a reversible layer runs itself again in the backward.
    """
    functions = {type(node) for node in _autograd_nodes(outputs)} - {Seen._backward_cls}
    if not any(issubclass(one, torch.autograd.function.BackwardCFunction) for one in functions):
        return []
    return [name for name in sorted(tape.touched) if not tape.view.consumers(name)]


def _unreached(model: nn.Module, touched: set[str]) -> list[str]:
    """Layers of torch.nn that could be used, had the inputs led to them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        path
        for path, module in model.named_modules()
        if (own := {names[id(p)] for p in module.parameters()})
        and not own & touched
        and translate(module, path) is not None
    ]


def _compilers_off() -> AbstractContextManager[Any]:
    """Parts of the model that are compiled run as they are written while they are recorded."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
