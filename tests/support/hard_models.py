"""Small models of unusual code: control flow, containers, calls, in-place work, several outputs.

``ENTRIES`` names a model, its inputs for a batch size, and what of its outputs the loss is about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 4


class Hard(NamedTuple):
    """A model, inputs for n cases, and the tensor [n, ...] among its outputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]] = lambda n: (torch.randn(n, D),)
    pick: Callable[[Any], Tensor] = lambda outputs: outputs


class Layers(nn.Module):
    """Two layers and a head for the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)


# ---------------------------------------------------------------------------------- control flow
class DataBranch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if x.abs().mean() > 1e-6:  # always, but no tracer knows
            x = torch.tanh(self.b(x))
        return self.head(x)


class CountedByItem(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.new_tensor(2.0).item())):
            x = torch.tanh(self.a(x))
        return self.head(self.b(x))


class WhileLoop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        steps = 0
        while steps < x.shape[-1] - 1:
            x = x + torch.tanh(self.b(self.a(x)))
            steps += 1
        return self.head(x)


class CumulativeLoop(Layers):
    """Every step reads all states before it."""

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for _ in range(3):
            states.append(torch.tanh(self.a(torch.stack(states).sum(0))))
        return self.head(self.b(states[-1]) + sum(states))


class TryExcept(Layers):
    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.missing(x)
        except AttributeError:
            x = self.a(x)
        return self.head(self.b(torch.tanh(x)))


class Assertions(Layers):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2 and x.shape[1] == D, f"bad shape {x.shape}"
        return self.head(self.b(torch.tanh(self.a(x))))


class SortedByNorm(Layers):
    """The order of the features is data."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).sort(dim=-1, descending=True).values
        return self.head(torch.tanh(self.b(x)))


# ------------------------------------------------------------------------------------- containers
class DictIO(Layers):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = self.a(batch["x"]) * batch["mask"]
        return {"logits": self.head(torch.tanh(self.b(x))), "norm": x.norm(dim=-1)}


class NestedTuples(Layers):
    def forward(self, pair: tuple[Tensor, list[Tensor]]) -> tuple[Any, ...]:
        x, (y, z) = pair
        h = torch.tanh(self.a(x) + self.b(y)) * z
        return (self.head(h), [h, (h.sum(),)])


class ReturnsNone(Layers):
    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, None]:
        x = self.b(torch.tanh(self.a(x)))
        return self.head(x if cache is None else x + cache), None


class Listed(nn.Module):
    """ModuleList by index, ModuleDict by key."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.heads = nn.ModuleDict({"first": nn.Linear(D, 3), "second": nn.Linear(D, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for index in (2, 0, 1):
            x = torch.tanh(self.layers[index](x))
        return sum(head(x) for head in self.heads.values())


class ParametersListed(nn.Module):
    """ParameterList and ParameterDict, used in a comprehension."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(D, D) / 2 for _ in range(3))
        self.biases = nn.ParameterDict({str(i): torch.randn(D) for i in range(3)})
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.weights):
            x = torch.tanh(x @ weight + self.biases[str(index)])
        return self.head(x)


class NamedOutput(NamedTuple):
    logits: Tensor
    hidden: Tensor


class ReturnsNamedTuple(Layers):
    def forward(self, x: Tensor) -> NamedOutput:
        h = torch.tanh(self.b(self.a(x)))
        return NamedOutput(self.head(h), h)


class Partial(Layers):
    """Layers held in closures and partials besides their names."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [functools.partial(F.leaky_relu, negative_slope=0.2), torch.sin]

    def forward(self, x: Tensor) -> Tensor:
        for layer, step in zip((self.a, self.b), self.steps, strict=True):
            x = step(layer(x))
        return self.head(x)


# ------------------------------------------------------------------------- calls and shared modules
class CalledTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(torch.tanh(self.a(x))) + self.b(x)))


class SharedChild(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.second, self.head = nn.Sequential(self.first[0], nn.ReLU()), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x) + self.second(x))


class CallsChildMethod(nn.Module):
    """A child's other method, and a child called by keyword."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gate = nn.Linear(D, D), nn.Linear(D, D)

        def encode(self, x: Tensor, *, scale: float) -> Tensor:
            return torch.sigmoid(self.gate(x)) * self.fc(input=x) * scale

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = self.Child(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.child.encode(x, scale=0.5))


