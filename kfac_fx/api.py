"""``transform``: capture a model by the first route that follows it, and insert taps."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.capture.graph_modules import from_graph_module
from kfac_fx.capture.member_names import check_names
from kfac_fx.capture.self_check import SelfCheck
from kfac_fx.capture.servable import check_servable
from kfac_fx.capture.symbolic_trace import opaque_calls
from kfac_fx.capture.user_lines import user_line
from kfac_fx.config import (
    CAPTURES,
    Capture,
    Couplings,
    LargeFactors,
    Structure,
    WeightSharing,
    choice,
)
from kfac_fx.eager.eager_module import EagerModule, eager_module
from kfac_fx.eager.guarded import from_trace, guard_export
from kfac_fx.eager.record_example import record
from kfac_fx.errors import CaptureError
from kfac_fx.export.export_model import fixes_batch, from_export, of_program
from kfac_fx.passes.covered_parameters import Covered
from kfac_fx.passes.kfac_transform import KFACTransform
from kfac_fx.passes.options import TransformOptions
from kfac_fx.passes.rules.base import Rules
from kfac_fx.passes.strip_taps import StripTaps

log = logging.getLogger("kfac_fx")

Value = Any
"""An example input of the user's: a tensor, or any nesting that the model takes."""

ROUTES: dict[str, str] = {
    "symbolic_trace": "symbolic tracing",
    "export": "torch.export",
    "eager": "running the model",
}
"""The routes in the order in which they are tried, in words for messages."""


def transform(
    model: nn.Module | ExportedProgram,
    example_inputs: Value = None,
    *,
    example_kwargs: Mapping[str, Value] | None = None,
    structure: Structure | None = None,
    couplings: Couplings = "topology",
    exclude: Collection[str] = (),
    strict: bool = False,
    weight_sharing: WeightSharing = "expand",
    max_factor_dim: int | None = None,
    large_factors: LargeFactors = "diagonal",
    ekfac: bool = False,
    rules: Rules | None = None,
    capture: Capture = "auto",
    check: bool = True,
) -> CapturedModule:
    """Return the model as a GraphModule whose taps can record Kronecker-factor statistics.

    A drop-in: same outputs, gradients, Parameter objects and state_dict keys; train() and eval()
    work. ``result.curvature`` says which block every parameter got.

    Args:
        model: any nn.Module, fx.GraphModule or ExportedProgram; it is not changed. A program's
            result keeps the mode that was exported.
        example_inputs: positional arguments as a tuple (a single tensor counts as one), needed only
            where symbolic tracing cannot follow the model.
        example_kwargs: keyword arguments, likewise.
        structure: "block_tridiagonal" couples each layer with the one that follows it, along a
            spanning forest of the graph's dependencies (Martens & Grosse 2015, section 4.3);
            "block_diagonal" takes layers as independent. None finds the couplings and leaves them
            to ``KFAC``, and to a ``Preconditioner`` that asks for them. With couplings="data" it is
            "block_tridiagonal".
        couplings: "topology" prefers direct successors to skips; "data" records more pairs, and
            the preconditioner takes those with the most mutual information.
        exclude: names or globs of parameters or modules that are left alone.
        strict: raise where a parameter would get a weaker block than its kind allows.
        weight_sharing: "expand" treats the positions that share a weight as uncorrelated cases,
            "reduce" works with their mean input and summed derivative (Eschenhagen et al. 2023).
        max_factor_dim: the largest side of a Kronecker factor (a long vocabulary) that is whole.
            None cuts sides from 1,281 to 8,192 into equal sub-blocks of at most 640, which the
            report names; where ``strict``, ekfac, couplings="data" or "block_tridiagonal" are asked
            for, and for uses that cannot be cut, it is 8192.
        large_factors: "diagonal" keeps larger sides as vectors; "blocks" cuts those of dense uses,
            convolutions and gates (not of groups) into ceil(d / max_factor_dim) equal sub-blocks
            along the diagonal. Where they do not divide d, the last is filled up with zeros, which
            damping makes invertible and which nothing else sees.
        ekfac: record what ``tikhonov="ekfac"`` needs: second moments of per-case gradients in the
            bases of the Kronecker blocks of plain layers (not of running models, capture="eager").
        rules: the rules that recognise uses, in place of the library's own and those that
            ``register_rule`` added: ``default_rules().before(rule)`` of ``kfac_fx.passes.rules``
            asks one of your own first, for this model alone.
        capture: "symbolic_trace", "export" (needs example inputs), "eager" (the model's own Python
            code, recorded while it runs; needs example inputs), or "auto", the first that works.
        check: compare the captured module's outputs and gradients with the model's, once, on the
            example inputs if there are any.

    Raises:
        CaptureError: the model cannot be captured; names the line and what to pass.
        NoParametersError: there is nothing to precondition.
        CoverageError: ``strict`` and a fallback; names the parameters.
        UnknownOptionError: an option is wrong.
    """
    choice("capture", capture, CAPTURES)
    options = TransformOptions(
        structure=structure,
        couplings=couplings,
        exclude=exclude,
        strict=strict,
        weight_sharing=weight_sharing,
        max_factor_dim=max_factor_dim,
        large_factors=large_factors,
        ekfac=ekfac,
        rules=rules,
    )
    if isinstance(model, ExportedProgram):
        module = of_program(model)
        route = "export"
    else:
        check_servable(
            model,
            None
            if example_inputs is None and not example_kwargs
            else (example_inputs, example_kwargs),
        )
        Covered(model, exclude)  # a model without parameters is refused before any work is done
        args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
        kwargs = dict(example_kwargs or {})
        found = capture_model(model, args, kwargs, route=capture, check=check)
        module = found.module
        route = found.route
    # A module that was transformed before, perhaps with other options, starts anew.
    StripTaps()(module)
    KFACTransform(options, route=route)(module)
    if example_inputs is None and not example_kwargs and isinstance(model, nn.Module):
        _check_reached(model, module)
    return module


