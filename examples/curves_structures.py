"""Block-tridiagonal against block-diagonal K-FAC on the CURVES autoencoder, by iterations.

Both train with the same settings, batches and initialisation; printed are the training errors,
the iterations that each needs to the block-diagonal run's last error, and the seconds.

    python examples/curves_structures.py --iterations 400
    python examples/curves_structures.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from common import parse, show_table, use_threads
from curves import curves
from curves_autoencoder import autoencoder, evaluate, negative_log_likelihood
from torch import Tensor
from tqdm import tqdm

import kfac_fx

STRUCTURES = ("block_diagonal", "block_tridiagonal")


def train(structure: str, images: Tensor, options: argparse.Namespace) -> tuple[list[float], float]:
    """Return the training error every `every` iterations, and the seconds spent training."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = kfac_fx.transform(autoencoder(0), structure=structure)
    preconditioner = kfac_fx.Preconditioner(
        net,
        "bernoulli",
        damping=options.damping,
        trust_region=options.trust_region,
        statistics_every=options.statistics_every,
        refresh_every=options.refresh_every,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=options.lr, momentum=0.9)
    errors, seconds = [], 0.0
    for iteration in tqdm(range(options.iterations + 1), desc=structure):
        if iteration % options.every == 0:
            errors.append(evaluate(net, images[:2000])[0])
        batch = images[torch.randint(len(images), (options.batch_size,), generator=generator)]
        start = time.perf_counter()
        optimizer.zero_grad()
        outputs = net(batch)
        loss = negative_log_likelihood(outputs, batch)
        preconditioner.observe(outputs)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        seconds += time.perf_counter() - start
    return errors, seconds


def iterations_to(level: float, errors: list[float], every: int) -> float:
    """Return when the curve first falls to `level`, interpolated between evaluations."""
    for index, (before, after) in enumerate(itertools.pairwise(errors)):
        if after <= level:
            return every * (index + (before - level) / (before - after))
    return float("inf")


def main() -> None:
    """Train both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--cases", type=int, default=20_000, help="images to train on")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--trust-region", type=float, default=0.1)
    parser.add_argument("--statistics-every", type=int, default=2)
    parser.add_argument("--refresh-every", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parse(parser, iterations=4, every=2, batch_size=100, cases=1000)
    print(use_threads(options.threads))
    images = curves(options.cases, seed=0)
    runs = {structure: train(structure, images, options) for structure in STRUCTURES}
    level = runs["block_diagonal"][0][-1]
    header = ["iterations", *(str(i) for i in range(0, options.iterations + 1, options.every))]
    show_table(
        header, [[name, *(f"{e:.2f}" for e in errors)] for name, (errors, _) in runs.items()]
    )
    for name, (errors, seconds) in runs.items():
        needed = iterations_to(level, errors, options.every)
        each = 1e3 * seconds / (options.iterations + 1)
        print(f"{name}: {needed:.0f} iterations to an error of {level:.2f}; {each:.0f} ms each")


if __name__ == "__main__":
    main()
