"""Compare a captured module with its model, once, on the example inputs.

A route that is silently wrong would make everything that follows wrong: a graph that froze a branch
still trains, and its factors are those of another model.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.capture.symbolic_trace import user_line
from kfac_fx.capture.undisturbed import fresh, tensors_in, undisturbed
from kfac_fx.errors import CaptureError

log = logging.getLogger("kfac_fx")

TOLERANCE = 1e-4
"""Largest difference, relative to the largest entry; low precisions are allowed more."""


class Behaviour(NamedTuple):
    """The outputs and gradients of one run.

    Attributes:
        outputs: all tensors that were returned, in order.
        gradients: those of a fixed combination of the outputs by parameter name; None where
            autograd refuses.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor] | None


class SelfCheck:
    """Know what the model does with the example inputs, in the modes that it is in.

    Args:
        model: runs once here, and once more where a capture differs.
        args: positional example inputs; each run gets copies.
        kwargs: keyword example inputs, likewise.

    Raises:
        CaptureError: the model fails on them; its own error is the cause.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._inputs = (args, kwargs)
        try:
            self._expected = self._run(model)
        except Exception as error:  # any code of the user's may run here
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs at "
                f"{user_line(error)}: {error}"
            ) from error

    def compare(self, module: nn.Module) -> None:
        """Run the captured module and compare.

        Args:
            module: the capture, with the model's own parameters.

        Raises:
            CaptureError: it fails, or its outputs or gradients are others.
        """
        try:
            got = self._run(module)
        except Exception as error:  # the captured code is the user's
            raise CaptureError(
                f"the captured graph fails on the example inputs: {error}"
            ) from error
        found = _difference(got, self._expected)
        if found is None:
            return
        # A model that differs from itself (random numbers outside of torch, atomics) says nothing
        # about its capture.
        if _difference(self._run(self._model), self._expected) is not None:
            log.info("the model does not repeat itself: its capture cannot be checked")
            return
        raise CaptureError(f"on the example inputs {found}")

    def _run(self, module: nn.Module) -> Behaviour:
        args, kwargs = fresh(self._inputs)
        with undisturbed(self._model):
            # Dropout draws the same masks in the model and in its capture, if it is called in the
            # same order; ``undisturbed`` puts the state of the generator back.
            torch.manual_seed(0)
            found = enumerate(tensors_in(module(*args, **kwargs)))
            outputs = {f"output {index}": tensor for index, tensor in found}
            gradients = _gradients(module, list(outputs.values()))
            return Behaviour({k: t.detach().clone() for k, t in outputs.items()}, gradients)


def _gradients(module: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor] | None:
    """Return the gradients of a combination of the outputs with fixed weights.

    The weights differ from entry to entry, since the plain sum may be a constant (of a softmax).
    None where autograd refuses: reentrant checkpoints allow backward() only.
    """
    named = {f"gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad}
    parts = [o for o in outputs if o.requires_grad and o.is_floating_point()]
    if not parts or not named:
        return {}
    loss = torch.zeros((), device=parts[0].device)
    for part in parts:
        dtype = torch.promote_types(part.dtype, torch.float32)
        weights = torch.arange(part.numel(), device=part.device).cos().to(dtype)
        loss = loss + (part.to(dtype).flatten() @ weights).to(loss.device)
    try:
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    except RuntimeError as error:
        log.info("gradients of the capture are not checked: %s", error)
        return None
    dense = (g if g is None or g.layout is torch.strided else g.to_dense() for g in found)
    return {n: g for n, g in zip(named, dense, strict=True) if g is not None}


def _difference(got: Behaviour, want: Behaviour) -> str | None:
    """Return the first difference in words, None where there is none."""
    if got.outputs.keys() != want.outputs.keys():
        return f"it returns {len(got.outputs)} tensors, the model {len(want.outputs)}"
    for name, expected in want.outputs.items():
        if got.outputs[name].shape != expected.shape:
            return f"the shape of {name} is {got.outputs[name].shape}, not {expected.shape}"
        found = _distance(got.outputs[name], expected, 0.0)
        if found is not None:
            return f"{name} differs from the model's by {found:.2g} of its size"
    if got.gradients is None or want.gradients is None:
        return None
    # A gradient that is zero up to rounding is compared on the scale of the largest one: relative
    # to its own size, any two such gradients differ.
    largest = max((float(g.abs().max()) for g in want.gradients.values() if g.numel()), default=0.0)
    for name in dict.fromkeys((*got.gradients, *want.gradients)):
        like = want.gradients.get(name, got.gradients.get(name))
        assert like is not None
        one, other = (
            gradients.get(name, torch.zeros_like(like))
            for gradients in (got.gradients, want.gradients)
        )
        found = _distance(one, other, 1e-2 * largest)
        if found is not None:
            return f"the {name} differs from the model's by {found:.2g} of its size"
    return None


def _distance(got: Tensor, want: Tensor, floor: float) -> float | None:
    """Return the largest difference relative to the largest entry, None where it is tolerated.

    Args:
        got: what the capture made.
        want: what the model made.
        floor: the least value to which a difference is relative.
    """
    if not want.numel():
        return None
    tolerance = TOLERANCE
    if want.is_floating_point() or want.is_complex():
        # Eight units in the last place: sums in another order differ by about that.
        tolerance = max(TOLERANCE, 8 * torch.finfo(want.dtype).eps)
    kind = torch.complex128 if want.is_complex() else torch.float64
    got = got.cpu().to(kind)
    want = want.cpu().to(kind)
    equal = (got == want) | (got.isnan() & want.isnan())
    if bool(equal.all()):
        return None
    scale = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
    distance = float((got - want)[~equal].abs().max()) / max(scale, floor, 1e-30)
    return None if distance <= tolerance else distance
