"""Models of packed sequences, and the same from steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import kfac_fx
from support.recurrent_oracle import IN, KINDS, H, N, Steps, T

BIG = {"num_layers": 2, "bidirectional": True}
MIXED, FALLING, EQUAL = (torch.tensor(one) for one in ([2, T, 1], [T, 2, 2], [T, T, T]))


class Sentences(nn.Module):
    """Its outputs are those of all steps in rows, the same padded, or of the final states."""

    def __init__(
        self,
        kind: str,
        out: str = "rows",
        given: bool = False,
        falling: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.kind, self.out, self.given, self.falling = kind, out, given, falling
        self.rnn = KINDS[kind](IN, H, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.count = self.rnn.num_layers * directions
        self.states = 2 if kind == "LSTM" else 1
        # A state of its own for every case, so that a wrong order would show.
        self.first = torch.randn(self.count, N, H) if given else torch.zeros(self.count, N, H)
        width = H * (self.states * self.count if out == "final" else directions)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.rnn.batch_first
        packed = pack_padded_sequence(x, lengths, first, enforce_sorted=self.falling)
        state = (self.first, self.first) if self.kind == "LSTM" else self.first
        y, final = self.rnn(packed, state if self.given else None)
        if self.out == "rows":
            return self.head(y.data)
        if self.out == "padded":
            return self.head(pad_packed_sequence(y, batch_first=True)[0])
        finals = [final[0], final[1]] if self.kind == "LSTM" else [final]
        return self.head(torch.cat([f.transpose(0, 1).flatten(1) for f in finals], -1))

    def inputs(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(N, T, IN)
        return (x if self.rnn.batch_first else x.transpose(0, 1)), lengths

    def case(self, inputs: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Steps]:
        """The same from steps, for one case."""
        x, lengths = inputs
        row = (x[n] if self.rnn.batch_first else x[:, n])[: int(lengths[n])]
        steps = Steps(self.kind, self.rnn, "rnn.")
        y, finals = steps.layers(list(row), [self.first[:, n]] * self.states)
        if self.out == "final":
            return self.head(torch.cat([f.flatten() for f in finals]))[None], steps
        return self.head(torch.stack(y))[None], steps


def of_cases(rows: Tensor, lengths: Tensor) -> list[Tensor]:
    """The rows of a packed batch, case by case."""
    numbers = torch.arange(N)[:, None].expand(N, T)
    owners = pack_padded_sequence(numbers, lengths, batch_first=True, enforce_sorted=False).data
    return [rows[owners == n] for n in range(N)]


def recurrent_blocks(net: nn.Module) -> set[str]:
    return {name for name, block in net.curvature.blocks.items() if block.kind == "recurrent"}


def transformed(model: nn.Module, inputs: Any, route: str, **options: Any) -> nn.Module:
    """Symbolic tracing has no example here."""
    if route == "eager":
        net = kfac_fx.transform(model, inputs, capture="eager", **options)
    else:
        net = kfac_fx.transform(model, **options)
    assert net.curvature.route == route and not net.curvature.fallbacks
    return net


def arm(net: nn.Module, recording: bool) -> None:
    for buffers in kfac_fx.ops.factor_buffers(net).values():
        kfac_fx.ops.switch(net, buffers, recording)


def run(module: nn.Module, x: Tensor, lengths: Tensor) -> list[Tensor]:
    """Outputs and gradients, with the same dropout masks in every call."""
    torch.manual_seed(5)
    x = x.detach().clone().requires_grad_()
    out = module(x, lengths)
    module.zero_grad()
    out.sin().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]
