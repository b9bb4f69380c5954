"""The tap: a statistic is delivered as the gradient of the buffer that holds its average.

``tapped(y, ...)`` returns y. While the factor buffers require gradients, y passes through two
autograd nodes: a *source* makes a zero of y's shape without memory, whose backward turns the
derivative g into factor statistics; an *identity* hands g on to y and to the source. The engine
skips what nobody asks for, so ``autograd.grad(loss, factors)`` multiplies no weight gradient and
``autograd.grad(loss, parameters)`` no statistic.

Inside of ``notes.noting()``, small taps have no nodes (notes.py), and ``noted_statistics`` forms
what the sources would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.utils.weak import WeakIdKeyDictionary

from kfac_fx.errors import ObservationError
from kfac_fx.ops.library import LIBRARY
from kfac_fx.ops.modes import forward_mode
from kfac_fx.ops.notes import Note, noted, open_notes
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.rows import Statistic, kept_rows, multiplied

_paused: WeakIdKeyDictionary = WeakIdKeyDictionary()
_passes: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Statistics(Protocol):
    """Computes the statistics of one kind of use."""

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> Sequence[Statistic | None]:
        """One statistic a factor buffer, None where not wanted.

        Args:
            g: derivative with respect to the tapped tensor.
            tensors: what the tap saved of the forward pass.
            wanted: per factor buffer, whether its statistic is asked for.
            dtype: of the factors; products are formed in it.
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
    return bool(_paused) and factor in _paused  # mostly none is, and a weak key costs


def passes(factor: Tensor) -> int:
    """How many taps have delivered statistics of the factor since ``forget_passes``, at least 1."""
    found: int = _passes.get(factor, 1)
    return found


def forget_passes(factors: Iterable[Tensor]) -> None:
    """Starts counting anew."""
    for factor in factors:
        _passes.pop(factor, None)


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


class _Unbatched(torch.autograd.Function):
    """What torch.func.vmap cannot go through."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Function's own, without its inspection of signatures, which takes most of its time."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        bare: Any = super(torch.autograd.Function, cls)
        return bare.apply(*unwrap_dead_wrappers(args))

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise ObservationError(
            "torch.func.vmap over the network hides the cases from its taps: call it on batches, "
            "and take derivatives with torch.func.jvp, one direction at a time"
        )


class _Source(_Unbatched):
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
    def jvp(ctx: Any, y: Tensor, *others: Tensor | None) -> Tensor:
        tensors = others[2 : 2 + ctx.saved]
        zero: Tensor = _Source.apply(
            y, _of_tangents(ctx.statistics), ctx.saved, *tensors, *ctx.factors
        )
        return zero

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (3 + ctx.saved)
        needed = ctx.needs_input_grad[len(nothing) :]
        saved = partial(getattr, ctx, "saved_tensors")
        found = _delivered(ctx.statistics, g, saved, ctx.factors, needed)
        return (*nothing, *(multiplied(value) for value in found))


def _delivered(
    statistics: Statistics,
    g: Tensor,
    saved: Callable[[], Sequence[Tensor | None]],
    factors: Sequence[Tensor],
    needed: Sequence[bool],
) -> Sequence[Statistic | None]:
    """What a tap leaves for its factors, from the derivative that has arrived."""
    wanted = [n and not is_paused(f) for n, f in zip(needed, factors, strict=True)]
    if not any(wanted):
        return [None] * len(wanted)
    if wanted[0]:
        _passes[factors[0]] = _passes.get(factors[0], 0) + 1
    return statistics(g, saved(), wanted, factors[0].dtype)


@torch.no_grad()
def noted_statistics(
    notes: Sequence[Note], derivatives: Sequence[Tensor | None]
) -> dict[int, Statistic]:
    """The sums of the statistics of noted taps, by id of factor buffer.

    Args:
        derivatives: at the notes' edges; None where none came.

    Raises:
        ObservationError: what a tap has seen was changed in place.
    """
    found: dict[int, Statistic] = {}
    for note, g in zip(notes, derivatives, strict=True):
        if g is None:
            continue
        needed = [factor.requires_grad for factor in note.factors]
        with kept_rows():
            values = _delivered(note.statistics, g, note.seen, note.factors, needed)
        for key, value in zip(map(id, note.factors), values, strict=True):
            if value is not None:
                found[key] = multiplied(found[key]) + multiplied(value) if key in found else value
    return found


class _Identity(_Unbatched):
    """y, whose backward hands its derivative to y and to the source."""

    @staticmethod
    def forward(y: Tensor, source: Tensor, asked: Callable[[], bool] | None) -> Tensor:
        # Not recorded as a view: the model may go on with an in-place operation on y.
        alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return alias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.asked = inputs[2]

    @staticmethod
    def jvp(ctx: Any, y: Tensor, source: Tensor | None, _: None) -> Tensor:
        return y if source is None else joined(y, source, ctx.asked)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return _handed_on(g, ctx.asked), g, None


def _handed_on(g: Tensor, asked: Callable[[], bool] | None) -> Tensor:
    """g; where it is itself differentiated, such that statistics cannot miss that in silence."""
    if asked is None or not (torch.is_grad_enabled() and g.requires_grad and asked()):
        return g
    adjoint: Tensor = _Adjoint.apply(g, asked)
    return adjoint


class _Adjoint(_Unbatched):
    """A derivative inside of the forward: the parameters are used in it too, unseen by taps."""

    @staticmethod
    def forward(g: Tensor, asked: Callable[[], bool]) -> Tensor:
        alias: Tensor = torch.ops.aten._unsafe_view(g, g.shape)
        return alias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.asked = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.asked():
            raise ObservationError(
                "the outputs hold a derivative of the network by torch.autograd.grad or "
                "torch.func.grad, in which the parameters are used where no tap sees it: take it "
                "with torch.func.jvp, in forward mode, whose uses are recorded"
            )
        return g, None


def _of_tangents(statistics: Any) -> Statistics:
    made: Statistics | None = statistics.tangent() if hasattr(statistics, "tangent") else None
    if made is None:
        raise ObservationError(
            f"{type(statistics).__name__.removesuffix('Statistics')} statistics record no "
            "derivatives of the network by torch.func.jvp; those of linear and convolution layers "
            "do: leave the parameters out with transform(..., exclude=...)"
        )
    return made


def recording(factors: Iterable[Tensor | None]) -> bool:
    """Whether any of the factor buffers asks for statistics."""
    return any(factor is not None and buffer_of(factor).requires_grad for factor in factors)


def buffer_of(factor: Tensor) -> Tensor:
    """The buffer itself, out of the wrappers that transforms of torch.func put around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(factor):
        factor = torch._C._functorch.get_unwrapped(factor)
    return factor


