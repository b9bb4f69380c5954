"""The tap: a statistic is delivered as the gradient of the buffer that holds its average.

``tapped(y, ...)`` returns y. While the factor buffers require gradients, y passes through two
autograd nodes: a *source* makes a zero of y's shape without memory, whose backward turns the
derivative g into factor statistics; an *identity* hands g on to y and to the source. The engine
skips what nobody asks for, so ``autograd.grad(loss, factors)`` multiplies no weight gradient and
``autograd.grad(loss, parameters)`` no statistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

LIBRARY = torch.library.Library("kfac_fx", "DEF")

_paused: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Statistics(Protocol):
    """Computes the statistics of one kind of use."""

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> Sequence[Tensor | None]:
        """One statistic a factor buffer, None where not wanted.

        Args:
            g: derivative with respect to the tapped tensor.
            tensors: what the tap saved of the forward pass.
            wanted: per factor buffer, whether its statistic is asked for.
            dtype: the factors' dtype; products are formed in it.
        """


def pause(factors: Iterable[Tensor]) -> None:
    """Lets backward passes of graphs that are already built skip these factors."""
    for factor in factors:
        _paused[factor] = True


def resume(factors: Iterable[Tensor]) -> None:
    """Undoes ``pause``."""
    for factor in factors:
        _paused.pop(factor, None)


def is_paused(factor: Tensor) -> bool:
    """Whether backward passes skip the factor."""
    return factor in _paused


@contextmanager
def only(factors: Iterable[Tensor], wanted: Iterable[Tensor]) -> Iterator[None]:
    """Within the context, backward passes form the statistics of ``wanted`` alone."""
    skipped = {id(f): f for f in factors}
    for factor in wanted:
        skipped.pop(id(factor), None)
    pause(skipped.values())
    try:
        yield
    finally:
        resume(skipped.values())


class _Source(torch.autograd.Function):
    """A zero-strided zero of y's shape whose backward returns the statistics."""

    @staticmethod
    def forward(y: Tensor, statistics: Statistics, saved: int, *tensors: Tensor | None) -> Tensor:
        return y.new_zeros(()).expand(y.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.statistics, ctx.saved, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.saved])
        # Buffers are kept by reference: their averages may change before the backward.
        ctx.factors = tuple(tensors[ctx.saved :])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (3 + ctx.saved)
        needed = ctx.needs_input_grad[len(nothing) :]
        wanted = [n and f not in _paused for n, f in zip(needed, ctx.factors, strict=True)]
        if not any(wanted):
            return (*nothing, *(None for _ in wanted))
        dtype = ctx.factors[0].dtype
        return (*nothing, *ctx.statistics(g, ctx.saved_tensors, wanted, dtype))


class _Identity(torch.autograd.Function):
    """y, whose backward hands its derivative to y and to the source."""

    @staticmethod
    def forward(y: Tensor, source: Tensor) -> Tensor:
        # Not recorded as a view: the model may go on with an in-place operation on y.
        alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return alias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, g


def recording(factors: Iterable[Tensor | None]) -> bool:
    """Whether any of the factor buffers asks for statistics."""
    return any(factor is not None and factor.requires_grad for factor in factors)


def source(
    y: Tensor,
    statistics: Statistics,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
) -> Tensor:
    """A zero of y's shape whose derivative becomes the statistics."""
    saved = [None if t is None else t.detach() for t in tensors]
    zero: Tensor = _Source.apply(y.detach(), statistics, len(saved), *saved, *factors)
    return zero


def joined(y: Tensor, zero: Tensor) -> Tensor:
    """y, whose derivative reaches the zero too."""
    result: Tensor = _Identity.apply(y, zero)
    return result


def tapped(
    y: Tensor,
    statistics: Statistics,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
) -> Tensor:
    """y, recorded: ``statistics`` gets its derivative and the saved ``tensors`` in the backward."""
    return joined(y, source(y, statistics, tensors, factors))


def define(schema: str, body: Any) -> None:
    """Registers a tap operator; it is visible in fx and export, traced through by the compiler."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, body, "CompositeImplicitAutograd")
