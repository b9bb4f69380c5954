"""The tap: a statistic is delivered as the gradient of the buffer that holds its average.

``tapped(y, ...)`` returns y. While the factor buffers require gradients, y passes through two
autograd nodes: a *source* makes a zero of y's shape without memory, whose backward turns the
derivative g into factor statistics; an *identity* hands g on to y and to the source. The engine
skips what nobody asks for, so ``autograd.grad(loss, factors)`` multiplies no weight gradient and
``autograd.grad(loss, parameters)`` no statistic.

While a collection is open, small taps have no nodes (``ops/state.py``), and ``noted_statistics``
forms what the sources would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.autograd.graph import Node
from torch.overrides import has_torch_function

from kfac_fx.errors import ObservationError
from kfac_fx.ops.case_gradients import join, joinable, of_tangents
from kfac_fx.ops.columns import (
    ColumnStatistics,
    Context,
    Recorded,
    Statistics,
    node_class,
    register_use,
)
from kfac_fx.ops.gram import Rows, Statistic, added
from kfac_fx.ops.library import LIBRARY, left_to_python
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.state import (
    SPARSE,
    Collection,
    FactorState,
    collecting,
    collecting_now,
    leave_note,
    notable,
    state_of,
)
from kfac_fx.torch_internals import pytree
from kfac_fx.torch_internals.jvp_levels import below_jvp
from kfac_fx.torch_internals.onlookers import (
    forward_mode,
    transforms_active,
    unwrap_dead_wrappers,
    unwrapped,
)

OTHER_SHAPE = (
    "a layer was replaced by one of another size (transform the model again), or one reads its "
    "cases where it has its features, as of a transposed batch, x.t() (leave its parameters out "
    "with transform(..., exclude=...))"
)
"""Why statistics may have another shape than their factors, and what to do."""


class _Unbatched(torch.autograd.Function):
    """The base of functions that torch.func.vmap cannot go through; an error says why."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call the ``apply`` of autograd functions, without inspecting signatures where it can."""
        # At every layer of every forward: inspection of signatures is most of what apply does.
        if transforms_active():
            return super().apply(*args)
        bare: Any = super(torch.autograd.Function, cls)
        return bare.apply(*unwrap_dead_wrappers(args))

    @staticmethod
    def vmap(*_: object) -> Tensor:
        raise ObservationError(
            "torch.func.vmap over the network hides the cases from its taps: call it on batches, "
            "and take derivatives with torch.func.jvp, one direction at a time"
        )