def _check_reached(model: nn.Module, module: CapturedModule) -> None:
    """Refuse the graph of a call without arguments, if it leaves out what is trained.

    Where every argument is optional, as of CLIP's ``forward(image=None, text=None)``, tracing
    follows the defaults. Calls with an image then run the model's own code, and nothing that only
    they reach is recorded.

    Raises:
        CaptureError: asks for example inputs.
    """
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = inspect.signature(model.forward).parameters.values()
    named = [one for one in arguments if one.kind not in stars]
    unused = module.curvature.unused
    if not unused or not named or any(one.default is not None for one in named):
        return
    raise CaptureError(
        f"all arguments of {type(model).__name__}.forward are optional, and without any of them "
        f"{len(unused)} trained parameters are not used ({', '.join(unused[:3])}). Pass "
        "example_inputs=(...), or example_kwargs={...}, as the model is called in training"
    )


class Captured(NamedTuple):
    """A captured model.

    Attributes:
        module: the graph, or the model that is recorded as it runs.
        route: how it was captured: "graph_module" or one of ROUTES.
        kept_whole: calls and sizes that the route does not follow.
    """

    module: CapturedModule
    route: str
    kept_whole: tuple[str, ...] = ()


def capture_model(
    model: nn.Module,
    args: tuple[Value, ...] | None,
    kwargs: dict[str, Value],
    *,
    route: str = "auto",
    check: bool = True,
) -> Captured:
    """Capture a model by the first route that follows it.

    Symbolic tracing comes first: it needs no inputs and keeps layers and modes. With example
    inputs, torch.export takes over where tracing fails or would keep a module with parameters whole
    that no rule can look into, and the model's own code where export fails or fixes the batch size.

    Args:
        model: is not changed.
        args: positional example inputs; None without any.
        kwargs: keyword example inputs.
        route: "auto", or the only one to try.
        check: compare with the model on the example inputs; a route that differs has failed.

    Raises:
        CaptureError: no route follows the model; gives each one's reason.
    """
    if isinstance(model, EagerModule):
        model = model.source
        route = "eager"
    if isinstance(model, fx.GraphModule) and route in ("auto", "symbolic_trace"):
        return Captured(from_graph_module(model), "graph_module")
    check_names(model, CapturedModule)
    # Without inputs there is nothing to compare, and no other route to take.
    have_inputs = args is not None or bool(kwargs)
    self_check = SelfCheck(model, args or (), kwargs) if check and have_inputs else None
    reasons: dict[str, CaptureError] = {}
    # A capture that keeps something whole works, but the whole part gets a weak block. It is kept
    # aside while later routes are tried, and the last one is taken if none does better.
    opaque: list[Captured] = []
    for name in ROUTES if route == "auto" else (route,):
        try:
            module = _captured_or_refused(name, model, args, kwargs)
            if self_check is not None:
                sizes = name == "export"
                self_check.compare(module, runs_model=module.runs_model, sizes=sizes)
        except CaptureError as error:
            reasons[name] = error
            log.info("%s cannot follow %s: %s", ROUTES[name], type(model).__name__, error)
            if not have_inputs:
                break  # the other routes need inputs; the message says so
            continue
        if name == "eager":
            _say_why_eager(model, reasons, opaque)
        elif why := module.untraced:
            log.warning(
                "%s runs as it is written in evaluation: %s. Its graph is that of the training",
                type(model).__name__,
                why,
            )
        whole = opaque_calls(model, module.graph)
        if name == "export" and fixes_batch(module.graph):
            whole.append("batches of another size")
        if not whole or not have_inputs or route != "auto":
            return Captured(module, name)
        opaque.append(Captured(module, name, tuple(whole)))
    if opaque:
        last = opaque[-1]
        log.warning("%s does not follow %s", ROUTES[last.route], ", ".join(last.kept_whole))
        return last
    raise _failure(model, reasons, have_inputs)


