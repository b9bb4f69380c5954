"""Fifty steps of two small transformers: the training loss falls faster per step than Adam's.

Both methods have the best of a small grid: Adam seven learning rates, K-FAC three learning rates
and two dampings, one trust region. Every run starts from the same parameters and sees the same
batches. A step of K-FAC costs several of Adam's; this is about steps.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.slow
STEPS, LAST = 50, 10
ADAM = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 6e-2, 1e-1)
KFAC = tuple((lr, damping) for lr in (0.03, 0.1, 0.3) for damping in (1e-2, 1e-3))


class Block(nn.Module):
    """Attention and a feed-forward layer, normalised before."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Causal attention, learned positions, and a head tied to the embedding."""

    def __init__(self, vocabulary: int = 12, width: int = 24, length: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.Sequential(Block(width, 2, True), Block(width, 2, True))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """Patches of a digit, a class token, a table of positions."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 10)
        self.positions = nn.Parameter(torch.randn(17, width) / 10)
        self.blocks = nn.Sequential(Block(width, 2, False), Block(width, 2, False))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


Batch = tuple[Tensor, Tensor]


def markov_batches() -> list[Batch]:
    """The same sequences of a chain every step, and the next token of each."""
    generator = torch.Generator().manual_seed(0)
    chain = (3 * torch.randn(12, 12, generator=generator)).softmax(-1)
    tokens = [torch.randint(12, (32,), generator=generator)]
    for _ in range(16):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator).squeeze(1))
    ids = torch.stack(tokens, 1)
    return [(ids[:, :-1], ids[:, 1:])] * STEPS


def digit_batches() -> list[Batch]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randint(len(x), (64,), generator=generator) for _ in range(STEPS)]
    return [(x[pick], y[pick]) for pick in picks]


@dataclass(frozen=True)
class Run:
    """The loss of every step, and the setting that it was got with."""

    setting: str
    losses: list[float]

    @property
    def final(self) -> float:
        """The mean over the last steps: batches differ."""
        return sum(self.losses[-LAST:]) / LAST

    def steps_to(self, level: float) -> int:
        """Steps until the mean over the last ones is down to ``level``."""
        means = [sum(self.losses[i - LAST : i]) / LAST for i in range(LAST, STEPS + 1)]
        return next(LAST + i for i, mean in enumerate(means) if mean <= level)


def train(
    model: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer, damping: float | None
) -> list[float]:
    preconditioner = None
    if damping is not None:
        preconditioner = kfac_fx.Preconditioner(
            model, damping=damping, refresh_every=5, trust_region=1e-2, ema_decay=0.9
        )
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        outputs = model(x)
        loss = F.cross_entropy(outputs.flatten(0, -2), y.flatten())
        if preconditioner is not None:
            preconditioner.observe(outputs)
        loss.backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        losses.append(float(loss.detach().nan_to_num(1e9)))
    return losses


def adam(model: nn.Module, batches: list[Batch], lr: float) -> Run:
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return Run(f"Adam lr={lr}", train(model, batches, optimizer, None))


def kfac(model: nn.Module, batches: list[Batch], lr: float, damping: float) -> Run:
    torch.manual_seed(0)  # of the draws
    net = kfac_fx.transform(copy.deepcopy(model))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    return Run(f"K-FAC lr={lr} damping={damping}", train(net, batches, optimizer, damping))


@pytest.mark.parametrize(
    "build, make_batches", [(GPT, markov_batches), (ViT, digit_batches)], ids=["gpt", "vit"]
)
def test_faster_per_step_than_adam(
    build: Callable[[], nn.Module],
    make_batches: Callable[[], list[Batch]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "kfac_fx")  # of settings that diverge
    model, batches = build(), make_batches()
    ours = min((kfac(model, batches, *s) for s in KFAC), key=lambda run: run.final)
    theirs = min((adam(model, batches, lr) for lr in ADAM), key=lambda run: run.final)
    for step in (0, 9, 19, 29, 39, 49):
        print(f"step {step + 1}: {ours.losses[step]:.3f} {theirs.losses[step]:.3f}")
    print(
        f"last {LAST} steps: {ours.setting} {ours.final:.4f}, {theirs.setting} {theirs.final:.4f}"
    )
    assert ours.final < theirs.final
    steps = [run.steps_to(theirs.final) for run in (ours, theirs)]
    print(f"Adam's loss after {steps[0]} steps, by Adam after {steps[1]}")
    assert steps[0] < steps[1]
