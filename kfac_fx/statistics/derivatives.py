"""Derivatives of recorded graphs; what autograd refuses becomes an error that says what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac_fx.errors import ObservationError
from kfac_fx.statistics.user_graph import AFTER_BACKWARD
from kfac_fx.torch_internals.error_texts import backward_refusal


def derivatives(
    scalar: Tensor, tensors: Sequence[Tensor | GradientEdge], *, last: bool = False
) -> Sequence[Tensor | None]:
    """Return the derivatives of a scalar at tensors and edges of the graph, by one backward.

    Args:
        scalar: is differentiated.
        tensors: where; None comes where the scalar does not depend on one.
        last: whether the graph may be freed.

    Raises:
        ObservationError: the graph was freed, or was not kept for this backward.
    """
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            scalar,
            tensors,  # type: ignore[arg-type]  # edges and tensors may be mixed
            retain_graph=not last,
            allow_unused=True,
        )
        return found
    except RuntimeError as error:
        refusal = backward_refusal(error)
        if refusal == "freed":
            raise ObservationError(AFTER_BACKWARD) from error
        if refusal == "compiled":
            raise ObservationError(
                "a compiled forward keeps no graph for a second backward: give the inputs, "
                "observe(outputs, inputs=...), use fisher='empirical', or set "
                "torch._functorch.config.donated_buffer = False before compiling"
            ) from error
        if refusal == "reentrant":
            raise ObservationError(
                "a reentrant activation checkpoint allows no backward but the training's: use "
                "checkpoint(..., use_reentrant=False) or fisher='empirical'"
            ) from error
        raise


def batched_derivatives(
    rows: Tensor, tensors: Sequence[Tensor | GradientEdge], picked: Tensor
) -> Sequence[Tensor | None]:
    """Return derivatives of several sums over rows, by one backward whose tensors are batched.

    Args:
        rows: what is summed.
        tensors: where; None comes where the rows do not depend on one.
        picked: the weights of the rows' entries in each sum, [K, *rows.shape].

    Returns:
        [K, ...] each.

    Raises:
        RuntimeError: an operator cannot be batched, or the reasons of ``derivatives``.
    """
    there: list[bool] = []

    def came(weights: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(
            [rows],
            tensors,  # type: ignore[arg-type]  # edges and tensors may be mixed
            grad_outputs=[weights],
            retain_graph=True,
            allow_unused=True,
        )
        there.extend(one is not None for one in found)
        return [one for one in found if one is not None]

    # vmap around grad() rather than its is_grads_batched: the nodes of taps call operators that
    # torch takes apart before they are batched, which only vmap does.
    values = iter(torch.vmap(came)(picked))
    return [next(values) if one else None for one in there]
