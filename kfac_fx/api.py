"""``transform``: from a model to its instrumented drop-in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from kfac_fx.capture import CapturedModule, of_program
from kfac_fx.capture import capture as capture_model
from kfac_fx.config import CAPTURES, MAX_FACTOR_DIM, choice
from kfac_fx.passes import Covered, KFACTransform, StripTaps


def transform(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    structure: str = "block_tridiagonal",
    couplings: str = "topology",
    exclude: Collection[str] = (),
    strict: bool = False,
    weight_sharing: str = "expand",
    max_factor_dim: int = MAX_FACTOR_DIM,
    large_factors: str = "diagonal",
    ekfac: bool = False,
    capture: str = "auto",
    check: bool = True,
) -> CapturedModule:
    """The model as a GraphModule whose taps can record Kronecker-factor statistics.

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
            "block_diagonal" takes layers as independent.
        couplings: "topology" prefers direct successors to skips; "data" records more pairs, and
            the preconditioner takes those with the most mutual information.
        exclude: names or globs of parameters or modules that are left alone.
        strict: raise where a parameter would get a weaker block than its kind allows.
        weight_sharing: "expand" treats the positions that share a weight as uncorrelated cases,
            "reduce" works with their mean input and summed derivative (Eschenhagen et al. 2023).
        max_factor_dim: the largest side of a Kronecker factor (a long vocabulary) that is whole.
        large_factors: "diagonal" keeps larger sides as vectors; "blocks" cuts those of dense uses
            into ceil(d / max_factor_dim) equal sub-blocks along the diagonal. Where they do not
            divide d, the last is filled up with zeros, which damping makes invertible and which
            nothing else sees.
        ekfac: record what ``tikhonov="ekfac"`` needs: second moments of per-case gradients in the
            bases of the Kronecker blocks of plain layers (not of running models, capture="eager").
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
    chain = KFACTransform(
        structure=structure,
        couplings=couplings,
        exclude=exclude,
        strict=strict,
        weight_sharing=weight_sharing,
        max_factor_dim=max_factor_dim,
        large_factors=large_factors,
        ekfac=ekfac,
    )
    if isinstance(model, ExportedProgram):
        module, chain.uses.route = of_program(model), "export"
    else:
        Covered(model, exclude)  # before any work is done
        args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
        kwargs = dict(example_kwargs or {})
        module, chain.uses.route = capture_model(model, args, kwargs, route=capture, check=check)
    StripTaps()(module)
    chain(module)
    return module
