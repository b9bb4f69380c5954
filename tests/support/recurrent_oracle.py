"""Recurrent layers as steps written out case by case, and their factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support import oracles
from support.oracles import Likelihood

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN_TANH": nn.RNN,
    "RNN_RELU": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
N, T, IN, H = 3, 4, 3, 2


def next_state(kind: str, ih: Tensor, hh: Tensor, state: list[Tensor]) -> list[Tensor]:
    """The formulas of torch's documentation, gate by gate."""
    h = state[0]
    gates = [(ih[k : k + H], hh[k : k + H]) for k in range(0, len(ih), H)]
    if kind == "LSTM":
        i, f, g, o = (a + b for a, b in gates)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(c), c]
    if kind == "GRU":
        r, z = (torch.sigmoid(a + b) for a, b in gates[:2])
        n = torch.tanh(gates[2][0] + r * gates[2][1])
        return [(1 - z) * n + z * h]
    return [torch.tanh(ih + hh) if kind == "RNN_TANH" else torch.relu(ih + hh)]


class Steps:
    """Runs cells on one case and remembers (abar, s) of both products, by the weight's name."""

    def __init__(self, kind: str, module: nn.Module, prefix: str) -> None:
        self.kind, self.module, self.prefix = kind, module, prefix
        self.found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def product(self, side: str, suffix: str, x: Tensor) -> Tensor:
        weight = getattr(self.module, f"weight_{side}{suffix}")
        bias = getattr(self.module, f"bias_{side}{suffix}", None)
        s, a = weight @ x, x.detach()
        if bias is not None:
            s, a = s + bias, torch.cat([a, a.new_ones(1)])
        self.found.setdefault(f"{self.prefix}weight_{side}{suffix}", []).append((a, s))
        return s

    def step(self, suffix: str, x: Tensor, state: list[Tensor]) -> list[Tensor]:
        ih = self.product("ih", suffix, x)
        return next_state(self.kind, ih, self.product("hh", suffix, state[0]), state)

    def layers(self, x: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states of the last layer, and the final states of all of them."""
        finals = []
        directions = 2 if self.module.bidirectional else 1
        for layer in range(self.module.num_layers):
            halves = []
            for back in range(directions):
                state = [s[layer * directions + back] for s in states]
                order = range(len(x) - 1, -1, -1) if back else range(len(x))
                half: dict[int, Tensor] = {}
                for time in order:
                    state = self.step(f"_l{layer}" + "_reverse" * back, x[time], state)
                    half[time] = state[0]
                halves.append(half)
                finals.append(state)
            x = [torch.cat([half[time] for half in halves]) for time in range(len(x))]
        return x, [torch.stack(parts) for parts in zip(*finals, strict=True)]


Case = Callable[[int], tuple[Tensor, Steps]]
"""n -> the outputs [1, ...] of case n, and its steps."""


def expected(
    case: Case, cases: int, y: Tensor | list[Tensor] | None, likelihood: Likelihood, fisher: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, G) by the weight's name; G is divided by the mean number of steps of a case.

    `y` may be a list of every case's targets, where cases have different numbers of steps."""
    total: dict[str, list[Any]] = {}
    terms, rows_of = 0.0, Counter[str]()
    for n in range(cases):
        outputs, steps = case(n)
        target = y[n] if isinstance(y, list) else None if y is None else y[n : n + 1]
        terms += likelihood.terms(outputs, target)
        for name, rows in steps.found.items():
            moment = oracles.case_moment(likelihood, fisher, outputs, target, [s for _, s in rows])
            size = len(rows[0][1])
            rows_of[name] += len(rows)
            A = sum(torch.outer(a, a) for a, _ in rows)
            places = [slice(t * size, (t + 1) * size) for t in range(len(rows))]
            G = sum(moment[place, place] for place in places)
            before = total.setdefault(name, [0.0, 0.0])
            total[name] = [before[0] + A, before[1] + G]
    return {
        name: (A / cases, G * cases / (terms * rows_of[name])) for name, (A, G) in total.items()
    }


class Tagger(nn.Module):
    """A likelihood term a step, or one a case from the final states; with given states or not."""

    def __init__(self, kind: str, last: bool = False, given: bool = False, **options: Any) -> None:
        super().__init__()
        self.kind, self.last, self.given = kind, last, given
        self.rnn = KINDS[kind](IN, H, **options)
        directions = 2 if self.rnn.bidirectional else 1
        count = self.rnn.num_layers * directions
        self.first = torch.randn(count, 1, H) if given else torch.zeros(count, 1, H)
        self.states = 2 if kind == "LSTM" else 1
        self.head = nn.Linear(H * (self.states * count if last else directions), 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.given:
            h = x.sum() * 0 + self.first.expand(-1, N, -1)
            state = (h, h) if self.kind == "LSTM" else h
        y, final = self.rnn(x, state)
        if self.last:
            finals = [final[0], final[1]] if self.kind == "LSTM" else [final]
            y = torch.cat([f.transpose(0, 1).flatten(1) for f in finals], -1)
        elif not self.rnn.batch_first:
            y = y.transpose(0, 1)
        return self.head(y)

    def inputs(self) -> Tensor:
        return torch.randn(N, T, IN) if self.rnn.batch_first else torch.randn(T, N, IN)

    def case(self, x: Tensor, n: int) -> tuple[Tensor, Steps]:
        """The same from steps, for one case."""
        steps = Steps(self.kind, self.rnn, "rnn.")
        row = x[n] if self.rnn.batch_first else x[:, n]
        y, finals = steps.layers(list(row), [self.first[:, 0]] * self.states)
        if self.last:
            return self.head(torch.cat([f.flatten() for f in finals]))[None], steps
        return self.head(torch.stack(y))[None], steps
