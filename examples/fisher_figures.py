"""The Fisher's structure, after figures 2, 3 and 5 of Martens & Grosse (2015).

A 256-20-20-20-20-20-10 tanh network on handwritten digits of 16 x 16 pixels, trained a little; of
its middle four layers: the exact Fisher F, its Kronecker form Ftilde, and what the block-diagonal
and the block-tridiagonal inverse make of it. Then the same for a residual network, whose couplings
are a forest, chosen by the topology or by the data.

    python examples/fisher_figures.py --save fisher.png
    python examples/fisher_figures.py --quick
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from common import parse, show_table, use_threads
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import viz

WIDTH = 20


def digits(cases: int) -> tuple[Tensor, Tensor]:
    """Return images of 256 pixels, enlarged from 8 x 8, and labels."""
    data = load_digits()
    images = torch.tensor(data.images)[:cases, None] / 8 - 1
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    return images.flatten(1), torch.tensor(data.target)[:cases]


def chain() -> nn.Module:
    """Build the network of the paper."""
    sizes = [256, *[WIDTH] * 5, 10]
    pairs = itertools.pairwise(sizes)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """Three residual branches of two layers each, between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(256, WIDTH), nn.Linear(WIDTH, 10)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = torch.tanh(self.stem(x))
        for branch in self.branches:
            h = h + branch(torch.tanh(h))
        return self.head(torch.tanh(h))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> float:
    """Train with Adam and return the accuracy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return float((model(x).argmax(1) == y).double().mean())


def inverse(
    model: nn.Module, names: Sequence[str], x: Tensor, damping: float, **options: Any
) -> tuple[Tensor, kfac_fx.Preconditioner]:
    """Return the library's inverse as a dense matrix, and who computed it."""
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in names]
    net = kfac_fx.transform(model, exclude=others, **options)
    pre = kfac_fx.Preconditioner(net, "categorical", fisher="exact", damping=damping)
    pre.observe(outputs := net(x))
    outputs.sum().backward()
    pre.step()
    model.zero_grad()
    return viz.dense_inverse(pre, names), pre