class _Source(_Unbatched):
    """A zero-strided zero of y's shape whose backward returns the statistics."""

    @staticmethod
    def forward(
        y: Tensor,
        statistics: Statistics,
        states: Sequence[FactorState],
        saved: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        if y.numel() == 0:
            raise ObservationError(
                f"statistics are to be recorded of a tensor of sizes {list(y.shape)}, and a mean "
                "over none is no number: leave batches without cases out, and parameters of "
                "layers without features with transform(..., exclude=...)"
            )
        return y.new_zeros(()).expand(y.shape)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, statistics, states, saved, *tensors = inputs
        ctx.statistics = statistics
        ctx.states = states
        ctx.saved = saved
        ctx.save_for_backward(*tensors[: ctx.saved])
        # Buffers are kept by reference: their averages may change before the backward.
        ctx.factors = tuple(tensors[ctx.saved :])

    @staticmethod
    def jvp(ctx: Context, y: Tensor, *others: Tensor | None) -> Tensor:
        tensors = others[3 : 3 + ctx.saved]
        statistics = of_tangents(ctx.statistics, ctx.states)
        zero: Tensor = _Source.apply(y, statistics, ctx.states, ctx.saved, *tensors, *ctx.factors)
        return zero

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (4 + ctx.saved)
        needed = ctx.needs_input_grad[len(nothing) :]
        saved = partial(getattr, ctx, "saved_tensors")
        found = _delivered(ctx.statistics, g, saved, ctx.factors, ctx.states, needed)
        # An input factor that was formed for a noted tap may come as rows.
        values = [v.product() if isinstance(v, Rows) else v for v in found]
        for value, factor in zip(values, ctx.factors, strict=True):
            if value is not None and value.shape != factor.shape:  # autograd's own words are others
                raise ObservationError(
                    f"a statistic has the shape {list(value.shape)}, where its factor has "
                    f"{list(factor.shape)}: {OTHER_SHAPE}"
                )
        return (*nothing, *values)


def _delivered(
    statistics: Statistics,
    g: Tensor,
    saved: Callable[[], Sequence[Tensor | None]],
    factors: Sequence[Tensor],
    states: Sequence[FactorState],
    needed: Sequence[bool],
) -> Sequence[Statistic | None]:
    """Return what a tap leaves for its factors, from the derivative that has arrived.

    Args:
        saved: gives what the tap has seen of the forward; it may raise, so only if it is needed.
        needed: per factor, whether autograd asks for it.
    """
    wanted = [n and not state.paused for n, state in zip(needed, states, strict=True)]
    # The training backward comes through paused taps: it must cost nothing but this.
    if not any(wanted):
        return [None] * len(wanted)
    # Sparse inputs (bags of words, adjacency matrices) are made dense here, one tap at a time and
    # only while it forms its statistics: A is dense anyway, and rows are read in many ways (means
    # over positions, sub-blocks, ones appended) that torch has for dense tensors alone.
    seen = [t if t is None or t.layout not in SPARSE else t.to_dense() for t in saved()]
    # The first factor is A, or the only one. A is asked for once a backward, G may be paused.
    first = states[0]
    first.deliveries += wanted[0]
    may = first.joined > 0 and first.gathering is not None and first.gathering.on
    if may and join(statistics, g, seen, wanted, factors[0].dtype, states):
        # Zeros say that something has come. Factors are formed when all streams are there.
        zeros = [g.new_zeros((), dtype=factor.dtype).expand(factor.shape) for factor in factors]
        return [zero if asked else None for zero, asked in zip(zeros, wanted, strict=True)]
    return statistics(g, seen, wanted, factors[0].dtype)


@torch.no_grad()
def noted_statistics(
    collection: Collection,
    derivatives: Sequence[Tensor | None],
    others: Sequence[Statistic | None],
) -> list[Statistic | None]:
    """Return the sums of the statistics of noted taps, in the order of the collection's buffers.

    Args:
        collection: the collection of the pass.
        derivatives: at the edges of its notes; None where none came.
        others: what the nodes of other taps have brought to the buffers.

    Raises:
        ObservationError: what a tap has seen was changed in place.
    """
    found = list(others)
    with collecting(collection, forming=True):
        for note, g in zip(collection.notes, derivatives, strict=True):
            if g is None:
                continue
            needed = [factor.requires_grad for factor in note.factors]
            values = _delivered(note.statistics, g, note.seen, note.factors, note.states, needed)
            for state, value in zip(note.states, values, strict=True):
                place = collection.places[state]
                before = found[place]
                found[place] = value if before is None else added(before, value)
    return found


def of_columns(
    statistics: Statistics,
    g: Tensor,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dtype: torch.dtype,
) -> Sequence[Statistic | None]:
    """Return the sums over columns of statistics of any kind; see ``ColumnStatistics``."""
    if isinstance(statistics, ColumnStatistics):
        return statistics.columns(g, tensors, wanted, dtype)
    # Always right: the statistics of one column after the other. Kinds whose statistics do not
    # depend on which case a row is of have a shorter way.
    total: list[Statistic | None] = [None] * len(wanted)
    for column in g:
        found = statistics(column, tensors, wanted, dtype)
        total = [added(one, other) for one, other in zip(total, found, strict=True)]
    return total


def _recorded(node: Context) -> Recorded:
    """Return what the source of a tap records; see ``kfac_fx.ops.columns.register_use``."""

    def form(g: Sequence[Tensor], wanted: Sequence[bool]) -> Sequence[Statistic | None]:
        dtype = node.factors[0].dtype
        return of_columns(node.statistics, g[0], node.saved_tensors, wanted, dtype)

    return Recorded(node.factors, form, node.statistics)


register_use(_Source, _recorded)


class _Identity(_Unbatched):
    """y, whose backward hands its derivative to y and to the source."""

    @staticmethod
    def forward(y: Tensor, source: Tensor, asked: Callable[[], bool] | None) -> Tensor:
        # Not recorded as a view: the model may go on with an in-place operation on y.
        alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return alias

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.asked = inputs[2]

    @staticmethod
    def jvp(ctx: Context, y: Tensor, source: Tensor | None, _: None) -> Tensor:
        return y if source is None else joined(y, source, ctx.asked)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, Tensor, None]:
        # Gradients are enabled in a backward only if it may itself be differentiated.
        return (_handed_on(g, ctx.asked) if torch.is_grad_enabled() else g), g, None


def tapped_by(y: Tensor) -> set[Node]:
    """Return the nodes that make statistics of the derivative of y as it is."""
    found: set[Node] = set()
    identity = node_class(_Identity)
    node = y.grad_fn
    while node is not None and isinstance(node, identity):
        (node, _), (side, _) = node.next_functions[:2]
        if side is not None:
            found.add(side)
    return found


def _handed_on(g: Tensor, asked: Callable[[], bool] | None) -> Tensor:
    """Return g, such that statistics cannot miss in silence that it is itself differentiated."""
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
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.asked = inputs[1]

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, None]:
        if ctx.asked():
            raise ObservationError(
                "the outputs hold a derivative of the network by torch.autograd.grad or "
                "torch.func.grad, in which the parameters are used where no tap sees it: take it "
                "with torch.func.jvp, in forward mode, whose uses are recorded"
            )
        return g, None


def recording(factors: Iterable[Tensor | None]) -> bool:
    """Return whether any of the factor buffers asks for statistics."""
    return any(factor is not None and buffer_of(factor).requires_grad for factor in factors)


def buffer_of(factor: Tensor) -> Tensor:
    """Return the buffer itself, out of the wrappers that transforms of torch.func put around it."""
    return unwrapped(factor)


def constant(tensor: Tensor) -> Tensor:
    """Return it detached, but with the tangents of forward mode, which are uses as well."""
    return tensor if forward_mode() else tensor.detach()


