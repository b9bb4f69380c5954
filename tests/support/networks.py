"""Small networks, one habit of model code each, for the tests of equivalence and compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Network:
    """A model, its inputs for a batch size, and how to capture it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    kwargs: Callable[[int], dict[str, Any]] = field(default=lambda n: {})
    needs_examples: bool = False
    pick: Callable[[Any], Tensor] = field(default=lambda outputs: outputs)

    def __str__(self) -> str:
        return self.name

    def captured_with(self) -> dict[str, Any]:
        """The arguments of transform that this model needs."""
        if not self.needs_examples:
            return {}
        return {"example_inputs": self.inputs(4), "example_kwargs": self.kwargs(4)}


def vectors(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, *shape),)


# -------------------------------------------------------------------------------- linear algebra
def mlp(*widths: int) -> nn.Sequential:
    """Linear layers between these widths (by default 6, 5 and 4), tanh between the layers."""
    sizes = itertools.pairwise(widths or (6, 5, 4))
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6) / 3)
        self.bias = nn.Parameter(torch.randn(5) / 3)
        self.head = nn.Linear(5, 4, bias=False)

    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(x)))


class MatmulLinear(FunctionalLinear):
    def use(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class AddmmLinear(FunctionalLinear):
    def use(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())


class MmLinear(FunctionalLinear):
    def use(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight.t()).add(self.bias)


class EinsumLinear(FunctionalLinear):
    def use(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", x, self.weight) + self.bias


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(x.size()[:-1] + (self.outputs,))  # noqa: RUF005 (as GPT-2 has it)


def gpt_mlp() -> nn.Module:
    return nn.Sequential(Conv1D(6, 8), nn.GELU(), Conv1D(8, 4))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
        self.stem = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(inplace=True), body))
        self.heads = nn.ModuleDict({"out": nn.Linear(5, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["out"](self.stem(x))


# ---------------------------------------------------------------------------------- convolutions
def conv2d_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", groups=6, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def conv1d_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular", dilation=2),
        nn.SiLU(),
        nn.Conv1d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def conv3d_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 3, 2, padding=1), nn.Tanh(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(24, 4)
    )


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3) / 5)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv2d(x, self.kernel, padding=1)).mean((2, 3)))


# --------------------------------------------------------------------------------- normalisation
def batch_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 4),
    )


def group_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


class RMSNorm(nn.Module):
    """Root-mean-square normalisation as language models write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def layer_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.RMSNorm(5), RMSNorm(5)
    )


class FunctionalModes(nn.Module):
    """Dropout and batch normalisation by functions that are told the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.gamma = nn.Parameter(torch.ones(5))
        self.beta = nn.Parameter(torch.zeros(5))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.fc(x), 0.4, training=self.training)
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)


class ModeBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.training:
            x = x * 2.0
        return self.out(self.drop(x))


# ------------------------------------------------------------------------- structure of the graph
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.first(x))
        y = self.second(x)
        y += x
        return y


class Embedded(nn.Module):
    """Position embedding, layer scale and token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.pos = nn.Parameter(torch.randn(3, 6))
        self.scale = nn.Parameter(torch.full((6,), 0.5))
        self.fc = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.pos
        return x + self.fc(x) * self.scale


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        return self.fc(x.cumsum(1))[:, 0] + self.fc(x.mean(1))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.branch(left)) * self.branch(right)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(6 + 5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0, :5] * 0
        for time in range(3):
            state = torch.tanh(self.cell(torch.cat([x[:, time], state], dim=-1)))
        return self.out(state)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T) @ self.weight


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, *, context: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x) * torch.sigmoid(self.gate(context)) * scale


class DictOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(x), "aux": self.aux(x)}


class Unused(nn.Module):
    """A parameter nobody uses, a frozen layer, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))
        self.frozen, self.fc = nn.Linear(6, 5), nn.Linear(5, 4)
        self.frozen.requires_grad_(False)
        self.register_buffer("centre", torch.randn(6))
        self.register_buffer("mask", torch.ones(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.frozen(x - self.centre)) * self.mask)


class ShapeLoop(nn.Module):
    """Control flow on shapes that symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 6:
            raise ValueError("six features, please")
        for _ in range(x.shape[1]):
            x = torch.tanh(self.fc(x))
        return self.out(x)


class ShapeModes(ModeBranch):
    """The same, with a branch on the mode and dropout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2 and x.shape[-1] == 6:
            x = F.dropout(x, 0.3, self.training)
        return super().forward(x)


class ShapeNorm(nn.Module):
    """The same, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 6:
            raise ValueError("six features, please")
        return self.norm(self.fc(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(3, 8) / 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x + self.pos))


def graph_module() -> nn.Module:
    return fx.symbolic_trace(mlp())


def concatenated(outputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([outputs["logits"], outputs["aux"]], dim=-1)


def token_ids(n: int) -> tuple[Tensor, ...]:
    return (torch.randint(7, (n, 3)),)


def pairs(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 6), torch.randn(n, 6)


def context(n: int) -> dict[str, Any]:
    return {"context": torch.randn(n, 6)}


NETWORKS = [
    Network("mlp", mlp, vectors(6)),
    Network("mlp_tokens", mlp, vectors(3, 6)),
    Network("f_linear", FunctionalLinear, vectors(6)),
    Network("matmul", MatmulLinear, vectors(3, 6)),
    Network("addmm", AddmmLinear, vectors(6)),
    Network("mm", MmLinear, vectors(6)),
    Network("einsum", EinsumLinear, vectors(6)),
    Network("hf_conv1d", gpt_mlp, vectors(3, 6)),
    Network("nested", Nested, vectors(6)),
    Network("conv1d", conv1d_net, vectors(3, 8)),
    Network("conv2d", conv2d_net, vectors(3, 6, 6)),
    Network("conv3d", conv3d_net, vectors(2, 3, 3, 3)),
    Network("f_conv2d", FunctionalConv, vectors(3, 4, 4)),
    Network("batch_norm", batch_norm_net, vectors(3, 6, 6)),
    Network("group_norm", group_norm_net, vectors(3, 6, 6)),
    Network("layer_norm", layer_norm_net, vectors(6)),
    Network("functional_modes", FunctionalModes, vectors(6)),
    Network("mode_branch", ModeBranch, vectors(6)),
    Network("residual", Residual, vectors(6)),
    Network("embedded", Embedded, token_ids),
    Network("class_token", ClassToken, vectors(2, 6)),
    Network("siamese", Siamese, pairs),
    Network("recurrent", Recurrent, vectors(3, 6)),
    Network("tied", TiedAutoencoder, vectors(6)),
    Network("keywords", Keywords, vectors(6), kwargs=context),
    Network("dict_outputs", DictOutputs, vectors(6), pick=concatenated),
    Network("unused", Unused, vectors(6)),
    Network("graph_module", graph_module, vectors(6)),
    Network("shape_loop", ShapeLoop, vectors(3, 6), needs_examples=True),
    Network("shape_modes", ShapeModes, vectors(6), needs_examples=True),
    Network("shape_norm", ShapeNorm, vectors(6), needs_examples=True),
    Network("keywords_with_examples", Keywords, vectors(6), kwargs=context, needs_examples=True),
    Network("encoder", Encoder, vectors(3, 8), needs_examples=True),
]

BY_NAME = {network.name: network for network in NETWORKS}
