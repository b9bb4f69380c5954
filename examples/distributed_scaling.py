"""Predicted scaling of K-FAC to 1,024 GPUs, for a ResNet-50 and a transformer of 7B parameters.

    python examples/distributed_scaling.py --output distributed_scaling.png

Networks are built without memory (on the meta device) and transformed; the simulator of
kfac_fx.distributed does the rest. What it is told of the hardware is assumed, not measured: see the
constants. It prints a table and draws a picture.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.codegen import Program
from kfac_fx.distributed import Compute, Network, Plan, Prediction, simulate

# Assumed: a GPU that reaches 300 teraflops in products in bfloat16, 10 in float32 factorisations
# of matrices, 20 us for a block's kernels; links of 50 GB/s and 10 us. Every process has its own
# share of a growing batch.
PRODUCTS, FACTORISATIONS, LAUNCH = 3e14, 1e13, 2e-5
LINKS = Network(latency=1e-5, bandwidth=5e10, handshake=1e-4, packing=2 / 2e12)
SIZES = [2**k for k in range(11)]
IMAGES, TOKENS = 64, 8192


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inside != 4 * width:
            self.skip = nn.Conv2d(inside, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for place in range(count):
            layers.append(Bottleneck(inside, width, stride if place == 0 else 1))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Decoder(nn.Module):
    """A layer of the transformer, with one head's worth of code: what counts is the products."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        attention = nn.functional.scaled_dot_product_attention(
            self.q(y), self.k(y), self.v(y), is_causal=True
        )
        x = x + self.o(attention)
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def transformer() -> nn.Module:
    layers = [Decoder(4096, 11008) for _ in range(32)]
    head = nn.Linear(4096, 32000, bias=False)
    return nn.Sequential(nn.Embedding(32000, 4096), *layers, nn.RMSNorm(4096), head)


def program_and_rows(build: Callable[[], nn.Module], x: Tensor) -> tuple[Program, dict[str, int]]:
    """The block-diagonal program of a network on the meta device, and the rows of its layers."""
    with torch.device("meta"):
        model = build()
    net = kfac_fx.transform(model, structure="block_diagonal", max_factor_dim=16384, check=False)
    rows: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            features = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            rows[name] = output.numel() // features

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(note(name))
    model(x)
    return Program(net.curvature), rows


def predictions(program: Program, rows: dict[str, int], fraction: float) -> list[Prediction]:
    compute = Compute.modelled(
        program, rows, products=PRODUCTS, factorisations=FACTORISATIONS, launch=LAUNCH
    )
    plans = [
        Plan(size, statistics_every=10, refresh_every=100, memory_fraction=fraction, overlap=1.0)
        for size in SIZES
    ]
    return [simulate(program, compute, LINKS, plan) for plan in plans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default="distributed_scaling.png")
    output = parser.parse_args().output
    logging.getLogger("kfac_fx").setLevel(logging.ERROR)  # of norms, which have no full blocks
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = torch.empty(IMAGES, 3, 224, 224, device="meta")
    tokens = torch.empty(TOKENS // 4096, 4096, dtype=torch.long, device="meta")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for column, (title, build, x) in enumerate(
        (
            (f"ResNet-50, {IMAGES} images a GPU", resnet, images),
            (f"7B transformer, {TOKENS:,} tokens a GPU", transformer, tokens),
        )
    ):
        program, rows = program_and_rows(build, x)
        count = sum(b.parameter_count for b in program.curvature.blocks.values())
        print(f"{title}: {len(program.curvature.blocks)} blocks, {count:,} parameters")
        print("   GPUs  ms (1.0)  ms (0.0)  of training  GiB of inverses (1.0)  (0.0)")
        everywhere, owned = (predictions(program, rows, fraction) for fraction in (1.0, 0.0))
        for size, one, other in zip(SIZES, everywhere, owned, strict=True):
            training = one.seconds["training"]
            print(
                f"{size:7}  {1e3 * one.step:8.1f}  {1e3 * other.step:8.1f}  "
                f"{min(one.step, other.step) / training:11.2f}  "
                f"{one.memory['inverses'] / 2**30:21.2f}  {other.memory['inverses'] / 2**30:5.2f}"
            )
        above, below = axes[:, column]
        above.set_title(title)
        for label, found, style in (
            ("inverses everywhere", everywhere, "o-"),
            ("inverses with their owner", owned, "s-"),
        ):
            above.semilogx(SIZES, [1e3 * p.step for p in found], style, label=label, base=2)
            memory = [p.memory["inverses"] / 2**30 for p in found]
            below.loglog(SIZES, memory, style, label=label, base=2)
        above.axhline(
            1e3 * everywhere[0].seconds["training"], ls=":", color="grey", label="training alone"
        )
        above.set(ylabel="milliseconds a step", ylim=(0, None))
        below.set(xlabel="GPUs", ylabel="GiB of inverses a GPU")
        above.legend()
    axes[1, 0].set_xticks(SIZES[::2], [str(size) for size in SIZES[::2]])
    figure.suptitle("Predicted, on assumed hardware: statistics every 10 steps, refresh every 100")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
