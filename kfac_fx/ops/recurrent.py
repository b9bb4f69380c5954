"""Recurrent layers and cells: torch's own operator, or its steps with taps while recording.

Each operator has the name and the arguments of torch's own, followed by ``factors`` and
``reduce``, and may be called without ``hx`` and without a batch, like the modules of torch.nn.
``factors`` holds the ``ProductFactors`` of the uses of weight_ih and of weight_hh, for every layer
and direction. While any of them asks for statistics the steps run one by one; otherwise torch's
operator runs.

The whole call is replaced, as no tap after it could see the previous hidden states, which weight_hh
multiplies. A weight of T steps is used T times: docs/explanation/mathematics.md, section 4, "one
parameter used several times".

A packed batch has operators of its own (``packed_lstm``), with the sizes of its steps: cases end
while others go on, and nothing is computed for padding.

On a CPU both draw the same dropout masks; elsewhere the fused operator has a random stream of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.columns import Statistics
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.kronecker import (
    FactorForm,
    LinearOptions,
    LinearStatistics,
    ShiftStatistics,
    form_of,
)
from kfac_fx.ops.options import TapOptions
from kfac_fx.ops.tap import define, joined, of_columns, recording, source, tapped
from kfac_fx.ops.time_steps import (
    PackedLinearStatistics,
    PackedShiftStatistics,
    PackedSteps,
    PaddedSteps,
    TimeSteps,
)

State = tuple[Tensor, ...]
Hidden = Tensor | Sequence[Tensor] | None
"""What torch's operators start from: h, or of an LSTM (h, c)."""

TimeStep = Callable[[Tensor, Tensor, State], State]
"""Both pre-activations [N, gates * H] and the state [N, H] (and the cell's) -> the next state."""


def _lstm(ih: Tensor, hh: Tensor, state: State) -> State:
    i, f, g, o = (ih + hh).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(ih: Tensor, hh: Tensor, state: State) -> State:
    (h,) = state
    r_ih, z_ih, n_ih = ih.chunk(3, -1)
    r_hh, z_hh, n_hh = hh.chunk(3, -1)
    r, z = (r_ih + r_hh).sigmoid(), (z_ih + z_hh).sigmoid()
    n = (n_ih + r * n_hh).tanh()
    return ((h - n) * z + n,)


def _tanh(ih: Tensor, hh: Tensor, state: State) -> State:
    return ((ih + hh).tanh(),)


def _relu(ih: Tensor, hh: Tensor, state: State) -> State:
    return ((ih + hh).relu(),)


STEPS: dict[str, TimeStep] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
CELLS: dict[str, str] = {f"{name}_cell": name for name in STEPS}
PACKED: dict[str, str] = {f"packed_{name}": name for name in STEPS}


class ProductFactors(NamedTuple):
    """The factor buffers of one product of a recurrent layer; None where there is no such factor.

    Attributes:
        A: over the inputs of all steps.
        G: over the product's outputs, gates stacked.
        positions: the number of steps, where uses are counted together.
        C: covariance of a bias whose weight is not in its block.
    """

    A: Tensor | None
    G: Tensor | None
    positions: Tensor | None
    C: Tensor | None


SLOTS = len(ProductFactors._fields)
"""Entries of an operator's ``factors`` that belong to one product."""


@dataclass(frozen=True)
class RecurrentOptions(TapOptions):
    """Options that follow the factors of a recurrent operator.

    Attributes:
        reduce: whether steps are reduced rather than expanded.
    """

    reduce: bool


@dataclass(frozen=True)
class PackedOptions(TapOptions):
    """Arguments of torch's operators of layers after the parameters, in their order.

    Attributes:
        has_biases: whether every product has a bias.
        num_layers: layers on top of each other.
        dropout: probability that an output is dropped between layers, in training.
        train: whether the layer is in training.
        bidirectional: whether every layer also runs from the last step to the first.
    """

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool


@dataclass(frozen=True)
class LayerOptions(PackedOptions):
    """The same for inputs of one length.

    Attributes:
        batch_first: whether cases are the input's first dimension rather than its second.
    """

    batch_first: bool