def source(
    y: Tensor,
    statistics: Statistics,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
) -> Tensor:
    """Return a zero of y's shape whose derivative becomes the statistics.

    Args:
        y: what is tapped; its derivative is the zero's.
        statistics: computes them from the derivative.
        tensors: what they need of the forward.
        factors: the buffers whose gradients they become.
    """
    buffers = [buffer_of(factor) for factor in factors]
    return _zero(y, statistics, tensors, buffers, [state_of(buffer) for buffer in buffers])


def _zero(
    y: Tensor,
    statistics: Statistics,
    tensors: Sequence[Tensor | None],
    buffers: Sequence[Tensor],
    states: Sequence[FactorState],
) -> Tensor:
    saved = [None if t is None else constant(t) for t in tensors]
    zero: Tensor = _Source.apply(constant(y), statistics, states, len(saved), *saved, *buffers)
    return zero


def joined(y: Tensor, zero: Tensor, asked: Callable[[], bool] | None = None) -> Tensor:
    """Return y, whose derivative reaches the zero too.

    Args:
        y: what is tapped.
        zero: the zero from ``source``.
        asked: whether statistics are asked for, so that a derivative of the derivative would be a
            use that no tap sees; None leaves that unasked.
    """
    result: Tensor = _Identity.apply(y, zero, asked)
    return result


def tapped(
    y: Tensor,
    statistics: Statistics,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
) -> Tensor:
    """Return y, recorded: ``statistics`` gets its derivative and the saved tensors in a backward.

    Where y has a tangent (torch.func.jvp), that is a further use, and recorded as well.

    Args:
        y: the result of a use of parameters.
        statistics: computes the statistics of the use.
        tensors: what they need of the forward.
        factors: the buffers whose gradients they become.
    """
    buffers = [buffer_of(factor) for factor in factors]
    states = [state_of(buffer) for buffer in buffers]

    def asked() -> bool:
        pairs = zip(buffers, states, strict=True)
        return any(buffer.requires_grad and not state.paused for buffer, state in pairs)

    collection = collecting_now.collection
    if collection is not None and collection.takes(y, states):
        hand_on = partial(_handed_on, asked=asked)
        return collection.note(y, statistics, tensors, buffers, states, hand_on)
    if collection is None and all(state.noted for state in states) and notable(y):
        hand_on = partial(_handed_on, asked=asked)
        return leave_note(y, statistics, tensors, buffers, states, hand_on)
    # The call is named before its derivatives are taken, so that their taps know whose they are.
    if forward_mode() and joinable(statistics, states):
        statistics = statistics.of_call(object())

    def recorded(y: Tensor, tensors: Sequence[Tensor | None], order: int) -> Tensor:
        made = statistics
        for _ in range(order):
            made = of_tangents(made, states)
        return joined(y, _zero(y, made, tensors, buffers, states), asked)

    return below_jvp(recorded, y, tensors)


def define(schema: str, body: Callable[..., object]) -> None:
    """Register a tap operator; it is visible in fx and export, traced through by the compiler.

    Args:
        schema: the schema of the operator, in the namespace kfac_fx.
        body: what it does, in terms of other operators and autograd functions.
    """
    name = schema.split("(", 1)[0]
    body = left_to_python(body)
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

    def made(known: Options | None) -> Callable[..., Tensor]:
        """Return the tap, with options that are known or with those that it will be called with."""

        def tap(y: Tensor, *given: Any) -> Tensor:
            buffers = [factor for factor in given[first:last] if factor is not None]
            if not recording(buffers):
                return y
            return record(y, given[:first], buffers, known or options.from_args(given[last:]))

        return tap

    define(f"{name}({schema}) -> Tensor", made(None))
    operator = getattr(torch.ops.kfac_fx, name).default
    _bodies[operator] = 1 + last, lambda given: left_to_python(made(options.from_args(given)))


_bodies: dict[object, tuple[int, Callable[[Sequence[object]], Callable[..., Tensor]]]] = {}
"""By the operator: the number of its tensors, and what makes a function of them with options."""


def bound_tap(node: fx.Node) -> tuple[Callable[..., Tensor], tuple[Any, ...]] | None:
    """Return a call of a tap in a graph as one of a function that has its options already.

    Where nobody looks on who would see an operator, torch's dispatcher does nothing for a tap but
    read its arguments anew at every call, which costs more than what the tap itself does.

    Returns:
        the function and its arguments; None where the node is no tap, or where an option is only
        known when the graph runs.
    """
    operator: Any = node.target
    found = _bodies.get(operator)
    if found is None or node.kwargs:
        return None
    count, made = found
    options = node.args[count:]
    if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(options)):
        return None
    tap = made(options)

    def bound(*tensors: Tensor | None) -> Tensor:
        # Subclasses of Tensor look on at each call inside of a plain function, and wrap its results
        # anew: a note would be left at the node of the wrapping, where nobody looks for it. Within
        # an operator they are switched off.
        if has_torch_function(tensors):
            result: Tensor = operator(*tensors, *options)
            return result
        return tap(*tensors)

    return bound, node.args[:count]
