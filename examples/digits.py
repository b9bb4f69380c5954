"""K-FAC against SGD with momentum and Adam on scikit-learn's handwritten digits.

A multilayer perceptron and a convolutional network with batch normalisation; each method takes
the learning rate of its grid whose final training loss is lowest.

    python examples/digits.py --quick
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import torch
from common import Panel, save_figure, show_table, use_threads
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import kfac_fx

GRIDS = {
    "K-FAC": (0.03, 0.1, 0.3),
    "SGD": (0.03, 0.1, 0.3, 0.5),
    "Adam": (0.001, 0.003, 0.01, 0.03),
}
QUICK_GRIDS = {"K-FAC": (0.1, 0.3), "SGD": (0.1, 0.3), "Adam": (0.003, 0.01)}
BATCH = 128
Cases = tuple[Tensor, Tensor]


def digits() -> tuple[Cases, Cases]:
    """Return 1,297 training and 500 test cases; images are scaled by fixed constants."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = (images - 4.9) / 6.0  # grey levels run from 0 to 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    return (images[train], labels[train]), (images[test], labels[test])


def perceptron() -> nn.Module:
    """Build 64-128-64-32-10 with tanh units."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 128), nn.Tanh()),
        *(nn.Linear(128, 64), nn.Tanh()),
        *(nn.Linear(64, 32), nn.Tanh()),
        nn.Linear(32, 10),
    )


def convolutional() -> nn.Module:
    """Build three convolutions with batch normalisation and a linear classifier."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


NETWORKS = {"MLP": perceptron, "CNN with BatchNorm": convolutional}


@dataclass
class Run:
    """One training run: losses of the whole training set after each epoch, in evaluation mode."""

    method: str
    lr: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def epochs_to(self, level: float) -> int | None:
        """Return the first epoch whose training loss is `level` or lower."""
        return next((epoch for epoch, loss in enumerate(self.losses) if loss <= level), None)


def train(run: Run, model: nn.Module, data: tuple[Cases, Cases], epochs: int, bar: tqdm) -> Run:
    """Train for some epochs; evaluation is not on the clock."""
    (images, labels), (test_images, test_labels) = data
    net, preconditioner = model, None
    if run.method == "Adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=run.lr)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9)
    if run.method == "K-FAC":
        net = kfac_fx.transform(model)
        preconditioner = kfac_fx.Preconditioner(net, likelihood="categorical")

    generator = torch.Generator().manual_seed(0)
    run.losses.append(evaluate(net, images, labels)[0])
    run.seconds.append(0.0)
    for _ in range(epochs):
        start = time.process_time()
        net.train()
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            outputs = net(images[batch])
            loss = F.cross_entropy(outputs, labels[batch])
            if preconditioner is not None:
                preconditioner.observe(outputs)
            loss.backward()
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()
        run.seconds.append(run.seconds[-1] + time.process_time() - start)
        run.losses.append(evaluate(net, images, labels)[0])
        bar.update()
    run.accuracy = evaluate(net, test_images, test_labels)[1]
    return run


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy in evaluation mode."""
    net.eval()
    outputs = net(images)
    loss = F.cross_entropy(outputs, labels)
    return float(loss), float((outputs.argmax(1) == labels).float().mean())


def report(runs: dict[str, Run]) -> None:
    """Print one row a method."""
    levels = [min(runs[rival].losses) for rival in ("SGD", "Adam")]
    rows = []
    for run in runs.values():
        reached = [run.epochs_to(level) for level in levels]
        rows.append(
            [
                run.method,
                f"{run.lr:g}",
                f"{run.losses[-1]:.2e}",
                f"{run.accuracy:.1%}",
                *(
                    "-" if epoch is None else f"{run.seconds[epoch]:.1f} ({epoch})"
                    for epoch in reached
                ),
                f"{run.seconds[-1]:.1f}",
            ]
        )
    header = (
        "method, best lr, final train loss, test accuracy, seconds (epochs) to SGD's best loss, "
        "to Adam's, seconds in all"
    )
    show_table(header.split(", "), rows)


def main() -> None:
    """Train both networks with every method, print a table for each and save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs and a smaller grid")
    parser.add_argument("--epochs", type=int, help="default 48, with --quick 30")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="digits.png")
    options = parser.parse_args()
    epochs = options.epochs or (30 if options.quick else 48)
    grids = QUICK_GRIDS if options.quick else GRIDS
    data = digits()

    best: dict[str, dict[str, Run]] = {}
    count = len(NETWORKS) * sum(map(len, grids.values())) * epochs
    with tqdm(total=count, unit="epoch") as bar:
        setting = use_threads(options.threads)
        for title, build in NETWORKS.items():
            best[title] = {}
            for method, grid in grids.items():
                runs = []
                for lr in grid:
                    bar.set_description(f"{title}, {method}, lr {lr:g}")
                    torch.manual_seed(0)
                    runs.append(train(Run(method, lr), build(), data, epochs, bar))
                best[title][method] = min(runs, key=lambda run: run.losses[-1])

    print(f"\n1,297 training and 500 test images, batch {BATCH}, {epochs} epochs; {setting}")
    panels = []
    for title, chosen in best.items():
        print(f"\n{title}")
        report(chosen)
        lines = {name: (range(epochs + 1), run.losses) for name, run in chosen.items()}
        level = min(chosen["SGD"].losses)
        panels.append(Panel(title, "epoch", "training loss", lines, level))
    save_figure(panels, options.output)
    print(f"\nsaved {options.output}")


if __name__ == "__main__":
    main()