def _captured_or_refused(
    route: str, model: nn.Module, args: tuple[Value, ...] | None, kwargs: dict[str, Value]
) -> CapturedModule:
    """Return the model as one route captures it; whatever stops the route is a refusal of it.

    Raises:
        CaptureError: says why.
    """
    try:
        return _captured(route, model, args, kwargs)
    except CaptureError:
        raise
    except Exception as error:  # code that fx generates or torch runs may fail in any way
        raise CaptureError(f"{user_line(error)}: {type(error).__name__}: {error}") from error


def _captured(
    route: str, model: nn.Module, args: tuple[Value, ...] | None, kwargs: dict[str, Value]
) -> CapturedModule:
    """Return the model as one route captures it."""
    if route == "symbolic_trace":
        given = _arguments_given(model, args, kwargs)
        return from_trace(model, given)
    if args is None and not kwargs:
        raise CaptureError("it needs example_inputs=(...)")
    if route == "export":
        module, inputs, constants, read, gradients, untraced = from_export(
            model, args or (), kwargs
        )
        return guard_export(module, model, inputs, constants, read, gradients, untraced)
    return eager_module(model, record(model, args or (), kwargs))


def _say_why_eager(
    model: nn.Module, reasons: Mapping[str, CaptureError], opaque: Sequence[Captured]
) -> None:
    """Say once that there is no graph, and what stood in the way of one."""
    why = [f"{ROUTES[route]} stops at {reason}" for route, reason in reasons.items()]
    why += [f"{ROUTES[one.route]} does not follow {', '.join(one.kept_whole)}" for one in opaque]
    log.warning(
        "%s runs as it is written and is recorded while it does: there is no graph of it that can "
        "be compiled as a whole or transformed further (%s)",
        type(model).__name__,
        "; ".join(why) or 'capture="eager" was asked for',
    )


def _arguments_given(
    model: nn.Module, args: tuple[Value, ...] | None, kwargs: dict[str, Value]
) -> dict[str, Value]:
    """Return the example inputs by the names of the arguments of ``forward`` that they fill."""
    names = inspect.signature(model.forward).parameters
    return dict(zip(names, args or (), strict=False)) | kwargs


def _failure(model: nn.Module, reasons: dict[str, CaptureError], have_inputs: bool) -> CaptureError:
    """Return the error that tells why each route stopped, and what would help."""
    name = type(model).__name__
    last = list(reasons.values())[-1]
    if not have_inputs and "symbolic_trace" in reasons:
        error = CaptureError(
            f"symbolic tracing cannot follow {name} at {last}. "
            "Pass example_inputs=(...) so that torch.export can."
        )
    else:
        stops = "; ".join(f"{ROUTES[route]} stops at {why}" for route, why in reasons.items())
        error = CaptureError(f"{name}: {stops}")
    # The caller raises what it is given; the last route's own error is the one with a line of code.
    error.__cause__ = last
    return error
