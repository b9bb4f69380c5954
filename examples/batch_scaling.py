"""Progress per iteration against the batch size, K-FAC and SGD on the CURVES autoencoder.

From one network that SGD has half trained, each method makes the same number of iterations with
batches of 64 to 8,192 cases; SGD (Nesterov momentum) with the best of its learning rates for each
size. Printed is the training error that is left, drawn what was taken off.

    python examples/batch_scaling.py --iterations 50
    python examples/batch_scaling.py --quick
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from common import Panel, parse, save_figure, show_table, use_threads
from curves import curves
from curves_autoencoder import autoencoder, evaluate, negative_log_likelihood
from torch import Tensor, nn
from tqdm import tqdm

import kfac_fx

SIZES = (64, 256, 1024, 4096, 8192)
RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)

Step = Callable[[Tensor], None]


def kfac(net: nn.Module) -> Step:
    """Algorithm 2; lambda_0 is that of a network past its start."""
    optimizer = kfac_fx.KFAC(net, "bernoulli", damping=0.1)

    def step(batch: Tensor) -> None:
        optimizer.step(batch, batch)

    return step


def sgd(net: nn.Module, lr: float) -> Step:
    """Nesterov momentum."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        negative_log_likelihood(net(batch), batch).backward()
        optimizer.step()

    return step


def left(net: nn.Module, step: Step, images: Tensor, size: int, iterations: int) -> float:
    """Return the training error after so many iterations."""
    torch.manual_seed(1)
    for _ in tqdm(range(iterations), desc=f"batches of {size}", leave=False):
        step(images[torch.randperm(len(images))[:size]])
    return evaluate(net, images[:5000])[0]


def main() -> None:
    """Print the table and save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--start", type=int, default=4000, help="iterations of SGD before")
    parser.add_argument("--cases", type=int, default=20_000, help="images to train on")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of the batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="batch_scaling.png")
    options = parse(parser, iterations=3, start=20, cases=1000, sizes=(64, 256))
    print(use_threads(options.threads))

    images = curves(options.cases, seed=0)
    model = autoencoder(0)
    start = left(model, sgd(model, 2e-3), images, 100, options.start)
    print(f"training error at the start: {start:.2f}")

    found: dict[str, list[float]] = {"K-FAC": [], "SGD": []}
    for size in options.sizes:
        net = kfac_fx.transform(copy.deepcopy(model))
        found["K-FAC"].append(left(net, kfac(net), images, size, options.iterations))
        errors = []
        for rate in RATES:
            net = copy.deepcopy(model)
            errors.append(left(net, sgd(net, rate), images, size, options.iterations))
        found["SGD"].append(min(e for e in errors if e == e))
        print(f"batches of {size}: {found['K-FAC'][-1]:.2f} and {found['SGD'][-1]:.2f}", flush=True)
    show_table(
        ["error left, batches of", *map(str, options.sizes)],
        [[name, *(f"{error:.2f}" for error in errors)] for name, errors in found.items()],
    )
    progress = {n: (options.sizes, [start - e for e in errors]) for n, errors in found.items()}
    up = f"error taken off in {options.iterations} iterations"
    save_figure(
        [Panel("CURVES, by batch size", "batch size", up, progress, log=True)], options.output
    )
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
