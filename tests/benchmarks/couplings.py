"""What the couplings cost: python tests/benchmarks/couplings.py [--threads 1].

Refresh, apply and one recorded forward and backward, block-tridiagonal over block-diagonal, in the
same process; CPU time, the best of several repeats.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx


def autoencoder() -> nn.Module:
    half = [784, 400, 200, 100, 50, 25, 6]
    sizes = half + half[-2::-1]
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride > 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.down(x))


def resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def transformer() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(256, 128), *(Layer(128, 4) for _ in range(4)), nn.Linear(128, 256)
    )


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "autoencoder": (autoencoder, lambda: torch.rand(512, 784), "bernoulli"),
    "ResNet-8": (resnet, lambda: torch.randn(64, 3, 32, 32), "categorical"),
    "transformer": (transformer, lambda: torch.randint(256, (16, 64)), "categorical"),
}


def best(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of CPU time."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def stages(model: nn.Module, x: Tensor, likelihood: str, structure: str) -> list[float]:
    """Refresh, apply, and a recorded pass."""
    net = kfac_fx.transform(model, (x,), structure=structure)
    pre = kfac_fx.Preconditioner(net, likelihood, damping=1e-2)
    gradients = {
        n: torch.randn_like(p) for n, p in model.named_parameters() if n in net.curvature.covered
    }

    def record() -> None:
        pre.observe(outputs := net(x))
        outputs.float().square().mean().backward()

    record()
    pre.step()
    pre.statistics_every = 1
    return [
        best(pre.refresh, 7),
        best(lambda: pre.apply(gradients), 20),
        best(lambda: (record(), pre._recorder.switch(True)), 3),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; ms, and the ratio")
    for name, (build, inputs, likelihood) in WORKLOADS.items():
        model, x = build(), inputs()
        alone, coupled = (
            stages(copy.deepcopy(model), x, likelihood, structure)
            for structure in ("block_diagonal", "block_tridiagonal")
        )
        cells = [
            f"{stage} {a:.1f} -> {b:.1f} ({b / a:.2f})"
            for stage, a, b in zip(
                ("refresh", "apply", "recorded pass"), alone, coupled, strict=True
            )
        ]
        print(f"{name:12} " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
