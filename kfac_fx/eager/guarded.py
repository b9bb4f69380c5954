"""Give captured graphs their guards, with the model as what runs where a graph does not serve."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from kfac_fx.capture.captured_module import CapturedModule, captured_module
from kfac_fx.capture.guard import Guard
from kfac_fx.capture.hooks import refuse_backward_hooks, refuse_what_traces_lose
from kfac_fx.capture.input_forms import InputForm, NamedInputs, fixed_arguments
from kfac_fx.capture.model_state import ModelState
from kfac_fx.capture.same_graph import ExportedOnce, TracedAgain, called_as_they_are
from kfac_fx.capture.servable import is_packed
from kfac_fx.capture.shared_hooks import share_hooks
from kfac_fx.capture.symbolic_trace import trace
from kfac_fx.capture.train_and_eval import Graphs, capture_both
from kfac_fx.capture.value_kinds import ExpectKind
from kfac_fx.eager.stand_in import ModelItself
from kfac_fx.errors import CaptureError

Value = Any
"""An example input of the user's model."""


def from_trace(model: nn.Module, given: Mapping[str, Value]) -> CapturedModule:
    """Return a model as symbolic tracing sees it in both modes, under guard.

    Args:
        model: shares its members with the result.
        given: example inputs by the names of their arguments.

    Raises:
        CaptureError: symbolic values cannot follow the model; names the user's line.
    """
    refuse_what_traces_lose(model)
    if any(map(is_packed, given.values())):
        raise CaptureError("a packed sequence is given, which taps in a graph do not read")
    constants: dict[str, Tensor] = {}
    read: set[str] = set()
    missed: set[str] = set()
    graphs = capture_both(model, lambda m: trace(m, given, constants, read, missed))
    live = called_as_they_are(model, graphs.training, graphs.evaluation)
    refuse_backward_hooks(model, live)
    same = TracedAgain(model, graphs, constants, Tracing(given, live))
    module = captured_module(model, graphs.training, graphs.evaluation, constants)
    share_hooks(module, model)
    signature = inspect.signature(model.forward)
    kinds = {
        str(node.args[1]): node.target.kind
        for graph in (graphs.training, graphs.evaluation)
        for node in (graph.nodes if graph is not None else ())
        if isinstance(node.target, ExpectKind)
    }
    guard = Guard(
        ModelState(model, live, own_hooks=True, read=read),
        NamedInputs(signature, fixed_arguments(signature, given), kinds, missed),
        same,
        ModelItself(model, runs_hooks=False),
        untraced=graphs.untraced,
    )
    module.watch(model, guard)
    return module


class Tracing(NamedTuple):
    """How a model was traced.

    Attributes:
        given: example inputs by the names of their arguments.
        live: paths of the layers that the graphs call as they are.
    """

    given: Mapping[str, Value]
    live: frozenset[str]

    def again(self, model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
        """Return the graph of a model in its present mode, and the constants that it reads.

        Args:
            model: the model as it is now.

        Raises:
            CaptureError: it can no longer be followed.
        """
        refuse_what_traces_lose(model)
        refuse_backward_hooks(model, self.live)
        constants: dict[str, Tensor] = {}
        return trace(model, self.given, constants), constants


def guard_export(
    module: CapturedModule,
    model: nn.Module,
    inputs: InputForm,
    constants: bool,
    read: Collection[str] = (),
    gradients: bool = False,
    untraced: str = "",
) -> CapturedModule:
    """Put the guard of an exported model before its graphs, and return the module.

    Args:
        module: the captured module.
        model: the user's model.
        inputs: what the export fixed about the arguments.
        constants: whether the graphs hold tensors that the model lacks.
        read: names of tensors that are no members and whose values the graphs have.
        gradients: whether the code has asked for gradients of parameters, which no graph does.
        untraced: why there is no graph of the evaluation; "" where there is one.
    """
    graphs = Graphs(module.graph, module.evaluation, untraced)
    guard = Guard(
        ModelState(model, frozenset(), own_hooks=False, read=read, gradients=gradients),
        inputs,
        ExportedOnce(model, graphs, constants=constants),
        ModelItself(model, runs_hooks=True),
        untraced=untraced,
    )
    module.watch(model, guard)
    return module
