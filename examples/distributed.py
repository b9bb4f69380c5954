"""K-FAC in two processes on scikit-learn's digits, and how progress grows with the batch.

    torchrun --nproc-per-node 2 examples/distributed.py [--quick]

First a convolutional network under DistributedDataParallel, with a checkpoint after every epoch
from which the same command goes on (--folder). Then the batch-scaling experiment of distributed
K-FAC (Ba, Grosse & Martens 2017): steps to a training loss, for batches from 64 to all cases, with
K-FAC and with SGD, each with the best of its learning rates. It prints a table and draws
examples/distributed.png.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import kfac_fx
from kfac_fx.distributed import Checkpoints, DataParallel

BATCHES = (64, 128, 256, 512, 1437)
RATES = {"K-FAC": (0.01, 0.03, 0.1, 0.3, 1.0), "SGD": (0.03, 0.1, 0.2, 0.3, 0.5)}
QUICK_BATCHES, QUICK_RATES = (512,), {"K-FAC": (0.3,), "SGD": (0.3,)}
GOAL = 0.02
MOST_STEPS = 300


def digits() -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(24 * 16, 10),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh()),
        *(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 10)),
    )


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def train(epochs: int, folder: Path) -> None:
    """The training loop, as it is without K-FAC but for four lines."""
    torch.manual_seed(0)
    training, test = digits()
    workers = DataParallel(memory_fraction=0.5, timeout=120)
    net = kfac_fx.transform(convolutional())
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(
        ddp, likelihood="categorical", damping=0.1, refresh_every=5, workers=workers
    )
    sampler: Any = DistributedSampler(training, seed=1)
    loader = DataLoader(training, batch_size=128 // workers.size, sampler=sampler)
    checkpoints = Checkpoints(folder, workers)
    parts = {"net": ddp, "optimizer": optimizer, "kfac": preconditioner}
    for epoch in range(checkpoints.load(**parts) or 0, epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            with workers.watching():
                optimizer.zero_grad()
                outputs = ddp(x)
                loss = F.cross_entropy(outputs, y)
                preconditioner.observe(outputs)
                loss.backward()
                preconditioner.step()
                optimizer.step()
        checkpoints.save(epoch + 1, **parts)
        with torch.no_grad():
            right = net(test.tensors[0]).argmax(1) == test.tensors[1]
        accuracy = right.float().mean()
        say(f"epoch {epoch + 1}: loss {float(loss.detach()):.4f}, test accuracy {accuracy:.1%}")
    sent = ", ".join(f"{name} {count / 2**20:.1f}" for name, count in workers.traffic.items())
    say(f"MiB in messages: {sent}")


def steps_to_goal(method: str, batch: int, rate: float, start: nn.Module) -> int | None:
    """Steps until the loss over all training cases is at the goal; None if it takes too many."""
    model = copy.deepcopy(start)
    workers = DataParallel(timeout=120)
    net = kfac_fx.transform(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(net, damping=0.1, refresh_every=5, workers=workers)
    (x, y), _ = (data.tensors for data in digits())
    draws = torch.Generator().manual_seed(2)
    for step in range(MOST_STEPS):
        order = torch.randperm(len(x), generator=draws)[:batch]
        own = order[workers.rank :: workers.size]
        optimizer.zero_grad()
        outputs = net(x[own])
        if method == "K-FAC":
            preconditioner.observe(outputs)
        (F.cross_entropy(outputs, y[own], reduction="sum") / batch).backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
        if method == "K-FAC":
            preconditioner.step()
        optimizer.step()
        with torch.no_grad():
            loss = float(F.cross_entropy(model(x), y))
        if loss <= GOAL:
            return step + 1
        if not loss < 100:
            return None
    return None


def scaling(
    batches: tuple[int, ...], grids: dict[str, tuple[float, ...]]
) -> dict[str, list[int | None]]:
    """Steps to the goal by batch, with the best learning rate of each method's grid."""
    torch.manual_seed(3)
    start = perceptron()
    found: dict[str, list[int | None]] = {}
    for method, rates in grids.items():
        found[method] = []
        for batch in batches:
            tried = [steps_to_goal(method, batch, rate, start) for rate in rates]
            found[method].append(min((t for t in tried if t is not None), default=None))
    return found


def draw(batches: tuple[int, ...], found: dict[str, list[int | None]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for method, steps in found.items():
        shown = [(b, s) for b, s in zip(batches, steps, strict=True) if s is not None]
        axes.loglog(*zip(*shown, strict=True), "o-", label=method)
    first = found["K-FAC"][0]
    if first is not None:
        ideal = [first * batches[0] / batch for batch in batches]
        axes.loglog(batches, ideal, ":", color="grey", label="half the steps for twice the batch")
    axes.set(xlabel="batch", ylabel=f"steps to a training loss of {GOAL}")
    axes.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two epochs, one batch size and rate")
    parser.add_argument("--folder", type=Path, default=Path("outputs/distributed"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(2 if options.quick else 10, options.folder)
    batches, grids = (QUICK_BATCHES, QUICK_RATES) if options.quick else (BATCHES, RATES)
    found = scaling(batches, grids)
    say("steps to a training loss of " + str(GOAL))
    say("batch  " + "".join(f"{batch:>8}" for batch in batches))
    for method, steps in found.items():
        say(f"{method:7}" + "".join(f"{step or '-':>8}" for step in steps))
    if not options.quick and dist.get_rank() == 0:
        draw(batches, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
