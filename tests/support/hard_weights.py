"""Small models that use parameters in unusual ways; see hard_models.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.hard_models import D, Hard, Layers


class ComplexWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D, dtype=torch.complex128) / 2)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(self.weight.dtype) @ self.weight).abs())


class Spectral(nn.Module):
    """A real parameter that is a filter of frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(D // 2 + 1, 2)), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft(spectrum, n=D))


class Temperature(Layers):
    """Scalars: a temperature that exp makes, and a learned mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.mix = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        m = torch.sigmoid(self.mix)
        x = m * torch.tanh(self.a(x)) + (1 - m) * self.b(x)
        return self.head(x) / self.log_temperature.exp()


class LoRA(nn.Module):
    """A frozen layer with a trained difference of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + (x @ self.down.T) @ self.up.T * 0.5))


class LoRAMerged(LoRA):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + 0.5 * self.up @ self.down
        return self.head(torch.tanh(F.linear(x, weight, self.base.bias)))


class LayerScale(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.gamma * self.b(torch.tanh(self.a(x))))


class LearnedTokens(Layers):
    """Tokens in front of the sequence, and queries that look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.queries = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(3, D))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.tokens.unsqueeze(0).expand(len(x), -1, -1), x], 1)
        scores = self.queries @ self.a(x).transpose(1, 2)
        return self.head(scores.softmax(-1) @ self.b(x)).sum(1)


class RelativePositions(Layers):
    """A table of biases, looked up by the distance of two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 1))
        distance = torch.arange(3)[:, None] - torch.arange(3)[None] + 2
        self.register_buffer("distance", distance)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.distance.view(-1)].view(3, 3)
        scores = (self.a(x) @ self.b(x).transpose(1, 2) + bias).softmax(-1)
        return self.head(scores @ x).mean(1)


class WithBuffers(Layers):
    """Parameters and buffers in one expression before they meet the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.register_buffer("mask", torch.ones(D, D).tril())
        self.register_buffer("shift", torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        masked = self.weight * self.mask + self.shift
        return self.head(self.b(torch.tanh(x @ masked)) + self.a(x))


class Where(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.where(x > 0, x * self.high, self.low)
        return self.head(self.b(x))


class Stacked(nn.Module):
    """One weight put together from parameters by stack, another by cat."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(D) for _ in range(D))
        self.left, self.right = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(D, 2))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, torch.stack(list(self.rows))))
        return self.head(x @ torch.cat([self.left, self.right], 1))


class Routed(nn.Module):
    """Each case goes to one of three experts, picked by index_select."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(D, 3), nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        chosen = torch.arange(len(x), device=x.device) % 3
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            cases = (chosen == index).nonzero().squeeze(1)
            rows = torch.tanh(expert(x.index_select(0, cases)))
            out = out.index_add(0, cases, rows * gates.index_select(0, cases)[:, index, None])
        return self.head(out)


class HyperNetwork(nn.Module):
    """A layer whose output is another layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.bias = nn.Linear(D, 3 * D), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.tanh(self.make(x)).view(-1, 3, D)
        return torch.bmm(weights, x.unsqueeze(-1)).squeeze(-1) + self.bias


class Tied(nn.Module):
    """An autoencoder with one weight, and a symmetric one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.square = nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.eye(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ (self.square + self.square.T)
        return torch.tanh(x @ self.weight.T) @ self.weight


class PReLUs(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.shared = nn.PReLU(D), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.b(self.act(self.a(x)))))


class Centres(nn.Module):
    """Distances from learned centres, which broadcast against the cases."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.widths = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.rand(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        squares = (x[:, None] - self.centres[None]).square().sum(-1)
        return self.head(torch.exp(-squares * F.softplus(self.widths)))


class Reparametrised(nn.Module):
    """A weight with a mean and a spread, and noise that is the same every time."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.randn(D, 3)), nn.Parameter(torch.zeros(D, 3))
        self.register_buffer("noise", torch.randn(D, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.mean + self.log_std.exp() * self.noise)


class StateSpace(nn.Module):
    """A linear recurrence with a diagonal transition."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.inputs = nn.Parameter(torch.rand(D)), nn.Linear(D, D)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for step in self.inputs(x).unbind(1):
            state = torch.sigmoid(self.decay) * state + step
        return self.head(state)


def sequences(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, D),)


ENTRIES = {
    "complex weight": Hard(ComplexWeight),
    "spectral filter": Hard(Spectral),
    "temperature": Hard(Temperature),
    "lora": Hard(LoRA),
    "lora, merged": Hard(LoRAMerged),
    "layer scale": Hard(LayerScale),
    "learned tokens": Hard(LearnedTokens, sequences),
    "relative positions": Hard(RelativePositions, sequences),
    "buffers": Hard(WithBuffers),
    "where": Hard(Where),
    "stacked weight": Hard(Stacked),
    "routed": Hard(Routed),
    "hypernetwork": Hard(HyperNetwork),
    "tied": Hard(Tied),
    "prelu": Hard(PReLUs),
    "centres": Hard(Centres),
    "reparametrised": Hard(Reparametrised),
    "state space": Hard(StateSpace, sequences),
}