def relative(got: Tensor, want: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((got - want).norm() / want.norm())


def block_averages(matrix: Tensor, blocks: int) -> Tensor:
    """Return the mean absolute value of each block."""
    size = len(matrix) // blocks
    return matrix.abs().view(blocks, size, blocks, size).mean((1, 3))


# ------------------------------------------------------------------------------------- pictures
def show_forest(axes: Any, pre: kfac_fx.Preconditioner, names: Sequence[str], title: str) -> None:
    """Draw layers on a line, dependencies as thin arcs and couplings as thick ones."""
    from matplotlib.patches import FancyArrowPatch

    place = {name: index for index, name in enumerate(names)}
    coupled = {frozenset((c.child, c.parent)) for c in pre.couplings}
    edges = {frozenset((edge.source, edge.target)) for edge in pre.curvature.edges}
    for pair in edges | coupled:
        a, b = sorted(place[name] for name in pair)
        inside = pair in coupled
        style = f"arc3,rad={0 if b - a == 1 else -0.4}"
        axes.add_patch(
            FancyArrowPatch(
                *((a, 0), (b, 0)),
                connectionstyle=style,
                arrowstyle="-",
                color="#c2410c" if inside else "0.75",
                linewidth=2.5 if inside else 0.8,
                zorder=2 if inside else 1,
            )
        )
    axes.scatter(
        list(place.values()), [0] * len(place), s=60, color="white", edgecolor="k", zorder=3
    )
    for name, index in place.items():
        axes.text(index, -0.25, name.replace("branches.", ""), ha="center", va="top", fontsize=8)
    axes.set(xlim=(-0.5, len(place) - 0.5), ylim=(-0.6, 1.2))
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def draw(path: str, first: dict[str, Tensor], second: dict[str, Tensor], forests: Any) -> None:
    """Save all panels as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 12.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(5, 3, height_ratios=[3, 3, 3, 3, 1.6])
    for axes, (title, matrix) in zip(panels[:3].flat, first.items(), strict=True):
        viz.show_matrix(axes, matrix, title)
    for axes, (title, matrix) in zip(panels[3], second.items(), strict=True):
        viz.show_matrix(axes, matrix, title)
    for axes, (title, pre, names) in zip(panels[4], forests, strict=False):
        show_forest(axes, pre, names, title)
    panels[4, 2].axis("off")
    figure.savefig(path, dpi=80)


# -------------------------------------------------------------------------------------- the runs
def of_chain(x: Tensor, y: Tensor, epochs: int, damping: float) -> dict[str, Tensor]:
    """Print the errors for the paper's network and return its panels."""
    model = chain()
    accuracy = train(model, x, y, epochs)
    names = ["2", "4", "6", "8"]
    exact, plain = viz.exact_fisher(model, names, x), viz.kronecker_fisher(model, names, x)
    Ft = viz.kronecker_fisher(model, names, x, damping)
    Ft_inverse = torch.linalg.inv(Ft)
    breve, _ = inverse(model, names, x, damping, structure="block_diagonal")
    hat, _ = inverse(model, names, x, damping)
    Fbreve, Fhat = torch.linalg.inv(breve), torch.linalg.inv(hat)
    print(f"chain, accuracy {accuracy:.3f}, damping {damping:g}")
    size = len(Ft) // 4
    near = torch.kron(
        torch.tensor([[float(abs(i - j) < 2) for j in range(4)] for i in range(4)]),
        torch.ones(size, size),
    )
    rows = [
        (name, f"{relative(M, Ft_inverse):.4f}", f"{relative(P * near, Ft * near):.1e}")
        for name, M, P in (("block-diagonal", breve, Fbreve), ("block-tridiagonal", hat, Fhat))
    ]
    show_table(("approximation", "error of inverse", "error of tridiagonal blocks"), rows)
    averages = block_averages(Ft_inverse, 4)
    print("4 x 4 block averages of |Ftilde^-1|:")
    for row in averages / averages.max():
        print("  " + "  ".join(f"{value:6.3f}" for value in row))
    return {
        "|F|": exact,
        "|Ftilde|": plain,
        "|F - Ftilde|": exact - plain,
        "|Ftilde^-1|": Ft_inverse,
        "block averages of |Ftilde^-1|": averages,
        "|Fhat^-1|": hat,
        "|Fbreve - Ftilde|": Fbreve - Ft,
        "|Fhat - Ftilde|": Fhat - Ft,
        "|Fhat^-1 - Ftilde^-1|": hat - Ft_inverse,
    }


def of_residual(x: Tensor, y: Tensor, epochs: int, damping: float) -> tuple[Any, Any]:
    """Print the errors for the residual network and return its panels and forests."""
    model = Residual()
    accuracy = train(model, x, y, epochs)
    names = [f"branches.{i}.{j}" for i in range(3) for j in (0, 2)]
    Ft_inverse = torch.linalg.inv(viz.kronecker_fisher(model, names, x, damping))
    print(f"residual network, accuracy {accuracy:.3f}, damping {damping:g}")
    rows, made = [], {}
    for label, options in (
        ("block-diagonal", {"structure": "block_diagonal"}),
        ("forest of the topology", {}),
        ("forest of the data", {"couplings": "data"}),
    ):
        dense, pre = inverse(model, names, x, damping, **options)
        made[label] = dense, pre
        pairs = " ".join(f"{c.child[9:]}|{c.parent[9:]}" for c in pre.couplings)
        rows.append((label, f"{relative(dense, Ft_inverse):.4f}", pairs or "-"))
    recorded = made["forest of the data"][1]
    information = {
        label: recorded.mutual_information(pre.couplings) for label, (_, pre) in made.items()
    }
    rows = [(*row[:2], f"{information[row[0]]:.1f}", row[2]) for row in rows]
    show_table(("approximation", "error of inverse", "information", "couplings"), rows)
    second = {
        "residual: |Ftilde^-1|": Ft_inverse,
        "block averages": block_averages(Ft_inverse, 6),
        "|Fhat^-1|, data": made["forest of the data"][0],
    }
    forests = [
        (label, made[label][1], names) for label in ("forest of the topology", "forest of the data")
    ]
    return second, forests


def main() -> None:
    """Print the tables and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", default=None, help="file of the picture")
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parse(parser, cases=60, epochs=1)
    print(use_threads(arguments.threads))
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x, y = digits(arguments.cases)
    first = of_chain(x, y, arguments.epochs, arguments.damping)
    second, forests = of_residual(x, y, arguments.epochs, arguments.damping)
    if arguments.save:
        draw(arguments.save, first, second, forests)


if __name__ == "__main__":
    main()