@dataclass(frozen=True)
class _StepStatistics:
    """Statistics of a product over all steps whose inputs become known step by step.

    All steps of a layer share one tap: their derivatives arrive together at its source, and the
    inputs are put together only then. A tap a step would multiply T small matrices.
    """

    statistics: Statistics
    steps: TimeSteps
    inputs: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> Sequence[Statistic | None]:
        """Return those of the product over all steps."""
        x = self.steps.joined(self.inputs) if wanted[0] else self.inputs[0]
        return self.statistics(g, [x], wanted, dtype)

    def columns(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> Sequence[Statistic | None]:
        """Return those of the product over all steps, summed over columns."""
        return of_columns(self.statistics, g, self.inputs[:1], wanted, dtype)


class _Recorded(NamedTuple):
    """One tap of a product.

    Attributes:
        statistics: what it forms of the product's input and derivative.
        factors: the buffers that ask for them.
    """

    statistics: Statistics
    factors: list[Tensor]


@dataclass(frozen=True)
class _Dense:
    """A weight with its bias, and the factors that they have.

    Attributes:
        weight, bias: the parameters.
        factors: the buffers.
        reduce: see ``RecurrentOptions``.
        sizes: those of the steps of a packed batch; None where the first dimension counts cases.
    """

    weight: Tensor
    bias: Tensor | None
    factors: ProductFactors
    reduce: bool
    sizes: tuple[int, ...] | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def recorded(self) -> Iterator[_Recorded]:
        """Yield what is recorded of the product."""
        # Which factors there are says how the parameters were gathered into blocks: a bias that is
        # used elsewhere without its weight has C alone, and then A has no homogeneous coordinate.
        A, G, positions, C = self.factors
        if A is not None and G is not None:
            bias = A.shape[-1] > self.weight.shape[1]  # a bias may be left out of the block
            options = LinearOptions((-1,), (-1,), (), (), bias, self.reduce)
            factors = [A, G] if positions is None else [A, G, positions]
            if recording(factors):
                yield _Recorded(self._linear(options, form_of(A), form_of(G)), factors)
        if C is not None and recording([C]):
            yield _Recorded(self._shift(C.dim()), [C])

    def _linear(self, options: LinearOptions, A: FactorForm, G: FactorForm) -> LinearStatistics:
        if self.sizes is None:
            return LinearStatistics(options, A, G)
        return PackedLinearStatistics(options, A, G, sizes=self.sizes)

    def _shift(self, dim: int) -> ShiftStatistics:
        if self.sizes is None:
            return ShiftStatistics((-1,), dim)
        return PackedShiftStatistics((-1,), dim, self.sizes)

    def tapped(self, x: Tensor) -> Tensor:
        """Return the recorded product of x [N, T, in], [N, in] or the rows of a packed batch."""
        y = self(x)
        for found in self.recorded():
            # A bias's covariance needs no input, and the model may write into what is not saved.
            saved = [x] if isinstance(found.statistics, LinearStatistics) else []
            y = tapped(y, found.statistics, saved, found.factors)
        return y


Uses = tuple[_Dense, _Dense]
"""The products with weight_ih and weight_hh, of one layer and direction."""


def _uses(
    params: Sequence[Tensor | None],
    biased: bool,
    factors: Sequence[Tensor | None],
    reduce: bool,
    sizes: tuple[int, ...] | None = None,
) -> list[Uses]:
    """Return one pair for each layer and direction, from torch's flat list of parameters."""
    width = 4 if biased else 2
    result: list[Uses] = []
    for index in range(len(params) // width):
        held = params[index * width : (index + 1) * width]
        pair = []
        for side in (0, 1):
            start = (2 * index + side) * SLOTS
            weight, bias = held[side], held[2 + side] if biased else None
            assert weight is not None
            own = ProductFactors._make(factors[start : start + SLOTS])
            pair.append(_Dense(weight, bias, own, reduce, sizes))
        result.append((pair[0], pair[1]))
    return result


def _direction(
    x: Tensor, first: State, uses: Uses, step: TimeStep, back: bool, steps: TimeSteps
) -> tuple[Tensor, State]:
    """Run one layer in one direction.

    Args:
        x: inputs of all steps, [T, N, in] or the rows of a packed batch.
        first: the states to start from, [N, H] each.
        uses: the products.
        step: makes the next state.
        back: whether it runs from the last step to the first.
        steps: says where the steps are.

    Returns:
        The hidden states of all steps, as x has them, and the last state of every case.
    """
    ih, hh = uses
    inputs = ih.tapped(steps.seen(x))
    # Under autocast the products are of lower precision than the states that are given.
    first = tuple(s.to(inputs.dtype) for s in first)
    # One source for all steps, made before the first: each step takes its slice, and the
    # derivatives of all arrive at once in its backward.
    like = inputs.new_empty(()).expand(*inputs.shape[:-1], len(hh.weight))
    seen: list[Tensor] = []
    zeros = [
        steps.split(source(like, _StepStatistics(each.statistics, steps, seen), [], each.factors))
        for each in hh.recorded()
    ]
    parts = list(zip(steps.sizes, steps.split(inputs), *zeros, strict=True))
    state = tuple(s[: steps.sizes[-1]] for s in first) if back else first
    outputs: list[Tensor] = []
    ended: list[State] = []
    # The previous state is an activation that the loop itself makes, so what weight_hh has read is
    # kept as the loop goes.
    for size, given, *sources in reversed(parts) if back else parts:
        running = len(state[0])
        if size < running:  # the shortest cases are the last ones, and have ended
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        elif size > running:  # backwards, they begin where the others are at work already
            more = (f[running:size] for f in first)
            state = tuple(torch.cat(pair) for pair in zip(state, more, strict=True))
        seen.append(state[0].detach())
        previous = hh(state[0])
        for zero in sources:
            previous = joined(previous, zero)
        state = step(given, previous, state)
        outputs.append(state[0])
    if back:
        seen.reverse()
        outputs.reverse()
    if ended:
        state = tuple(map(torch.cat, zip(state, *reversed(ended), strict=True)))
    return steps.outputs(outputs), state


def _layers(
    x: Tensor,
    states: State,
    uses: list[Uses],
    step: TimeStep,
    options: PackedOptions,
    steps: TimeSteps,
) -> tuple[Tensor, ...]:
    """Run all layers on x [T, N, in] or packed rows, from states [layers * directions, N, H]."""
    directions = 2 if options.bidirectional else 1
    dropout = options.dropout if options.train else 0.0
    finals: list[State] = []
    for index, pair in enumerate(uses):
        layer, back = divmod(index, directions)
        if back == 0:
            if layer and dropout:
                x = F.dropout(x, dropout)
            given, outputs = x, []
        first = tuple(s[index] for s in states)
        y, final = _direction(given, first, pair, step, bool(back), steps)
        finals.append(final)
        outputs.append(y)
        if back == directions - 1:
            x = torch.cat(outputs, -1) if directions > 1 else y
    return x, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _states(hx: Hidden, count: int, zeros: Callable[[], Tensor]) -> State:
    """Return the states to start from: those that are given, or ``count`` of zeros."""
    if hx is None:
        return tuple(zeros() for _ in range(count))
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _check(name: str, what: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise what torch's own operator would, which does not run while statistics are recorded."""
    if tuple(found) != tuple(wanted):
        raise RuntimeError(f"{name}: expected {what} {tuple(wanted)}, got {tuple(found)}")


def _run_layers(
    name: str,
    x: Tensor,
    hx: Hidden,
    params: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Run layers like ``torch.<name>``; ``rest`` is its options, the factors and ours."""
    factors: list[Tensor | None] = rest[-2]
    options, ours = LayerOptions.from_args(rest[:-2]), RecurrentOptions.from_args(rest[-1:])
    batched, batch = x.dim() == 3, 0 if options.batch_first else 1
    if not batched:
        x = x.unsqueeze(batch)
    directions = 2 if options.bidirectional else 1
    shape = (options.num_layers * directions, x.shape[batch], params[1].shape[1])
    states = _states(hx, 2 if name == "lstm" else 1, lambda: x.new_zeros(shape))
    if not batched and hx is not None:
        states = tuple(s.unsqueeze(1) for s in states)
    _check(name, "inputs of size", x.shape[-1:], params[0].shape[1:])
    for s in states:
        _check(name, "hidden states of shape", s.shape, shape)
    # Steps in Python take many times as long as the fused operator, so they only run where somebody
    # asks for statistics of this pass.
    if recording(factors) and torch.is_grad_enabled():
        uses = _uses(params, options.has_biases, factors, ours.reduce)
        x = x.transpose(0, 1) if options.batch_first else x
        steps = PaddedSteps([x.shape[1]] * x.shape[0])
        result = _layers(x, states, uses, STEPS[name], options, steps)
        result = (result[0].transpose(0, 1), *result[1:]) if options.batch_first else result
    else:
        fused = getattr(torch, name)
        result = fused(x, states if name == "lstm" else states[0], params, *options.to_args())
    if batched:
        return result
    return result[0].squeeze(batch), *(s.squeeze(1) for s in result[1:])


def _run_packed(
    name: str,
    x: Tensor,
    batch_sizes: Tensor,
    hx: Hidden,
    params: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Run layers like ``torch.<name>`` on a packed batch; ``rest`` is as of ``_run_layers``."""
    factors: list[Tensor | None] = rest[-2]
    options, ours = PackedOptions.from_args(rest[:-2]), RecurrentOptions.from_args(rest[-1:])
    # torch keeps these sizes on the CPU, so they cost no wait for a device.
    sizes = tuple(batch_sizes.tolist())
    directions = 2 if options.bidirectional else 1
    shape = (options.num_layers * directions, sizes[0], params[1].shape[1])
    states = _states(hx, 2 if name == "lstm" else 1, lambda: x.new_zeros(shape))
    _check(name, "inputs of size", x.shape[-1:], params[0].shape[1:])
    for s in states:
        _check(name, "hidden states of shape", s.shape, shape)
    if recording(factors) and torch.is_grad_enabled():
        uses = _uses(params, options.has_biases, factors, ours.reduce, sizes)
        return _layers(x, states, uses, STEPS[name], options, PackedSteps(sizes))
    given = states if name == "lstm" else states[0]
    result: tuple[Tensor, ...] = getattr(torch, name)(
        x, batch_sizes, given, params, *options.to_args()
    )
    return result


def _run_cell(
    name: str,
    x: Tensor,
    hx: Hidden,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    factors: list[Tensor | None],
    reduce: bool,
) -> Tensor | tuple[Tensor, ...]:
    """Run a cell like ``torch.<name>``, or step by step while statistics are recorded."""
    batched = x.dim() == 2
    x = x if batched else x.unsqueeze(0)
    shape = (len(x), w_hh.shape[1])
    states = _states(hx, 2 if name == "lstm_cell" else 1, lambda: x.new_zeros(shape))
    if not batched and hx is not None:
        states = tuple(s.unsqueeze(0) for s in states)
    if recording(factors) and torch.is_grad_enabled():
        ((ih, hh),) = _uses([w_ih, w_hh, b_ih, b_hh], True, factors, reduce)
        y = ih.tapped(x)
        states = tuple(s.to(y.dtype) for s in states)
        result = STEPS[CELLS[name]](y, hh.tapped(states[0]), states)
    else:
        given = states if name == "lstm_cell" else states[0]
        found = getattr(torch, name)(x, given, w_ih, w_hh, b_ih, b_hh)
        result = found if isinstance(found, tuple) else (found,)
    result = result if batched else tuple(s.squeeze(0) for s in result)
    return result if name == "lstm_cell" else result[0]


_TAIL = f"Tensor?[] factors, {RecurrentOptions.schema()})"
_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
for _name in STEPS:
    _hx, _more = ("Tensor[]? hx", ", Tensor") if _name == "lstm" else ("Tensor? hx", "")
    _given = f"Tensor input, {_hx}, Tensor[] params, {LayerOptions.schema()}"
    define(
        f"{_name}({_given}, {_TAIL} -> (Tensor, Tensor{_more})",
        partial(_run_layers, _name),
    )
    _given = f"Tensor input, Tensor batch_sizes, {_hx}, Tensor[] params, {PackedOptions.schema()}"
    define(
        f"packed_{_name}({_given}, {_TAIL} -> (Tensor, Tensor{_more})",
        partial(_run_packed, _name),
    )
    _result = "(Tensor, Tensor)" if _name == "lstm" else "Tensor"
    define(
        f"{_name}_cell(Tensor input, {_hx}, {_WEIGHTS}, {_TAIL} -> {_result}",
        partial(_run_cell, f"{_name}_cell"),
    )


READING_SIZES = frozenset(getattr(torch.ops.kfac_fx, name).default for name in PACKED)
"""Operators whose steps follow from the values of a tensor."""
