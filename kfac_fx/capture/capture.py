"""From a model to a CapturedModule: the route is chosen by what follows the model."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from kfac_fx.capture.check import SelfCheck
from kfac_fx.capture.eager import EagerModule, eager_module, record
from kfac_fx.capture.export import check_sizes, exported, fixes_batch
from kfac_fx.capture.modes import capture_both
from kfac_fx.capture.module import CapturedModule, captured_module, lift_constants, share_hooks
from kfac_fx.capture.symbolic import opaque_calls, trace
from kfac_fx.capture.undisturbed import undisturbed
from kfac_fx.errors import CaptureError

log = logging.getLogger("kfac_fx")


ROUTES: dict[str, str] = {
    "symbolic_trace": "symbolic tracing",
    "export": "torch.export",
    "eager": "running the model",
}
"""The routes in the order in which they are tried, in words."""


def capture(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any],
    *,
    route: str = "auto",
    check: bool = True,
) -> tuple[CapturedModule, str]:
    """The captured module and its route: "graph_module" or one of ROUTES.

    Symbolic tracing comes first. With example inputs, torch.export takes over where tracing fails
    or would keep a module with parameters whole that no rule can look into, and the model's own
    code where export fails or fixes the batch size.

    Args:
        route: "auto", or the only one to try.
        check: compare with the model on the example inputs; a route that differs has failed.

    Raises:
        CaptureError: no route follows the model; gives each one's reason.
    """
    if isinstance(model, EagerModule):
        model, route = model.source, "eager"
    if isinstance(model, fx.GraphModule) and route in ("auto", "symbolic_trace"):
        return _from_graph_module(model), "graph_module"
    have_inputs = args is not None or bool(kwargs)
    self_check = SelfCheck(model, args or (), kwargs) if check and have_inputs else None
    reasons: dict[str, CaptureError] = {}
    opaque: list[tuple[CapturedModule, str, list[str]]] = []
    for name in ROUTES if route == "auto" else (route,):
        try:
            module = _captured(name, model, args, kwargs)
            if self_check is not None:
                self_check.compare(module)
        except CaptureError as error:
            reasons[name] = error
            log.info("%s cannot follow %s: %s", ROUTES[name], type(model).__name__, error)
            if not have_inputs:
                break
            continue
        whole = opaque_calls(model, module.graph)
        if name == "export" and fixes_batch(module.graph):
            whole.append("batches of another size")
        if not whole or not have_inputs or route != "auto":
            return module, name
        opaque.append((module, name, whole))
    if opaque:
        module, name, whole = opaque[-1]
        log.warning("%s does not follow %s", ROUTES[name], ", ".join(whole))
        return module, name
    raise _failure(model, reasons, have_inputs)


def _captured(
    route: str, model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any]
) -> CapturedModule:
    if route == "symbolic_trace":
        given = _given(model, args, kwargs)
        with undisturbed(model):
            graphs = capture_both(model, lambda m: trace(m, given))
        module = captured_module(model, *graphs)
        share_hooks(module, model)
        return module
    if args is None and not kwargs:
        raise CaptureError("it needs example_inputs=(...)")
    if route == "export":
        return _from_export(model, args or (), kwargs)
    module = eager_module(model, record(model, args or (), kwargs))
    log.warning(
        "%s runs as it is written and is recorded while it does: there is no graph of it that can "
        "be compiled as a whole or transformed further",
        type(model).__name__,
    )
    return module


def _failure(model: nn.Module, reasons: dict[str, CaptureError], have_inputs: bool) -> CaptureError:
    name, last = type(model).__name__, list(reasons.values())[-1]
    if not have_inputs and "symbolic_trace" in reasons:
        error = CaptureError(
            f"symbolic tracing cannot follow {name} at {last}. "
            "Pass example_inputs=(...) so that torch.export can."
        )
    else:
        stops = "; ".join(f"{ROUTES[route]} stops at {why}" for route, why in reasons.items())
        error = CaptureError(f"{name}: {stops}")
    error.__cause__ = last
    return error


def _given(
    model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any]
) -> frozenset[str]:
    names = list(inspect.signature(model.forward).parameters)
    return frozenset(names[: len(args or ())]) | frozenset(kwargs)


def of_program(program: ExportedProgram) -> CapturedModule:
    """What an exported program runs; it shares the program's parameters.

    Its mode is that of the export: train() and eval() raise, as those of ``program.module()``.
    """
    model = program.module(check_guards=False)
    assert isinstance(model, fx.GraphModule)
    check_sizes(model.graph)
    module = _from_graph_module(model)
    module.__dict__.update({name: model.__dict__[name] for name in ("train", "eval")})
    return module


def _from_graph_module(model: fx.GraphModule) -> CapturedModule:
    evaluation = getattr(model, "evaluation", None)
    module = captured_module(model, copy.deepcopy(model.graph), copy.deepcopy(evaluation))
    module.meta.update(model.meta)
    share_hooks(module, model)
    kept = {
        key: hook
        for key, hook in model._forward_pre_hooks.items()
        if not getattr(hook, "__module__", "").startswith("torch.export")  # checks its own module
    }
    module.__dict__["_forward_pre_hooks"] = type(model._forward_pre_hooks)(kept)
    return module


def _from_export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedModule:
    constants: dict[str, Any] = {}

    def graph_of(model: nn.Module) -> fx.Graph:
        module = exported(model, args, kwargs)
        lift_constants(model, module, constants)
        return module.graph

    with undisturbed(model):
        training, evaluation = capture_both(model, graph_of)
    return captured_module(model, training, evaluation, constants)
