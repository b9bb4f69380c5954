"""``transform``: from a model to its instrumented drop-in."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from kfac_fx.capture import CapturedModule, EagerModule
from kfac_fx.capture import capture as capture_model
from kfac_fx.config import (
    CAPTURES,
    COUPLINGS,
    LARGE_FACTORS,
    MAX_FACTOR_DIM,
    STRUCTURES,
    WEIGHT_SHARING,
    choice,
)
from kfac_fx.errors import CoverageError, NoParametersError, UnknownOptionError
from kfac_fx.ir import CurvatureGraph
from kfac_fx.passes import (
    EagerTaps,
    every_piece,
    find_couplings,
    find_moments,
    find_uses,
    gather_blocks,
    instrument,
    placeable,
    strip_taps,
)

log = logging.getLogger("kfac_fx")


def transform(
    model: nn.Module,
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
        model: any nn.Module or fx.GraphModule; it is not changed.
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
    choice("structure", structure, STRUCTURES)
    choice("couplings", couplings, COUPLINGS)
    choice("weight_sharing", weight_sharing, WEIGHT_SHARING)
    choice("large_factors", large_factors, LARGE_FACTORS)
    choice("capture", capture, CAPTURES)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    frozen = tuple(n for n, p in model.named_parameters() if not p.requires_grad)
    excluded = tuple(n for n in sizes if n not in frozen and _matches(n, exclude))
    names = [n for n in sizes if n not in frozen and n not in excluded]
    if not names:
        raise NoParametersError(
            f"{type(model).__name__} has no parameter that requires a gradient and is not excluded"
        )
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    kwargs = dict(example_kwargs or {})
    module, route = capture_model(model, args, kwargs, route=capture, check=check)
    for graph in module.graphs:
        strip_taps(graph)
    reduce = weight_sharing == "reduce"
    found = []
    for graph in module.graphs:
        uses = find_uses(
            module,
            graph,
            names,
            reduce=reduce,
            max_factor_dim=max_factor_dim,
            large_factors=large_factors,
        )
        if route == "eager":
            uses = every_piece(placeable(uses, graph), graph)
        found.append(gather_blocks(uses, graph, counted=route == "eager"))
    blocks = found[0]
    covered = {name for block in blocks.values() for name in block.parameters}
    unused = tuple(name for name in names if name not in covered)
    curvature = CurvatureGraph(blocks, frozen, excluded, unused, sizes, structure, route)
    if structure == "block_tridiagonal":
        by_data = couplings == "data"
        curvature = find_couplings(module, module.graph, curvature, by_data=by_data)
    if ekfac:
        if route == "eager":
            raise UnknownOptionError("ekfac=True needs a graph: capture='eager' has none")
        curvature = replace(curvature, moments=find_moments(module, blocks))
    _check_coverage(curvature, strict)
    module.meta["kfac_fx"] = curvature
    instrument(module, found)
    if isinstance(module, EagerModule):
        module.runner.taps = EagerTaps(module, reduce, max_factor_dim, large_factors)
    return module


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a parameter, or a module that holds it, matches one of the globs."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    parts = name.split(".")
    paths = [".".join(parts[: index + 1]) for index in range(len(parts))]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def _check_coverage(curvature: CurvatureGraph, strict: bool) -> None:
    lines = [f"{', '.join(b.parameters)}: {b.reason}" for b in curvature.fallbacks]
    if lines and strict:
        raise CoverageError(
            "strict=True, but these parameters would get a weaker block than their kind allows "
            "(exclude them or pass strict=False):\n  " + "\n  ".join(lines)
        )
    for line in lines:
        log.warning("weaker block: %s", line)
