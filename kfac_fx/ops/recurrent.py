"""Recurrent layers and cells: torch's own operator, or its steps with taps while recording.

Each operator has the name and the arguments of the one that it stands for, with ``factors`` and
``reduce`` behind them, and may be called without ``hx`` and without a batch, like the modules of
torch.nn. ``factors`` holds eight entries a layer and direction: A, G, the number of positions, and
the covariance C of a bias alone, for the uses of weight_ih and of weight_hh; None where there is no
such factor. While any of them asks for statistics the steps run one by one; otherwise torch's
operator runs.

On a CPU both draw the same dropout masks; elsewhere the fused operator has a random stream of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.linear import LinearStatistics
from kfac_fx.ops.scale_shift import ScaleShiftStatistics
from kfac_fx.ops.tap import Statistics, define, joined, recording, source, tapped

State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], State]
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


STEPS: dict[str, Step] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
CELLS: dict[str, str] = {f"{name}_cell": name for name in STEPS}
SLOTS = 4
"""Factors of one product: A, G, positions, and C of a bias without its weight."""


@dataclass(frozen=True)
class _StepStatistics:
    """Those of a product [N, T, out] whose inputs become known step by step."""

    statistics: Statistics
    inputs: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        g: Tensor,
        tensors: Sequence[Tensor | None],
        wanted: Sequence[bool],
        dtype: torch.dtype,
    ) -> Sequence[Statistic | None]:
        x = torch.stack(self.inputs, 1) if wanted[0] else self.inputs[0]
        return self.statistics(g, _saved(self.statistics, x), wanted, dtype)


def _saved(statistics: Statistics, x: Tensor) -> list[Tensor | None]:
    return [x] if isinstance(statistics, LinearStatistics) else [None, None, None]


@dataclass(frozen=True)
class _Dense:
    """A weight with its bias, and the factors that they have."""

    weight: Tensor
    bias: Tensor | None
    factors: Sequence[Tensor | None]
    reduce: bool

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def recorded(self) -> Iterator[tuple[Statistics, list[Tensor]]]:
        """What is recorded of the product, each with its factors."""
        A, G, positions, C = self.factors
        if A is not None and G is not None:
            bias = A.shape[-1] > self.weight.shape[1]  # a bias may be left out of the block
            diagonal = (A.dim() == 1, G.dim() == 1)
            factors = [A, G] if positions is None else [A, G, positions]
            if recording(factors):
                yield LinearStatistics((-1,), (-1,), (), (), bias, self.reduce, diagonal), factors
        if C is not None and recording([C]):
            yield ScaleShiftStatistics(C.dim(), "none", (), (-1,), False, 0.0, False, True), [C]

    def tapped(self, x: Tensor) -> Tensor:
        """x [N, T, in] or [N, in] -> the recorded product."""
        y = self(x)
        for statistics, factors in self.recorded():
            y = tapped(y, statistics, _saved(statistics, x), factors)
        return y


Uses = tuple[_Dense, _Dense]
"""Those of weight_ih and weight_hh, of one layer and direction."""


def _uses(
    params: Sequence[Tensor | None],
    biased: bool,
    factors: Sequence[Tensor | None],
    reduce: bool,
) -> list[Uses]:
    """One pair for each layer and direction, from torch's flat list of parameters."""
    width = 4 if biased else 2
    result: list[Uses] = []
    for index in range(len(params) // width):
        held = params[index * width : (index + 1) * width]
        pair = []
        for side in (0, 1):
            start = (2 * index + side) * SLOTS
            weight, bias = held[side], held[2 + side] if biased else None
            assert weight is not None
            pair.append(_Dense(weight, bias, factors[start : start + SLOTS], reduce))
        result.append((pair[0], pair[1]))
    return result


def _direction(x: Tensor, state: State, uses: Uses, step: Step, back: bool) -> tuple[Tensor, State]:
    """One layer in one direction: x [T, N, in] -> hidden states [T, N, H] and the last state."""
    ih, hh = uses
    inputs = ih.tapped(x.transpose(0, 1))
    state = tuple(s.to(inputs.dtype) for s in state)
    like = inputs.new_empty(()).expand(*inputs.shape[:2], len(hh.weight))
    seen: list[Tensor] = []
    zeros = [source(like, _StepStatistics(s, seen), [], fs).unbind(1) for s, fs in hh.recorded()]
    steps = list(zip(inputs.unbind(1), *zeros, strict=True))
    outputs: list[Tensor] = []
    for given, *sources in reversed(steps) if back else steps:
        seen.append(state[0].detach())
        previous = hh(state[0])
        for zero in sources:
            previous = joined(previous, zero)
        state = step(given, previous, state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if back else outputs), state


def _layers(
    x: Tensor, states: State, uses: list[Uses], step: Step, directions: int, dropout: float
) -> tuple[Tensor, ...]:
    """All layers: x [T, N, in], states [layers * directions, N, H]."""
    finals: list[State] = []
    for index, pair in enumerate(uses):
        layer, back = divmod(index, directions)
        if back == 0:
            if layer and dropout:
                x = F.dropout(x, dropout)
            given, outputs = x, []
        y, final = _direction(given, tuple(s[index] for s in states), pair, step, bool(back))
        finals.append(final)
        outputs.append(y)
        if back == directions - 1:
            x = torch.cat(outputs, -1) if directions > 1 else y
    return x, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _states(hx: Any, count: int, zeros: Callable[[], Tensor]) -> State:
    if hx is None:
        return tuple(zeros() for _ in range(count))
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _check(name: str, what: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise RuntimeError(f"{name}: expected {what} {tuple(wanted)}, got {tuple(found)}")


def _run_layers(
    name: str,
    x: Tensor,
    hx: Any,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    factors: list[Tensor | None],
    reduce: bool,
) -> tuple[Tensor, ...]:
    batched, batch = x.dim() == 3, 0 if batch_first else 1
    if not batched:
        x = x.unsqueeze(batch)
    directions = 2 if bidirectional else 1
    shape = (num_layers * directions, x.shape[batch], params[1].shape[1])
    states = _states(hx, 2 if name == "lstm" else 1, lambda: x.new_zeros(shape))
    if not batched and hx is not None:
        states = tuple(s.unsqueeze(1) for s in states)
    _check(name, "inputs of size", x.shape[-1:], params[0].shape[1:])
    for s in states:
        _check(name, "hidden states of shape", s.shape, shape)
    if recording(factors) and torch.is_grad_enabled():
        uses = _uses(params, has_biases, factors, reduce)
        x = x.transpose(0, 1) if batch_first else x
        result = _layers(x, states, uses, STEPS[name], directions, dropout if train else 0.0)
        result = (result[0].transpose(0, 1), *result[1:]) if batch_first else result
    else:
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        fused = getattr(torch, name)
        result = fused(x, states if name == "lstm" else states[0], params, *options)
    if batched:
        return result
    return result[0].squeeze(batch), *(s.squeeze(1) for s in result[1:])


def _run_cell(
    name: str,
    x: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    factors: list[Tensor | None],
    reduce: bool,
) -> Any:
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


def nested(result: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(output, h, c) of the operator as nn.LSTM returns them: (output, (h, c))."""
    output, h, c = result
    return output, (h, c)


_TAIL = "Tensor?[] factors, bool reduce)"
_OPTIONS = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first"
)
_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
for _name in STEPS:
    _hx, _more = ("Tensor[]? hx", ", Tensor") if _name == "lstm" else ("Tensor? hx", "")
    define(
        f"{_name}(Tensor input, {_hx}, {_OPTIONS}, {_TAIL} -> (Tensor, Tensor{_more})",
        partial(_run_layers, _name),
    )
    _result = "(Tensor, Tensor)" if _name == "lstm" else "Tensor"
    define(
        f"{_name}_cell(Tensor input, {_hx}, {_WEIGHTS}, {_TAIL} -> {_result}",
        partial(_run_cell, f"{_name}_cell"),
    )
