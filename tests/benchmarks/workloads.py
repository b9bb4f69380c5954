"""Networks, batches and losses that the benchmarks train: ae, cnn, lm, resnet50 and gpt2.

The first three are those that rivals were measured on; the last two have the shapes of ResNet-50
and of GPT-2 small, with batches that a processor core, or a GPU, can work through.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]

AE_WIDTHS = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)


def bernoulli_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Summed over the pixels, averaged over the cases."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(outputs)


def categorical_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Averaged over cases and positions."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def autoencoder(widths: tuple[int, ...] = AE_WIDTHS) -> nn.Sequential:
    """Tanh units; the code and the output are linear."""
    layers: list[nn.Module] = []
    linear = (min(widths), widths[-1])
    for inputs, outputs in itertools.pairwise(widths):
        layers.append(nn.Linear(inputs, outputs))
        if outputs not in linear:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Convolutions with BatchNorm and ReLU between them, around a shortcut."""

    def __init__(self, branch: list[nn.Sequential], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        between = [layer for part in branch for layer in (part, nn.ReLU())]
        self.branch = nn.Sequential(*between[:-1])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def basic(inputs: int, outputs: int, stride: int) -> Residual:
    """Two 3x3 convolutions."""
    branch = [conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs, 3)]
    return Residual(branch, inputs, outputs, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1x1, 3x3 (with the stride) and 1x1, to four times the width."""
    branch = [
        conv_norm(inputs, width, 1),
        conv_norm(width, width, 3, stride),
        conv_norm(width, 4 * width, 1),
    ]
    return Residual(branch, inputs, 4 * width, stride)


class Pooled(nn.Module):
    """Mean over the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def resnet8() -> nn.Sequential:
    """Of 16, 32 and 64 channels, for images of 32x32."""
    stages = (basic(16, 16, 1), basic(16, 32, 2), basic(32, 64, 2))
    return nn.Sequential(conv_norm(3, 16, 3), nn.ReLU(), *stages, Pooled(), nn.Linear(64, 10))


def resnet50() -> nn.Sequential:
    stem = (conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks, inputs = [], 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            blocks.append(bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*stem, *blocks, Pooled(), nn.Linear(2048, 1000))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a perceptron of four times the width, each after a LayerNorm."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens and positions, layers, LayerNorm, a head; ``tied`` takes the tokens' table for it."""

    def __init__(
        self, tokens: int, width: int, heads: int, depth: int, length: int, causal: bool, tied: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(Layer(width, heads, causal) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=not tied)
        if tied:
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.tokens(x) + self.positions)))


@dataclass
class Workload:
    """A network, its loss, and a few batches that take turns.

    Attributes:
        likelihood: the loss's, as kfac_fx calls it.
        lr: of SGD, small enough for every method to train at.
    """

    name: str
    model: nn.Module
    likelihood: str
    batches: list[Batch]
    lr: float
    _turns: int = field(default=0, repr=False)

    @property
    def loss(self) -> Loss:
        return bernoulli_loss if self.likelihood == "bernoulli" else categorical_loss

    @property
    def cases(self) -> int:
        """Cases of a batch."""
        return len(self.batches[0][0])

    def next(self) -> Batch:
        """The batch whose turn it is."""
        self._turns = (self._turns + 1) % len(self.batches)
        return self.batches[self._turns]


def reconstruction(count: int, cases: int, width: int) -> list[Batch]:
    """Images between 0 and 1 with 16 degrees of freedom, which are their own targets."""
    basis = torch.randn(16, width)
    inputs = [torch.sigmoid(torch.randn(cases, 16) @ basis) for _ in range(count)]
    return [(x, x) for x in inputs]


def images(count: int, cases: int, side: int, classes: int) -> list[Batch]:
    shape = (cases, 3, side, side)
    return [(torch.randn(shape), torch.randint(classes, (cases,))) for _ in range(count)]


def sentences(count: int, cases: int, length: int, tokens: int) -> list[Batch]:
    """Random tokens, and random ones to predict at every position."""
    shape = (cases, length)
    return [(torch.randint(tokens, shape), torch.randint(tokens, shape)) for _ in range(count)]


def ae() -> Workload:
    """784-400-200-100-50-25-6 and back, batches of 512."""
    return Workload("ae", autoencoder(), "bernoulli", reconstruction(4, 512, 784), 1e-4)


def cnn() -> Workload:
    """ResNet-8 with BatchNorm, 3x32x32, batches of 64."""
    return Workload("cnn", resnet8(), "categorical", images(4, 64, 32, 10), 1e-3)


def lm() -> Workload:
    """Four layers of width 128, 256 tokens, batches of 16 sequences of 64."""
    model = Transformer(256, 128, 4, 4, 64, causal=False, tied=False)
    return Workload("lm", model, "categorical", sentences(4, 16, 64, 256), 1e-3)


def chain_cnn(work: Workload) -> Workload:
    """A chain of seven convolutions of the same widths for the same images, without BatchNorm."""
    widths = ((3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))
    parts: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(widths):
        parts += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU()]
        if index in (2, 4):
            parts.append(nn.MaxPool2d(2))
    model = nn.Sequential(*parts, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(256, 10))
    return Workload(work.name, model, work.likelihood, work.batches, work.lr)


def large_cnn(cases: int = 8) -> Workload:
    """ResNet-50, 3x224x224, batches of 8."""
    return Workload("resnet50", resnet50(), "categorical", images(2, cases, 224, 1000), 1e-3)


def large_lm(length: int = 32) -> Workload:
    """GPT-2 small: 12 layers of width 768, 50257 tokens, tied head; 8 sequences of 32."""
    model = Transformer(50257, 768, 12, 12, length, causal=True, tied=True)
    return Workload("gpt2", model, "categorical", sentences(2, 8, length, 50257), 1e-3)


def gpu_cnn() -> Workload:
    """ResNet-50, 3x224x224, batches of 128."""
    return large_cnn(128)


def gpu_lm() -> Workload:
    """GPT-2 small: 12 layers of width 768, 50257 tokens, tied head; 8 sequences of 512."""
    return large_lm(512)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "ae": ae,
    "cnn": cnn,
    "lm": lm,
    "resnet50": large_cnn,
    "gpt2": large_lm,
}
ON_GPU = WORKLOADS | {"resnet50": gpu_cnn, "gpt2": gpu_lm}
SMALL = ("ae", "cnn", "lm")


def of_device(device: str) -> Mapping[str, Callable[[], Workload]]:
    """The workloads, of sizes that suit the device."""
    return ON_GPU if device.startswith("cuda") else WORKLOADS


def make(name: str, device: str = "cpu") -> Workload:
    """The workload of this name, the same one every time."""
    torch.manual_seed(0)
    work = of_device(device)[name]()
    work.model.to(device)
    work.batches = [(x.to(device), y.to(device)) for x, y in work.batches]
    return work
