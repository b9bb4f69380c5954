"""From a model to a CapturedModule: the route is chosen by what follows the model."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

from torch import fx, nn

from kfac_fx.capture.export import exported
from kfac_fx.capture.modes import capture_both
from kfac_fx.capture.module import CapturedModule, captured_module
from kfac_fx.capture.symbolic import opaque_modules, trace
from kfac_fx.errors import CaptureError

log = logging.getLogger("kfac_fx")


def capture(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any]
) -> tuple[CapturedModule, str]:
    """The captured module and the route: "graph_module", "symbolic_trace" or "export".

    Symbolic tracing comes first. With example inputs, torch.export takes over where tracing fails
    or would keep a module with parameters whole that no rule can look into.

    Raises:
        CaptureError: no route follows the model; gives each one's reason.
    """
    if isinstance(model, fx.GraphModule):
        return _from_graph_module(model), "graph_module"
    have_inputs = args is not None or bool(kwargs)
    try:
        given = _given(model, args, kwargs)
        training, evaluation = capture_both(model, lambda m: trace(m, given))
    except CaptureError as error:
        if not have_inputs:
            raise CaptureError(
                f"symbolic tracing cannot follow {type(model).__name__} at {error}. "
                "Pass example_inputs=(...) so that torch.export can."
            ) from error
        log.info("symbolic tracing cannot follow %s: %s", type(model).__name__, error)
        return _from_export(model, args or (), kwargs, str(error)), "export"
    opaque = opaque_modules(model, training)
    if opaque and have_inputs:
        try:
            return _from_export(model, args or (), kwargs, None), "export"
        except CaptureError as error:
            log.warning("%s stay whole: %s", ", ".join(opaque), error)
    return captured_module(model, training, evaluation), "symbolic_trace"


def _given(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any]
) -> frozenset[str]:
    names = list(inspect.signature(model.forward).parameters)
    return frozenset(names[: len(args or ())]) | frozenset(kwargs)


def _from_graph_module(model: fx.GraphModule) -> CapturedModule:
    evaluation = getattr(model, "evaluation", None)
    module = captured_module(model, copy.deepcopy(model.graph), copy.deepcopy(evaluation))
    module.meta.update(model.meta)
    return module


def _from_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], traced: str | None
) -> CapturedModule:
    extra = nn.Module()

    def graph_of(model: nn.Module) -> fx.Graph:
        module = exported(model, args, kwargs)
        for name, value in (*module.named_buffers(), *module.named_children()):
            if "." not in name and not hasattr(extra, name):
                setattr(extra, name, value)
        return module.graph

    try:
        training, evaluation = capture_both(model, graph_of)
    except CaptureError as error:
        first = f"symbolic tracing stops at {traced}; " if traced else ""
        raise CaptureError(
            f"{type(model).__name__}: {first}torch.export stops at {error}"
        ) from error
    return captured_module(model, training, evaluation, extra)
