"""Give captured graphs their guards, with the model as what runs where a graph does not serve."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import fx, nn

from kfac_fx.capture.captured_module import CapturedModule, captured_module, share_hooks
from kfac_fx.capture.guard import Guard
from kfac_fx.capture.hooks import refuse_backward_hooks, refuse_what_traces_lose
from kfac_fx.capture.input_forms import InputForm, NamedInputs, fixed_arguments
from kfac_fx.capture.model_state import ModelState
from kfac_fx.capture.same_graph import ExportedOnce, TracedAgain, called_as_they_are
from kfac_fx.capture.symbolic_trace import trace
from kfac_fx.capture.train_and_eval import capture_both
from kfac_fx.capture.undisturbed import undisturbed
from kfac_fx.eager.stand_in import ModelItself


def from_trace(model: nn.Module, given: Collection[str]) -> CapturedModule:
    """Return a model as symbolic tracing sees it in both modes, under guard.

    Args:
        model: shares its members with the result.
        given: names of the arguments that callers will pass.

    Raises:
        CaptureError: symbolic values cannot follow the model; names the user's line.
    """
    refuse_what_traces_lose(model)
    with undisturbed(model):
        graphs = capture_both(model, lambda m: trace(m, given))
    live = called_as_they_are(model, *graphs)
    refuse_backward_hooks(model, live)
    module = captured_module(model, *graphs)
    share_hooks(module, model)
    signature = inspect.signature(model.forward)

    def again(model: nn.Module) -> fx.Graph:
        refuse_what_traces_lose(model)
        refuse_backward_hooks(model, live)
        with undisturbed(model):
            return trace(model, given)

    guard = Guard(
        ModelState(model, live, own_hooks=True),
        NamedInputs(signature, fixed_arguments(signature, given)),
        TracedAgain(model, module, graphs, again, live),
        ModelItself(model, runs_hooks=False),
    )
    module.watch(model, guard)
    return module


def guard_export(
    module: CapturedModule, model: nn.Module, inputs: InputForm, *, constants: bool
) -> CapturedModule:
    """Put the guard of an exported model before its graphs, and return the module.

    Args:
        module: the captured module.
        model: the user's model.
        inputs: what the export fixed about the arguments.
        constants: whether the graphs hold tensors that the model lacks.
    """
    graphs = module.graph, module.evaluation
    guard = Guard(
        ModelState(model, frozenset(), own_hooks=False),
        inputs,
        ExportedOnce(model, graphs, constants=constants),
        ModelItself(model, runs_hooks=True),
    )
    module.watch(model, guard)
    return module