def constant(tensor: Tensor) -> Tensor:
    """Detached, but for the tangents of forward-mode derivatives, which are uses as well."""
    return tensor if forward_mode() else tensor.detach()


def source(
    y: Tensor,
    statistics: Statistics,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
) -> Tensor:
    """A zero of y's shape whose derivative becomes the statistics."""
    saved = [None if t is None else constant(t) for t in tensors]
    buffers = [buffer_of(factor) for factor in factors]
    zero: Tensor = _Source.apply(constant(y), statistics, len(saved), *saved, *buffers)
    return zero


def joined(y: Tensor, zero: Tensor, asked: Callable[[], bool] | None = None) -> Tensor:
    """y, whose derivative reaches the zero too."""
    result: Tensor = _Identity.apply(y, zero, asked)
    return result


def tapped(
    y: Tensor,
    statistics: Statistics,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
) -> Tensor:
    """y, recorded: ``statistics`` gets its derivative and the saved ``tensors`` in the backward.

    Where y has a tangent (torch.func.jvp), that is a further use, and recorded as well.
    """
    buffers = [buffer_of(factor) for factor in factors]

    def asked() -> bool:
        return any(factor.requires_grad and not is_paused(factor) for factor in buffers)

    notes = open_notes(y, buffers)
    if notes is not None:
        hand_on = partial(_handed_on, asked=asked)
        return noted(notes, y, statistics, tensors, buffers, hand_on)
    return joined(y, source(y, statistics, tensors, buffers), asked)


def define(schema: str, body: Any) -> None:
    """Registers a tap operator; it is visible in fx and export, traced through by the compiler."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, body, "CompositeImplicitAutograd")
    # Transforms of torch.func would else run the body beneath them, where no Function can be.
    LIBRARY.impl(name, body, "FuncTorchDynamicLayerFrontMode")


Options = TypeVar("Options", bound=TapOptions)
Record = Callable[[Tensor, Sequence[Tensor | None], Sequence[Tensor], Options], Tensor]
"""(y, saved tensors, factor buffers, options) -> y, recorded; usually one call of ``tapped``."""


def define_tap(
    name: str,
    options: type[Options],
    record: Record[Options],
    *,
    tensors: Sequence[str] = ("x",),
    factors: Sequence[str] = ("A", "G", "positions?"),
) -> None:
    """Register the tap operator of one kind of use: ``name(y, *tensors, *factors, *options) -> y``.

    Args:
        name: under which graphs call it, as ``torch.ops.kfac_fx.<name>``.
        options: the class of its options, whose fields end the operator's schema.
        record: called while at least one factor buffer asks for statistics, with the buffers that
            are there; otherwise the operator returns y as it is.
        tensors: names of what else the statistics are formed of; one that ends in "?" may be None.
        factors: names of the factor buffers, with the same mark. "positions?" is a buffer only
            where the positions of several uses are counted together.
    """
    arguments = ("y", *tensors, *factors)
    schema = ", ".join(
        [f"Tensor{'?' * word.endswith('?')} {word.rstrip('?')}" for word in arguments]
        + [options.schema()] * bool(options.schema())
    )
    first, last = len(tensors), len(tensors) + len(factors)

    def body(y: Tensor, *given: Any) -> Tensor:
        buffers = [factor for factor in given[first:last] if factor is not None]
        if not recording(buffers):
            return y
        return record(y, given[:first], buffers, options.from_args(given[last:]))

    define(f"{name}({schema}) -> Tensor", body)