class FunctionalCalls(Layers):
    """The layers' own parameters in functions, and torch.func.functional_call."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.a.weight, self.a.bias))
        x = torch.func.functional_call(self.b, dict(self.b.named_parameters()), (x,))
        return self.head(x)


class Vmapped(Layers):
    """A layer mapped over the cases."""

    def forward(self, x: Tensor) -> Tensor:
        mapped = torch.vmap(lambda row: torch.tanh(self.a(row)))
        return self.head(self.b(mapped(x)))


class Hooked(Layers):
    """Hooks that change what goes in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_pre_hook(_double)
        self.b.register_forward_hook(_sine)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.tanh(self.a(x))))


def _double(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (2 * inputs[0],)


def _sine(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.sin(output)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Quantised(Layers):
    """An operation of its own with a backward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(StraightThrough.apply(2 * self.a(x)) / 2))


class StopGradient(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.tanh(self.b(x))
        return self.head(torch.tanh(self.a(x)) * target + self.b(x).detach() + self.b(x))


# ----------------------------------------------------------------------------------------- in place
class InPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.mul_(0.5).add_(1.0)
        x = self.b(F.relu(x, inplace=True))
        y = torch.zeros_like(x)
        y[:, :2] = x[:, 2:]
        y[:, 2:] += x[:, :2].sin()
        return self.head(y)


class Scattered(Layers):
    """Results written into a buffer by index."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 2, D)
        out[:, 0], out[:, 1] = torch.tanh(self.a(x)), self.b(x)
        return self.head(out.sum(1))


class CountsCalls(Layers):
    """A buffer that is updated, and read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.head(self.b(torch.tanh(self.a(x - self.mean.detach().clone()))))


class UnusedInEvaluation(Layers):
    """An auxiliary branch that only training has, and a parameter nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.a(x)))
        return y + self.head(self.b(x)) if self.training else y


def masked(n: int) -> tuple[Any, ...]:
    return ({"x": torch.randn(n, D), "mask": torch.ones(n, D)},)


def nested(n: int) -> tuple[Any, ...]:
    return ((torch.randn(n, D), [torch.randn(n, D), torch.randn(n, D)]),)


def logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


ENTRIES = {
    "data branch": Hard(DataBranch),
    "counted by item": Hard(CountedByItem),
    "while loop": Hard(WhileLoop),
    "cumulative loop": Hard(CumulativeLoop),
    "try and except": Hard(TryExcept),
    "assertions": Hard(Assertions),
    "sorted": Hard(SortedByNorm),
    "dict in and out": Hard(DictIO, masked, logits),
    "nested tuples": Hard(NestedTuples, nested, logits),
    "none in a tuple": Hard(ReturnsNone, pick=logits),
    "module list": Hard(Listed),
    "parameter list": Hard(ParametersListed),
    "named tuple": Hard(ReturnsNamedTuple, pick=logits),
    "partials": Hard(Partial),
    "called twice": Hard(CalledTwice),
    "shared child": Hard(SharedChild),
    "child's method": Hard(CallsChildMethod),
    "functional call": Hard(FunctionalCalls),
    "vmap": Hard(Vmapped),
    "hooks": Hard(Hooked),
    "autograd function": Hard(Quantised),
    "stopped gradient": Hard(StopGradient),
    "in place": Hard(InPlace),
    "scattered": Hard(Scattered),
    "updated buffer": Hard(CountsCalls),
    "unused in evaluation": Hard(UnusedInEvaluation),
}
