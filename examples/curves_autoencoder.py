"""A deep autoencoder on CURVES: K-FAC against SGD with Nesterov momentum at equal wall time.

784-400-200-100-50-25-6-25-50-100-200-400-784, tanh units, linear code, logistic outputs, sparse
initialisation. SGD has the momentum schedule of Sutskever et al. (2013) and smaller batches, with
which it is faster. Evaluation is not on the clock.

    python examples/curves_autoencoder.py --seconds 120
    python examples/curves_autoencoder.py --quick
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from common import Panel, parse, save_figure, show_table, use_threads
from curves import curves
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import kfac_fx

SIZES = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
SETTINGS: dict[str, Any] = {
    "damping": 1e-2,
    "trust_region": 0.1,
    "statistics_every": 10,
    "refresh_every": 50,
}
GRIDS = {  # learning rate and momentum (the largest of SGD's schedule)
    "K-FAC": [(lr, 0.9) for lr in (0.03, 0.05, 0.1, 0.2)],
    "SGD": [(lr, momentum) for lr in (0.001, 0.002) for momentum in (0.95, 0.99)],
}


def autoencoder(seed: int, sizes: Sequence[int] = SIZES) -> nn.Sequential:
    """Build the network with the sparse initialisation: 15 nonzero incoming weights a unit.

    For tanh (Sutskever et al. 2013) they are from N(0, 1) / 4 and biases are 1/2; around linear and
    logistic units half of the scaling goes (Martens 2010).
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    last = len(sizes) - 1
    linear_layers = (last // 2, last)  # without tanh: the code and the output
    tanh_on_one_side = (1, last // 2, last // 2 + 1, last)
    for index, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        linear = nn.Linear(inputs, outputs)
        with torch.no_grad():
            chosen = torch.rand(outputs, inputs, generator=generator).argsort(1) < 15
            linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) * chosen)
            linear.weight.mul_(0.5 if index in tanh_on_one_side else 0.25)
            linear.bias.fill_(0.0 if index in linear_layers else 0.5)
        layers.append(linear)
        if index not in linear_layers:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def negative_log_likelihood(outputs: Tensor, images: Tensor) -> Tensor:
    """Bernoulli, summed over pixels, mean over cases."""
    return F.binary_cross_entropy_with_logits(outputs, images, reduction="sum") / len(images)


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the squared reconstruction error and the negative log-likelihood, per case."""
    outputs = net(images)
    error = (outputs.sigmoid() - images).square().sum() / len(images)
    return float(error), float(negative_log_likelihood(outputs, images))


@dataclass
class Run:
    """One training run; every list has an entry for each evaluation."""

    method: str
    lr: float
    momentum: float
    seconds: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    train: list[tuple[float, float]] = field(default_factory=list)
    test: list[tuple[float, float]] = field(default_factory=list)

    @property
    def final_error(self) -> float:
        """Return the last training error; infinite when the run diverged."""
        error = self.train[-1][0]
        return error if math.isfinite(error) else math.inf


def momentum_at(iteration: int, largest: float) -> float:
    """Return the momentum of Sutskever et al. (2013): 1/2, 3/4, 5/6 and on, every 250 steps."""
    return min(1 - 0.5 / (iteration // 250 + 1), largest)


def train(
    run: Run, train_set: Tensor, test_set: Tensor, limit: float, options: argparse.Namespace
) -> Run:
    """Train for `limit` seconds of wall time, with some thirty evaluations on the way."""
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    net: nn.Module = autoencoder(options.seed)
    preconditioner = None
    if run.method == "K-FAC":
        net = kfac_fx.transform(net, structure=options.structure)
        preconditioner = kfac_fx.Preconditioner(net, likelihood="bernoulli", **SETTINGS)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=run.lr, momentum=run.momentum, nesterov=run.method == "SGD"
    )
    batch_size = options.batch_size if run.method == "K-FAC" else options.sgd_batch_size
    clock, iteration = 0.0, 0
    description = f"{run.method:5} lr={run.lr:<6g} momentum={run.momentum:<4g}"
    with tqdm(total=round(limit), desc=description, unit="s", bar_format=BAR) as bar:
        while True:
            if clock >= limit * len(run.seconds) / 30:
                run.seconds.append(clock)
                run.iterations.append(iteration)
                run.train.append(evaluate(net, train_set[:5000]))
                run.test.append(evaluate(net, test_set))
                bar.set_postfix_str(f"{iteration} iterations, error {run.train[-1][0]:.3g}")
                bar.update(min(round(clock), bar.total) - bar.n)
                if clock >= limit or run.final_error == math.inf:
                    return run
            chosen = torch.randint(len(train_set), (batch_size,), generator=generator)
            images = train_set[chosen]
            start = time.perf_counter()
            if run.method == "SGD":
                optimizer.param_groups[0]["momentum"] = momentum_at(iteration, run.momentum)
            optimizer.zero_grad()
            outputs = net(images)
            loss = negative_log_likelihood(outputs, images)
            if preconditioner is not None:
                preconditioner.observe(outputs)
            loss.backward()
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()
            clock += time.perf_counter() - start
            iteration += 1


BAR = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} s, {postfix}"


def report(runs: Sequence[Run]) -> None:
    """Print one row a run."""
    header = (
        "method, lr, momentum, seconds, iterations, train error, test error, train NLL, test NLL"
    )
    rows = []
    for run in runs:
        figures = zip(run.train[-1], run.test[-1], strict=True)
        scores = [f"{value:.4f}" for pair in figures for value in pair]
        setting = [run.method, f"{run.lr:g}", f"{run.momentum:g}"]
        rows.append([*setting, f"{run.seconds[-1]:.0f}", str(run.iterations[-1]), *scores])
    show_table(header.split(", "), rows)


def main() -> None:
    """Tune both methods, train both for the same time, print the table and save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="of each method's final run")
    parser.add_argument("--selection", type=float, default=20, help="seconds of a grid point")
    parser.add_argument("--structure", default="block_diagonal")
    parser.add_argument("--cases", type=int, default=20_000, help="images to train on")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--sgd-batch-size", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="curves_autoencoder.png")
    options = parse(parser, seconds=0.5, selection=0.1, cases=1000, threads=1)
    batches = f"batches of {options.batch_size} (K-FAC) and {options.sgd_batch_size} (SGD)"
    print(use_threads(options.threads), batches, options.structure, sep=", ")

    train_set, test_set = curves(options.cases, seed=0), curves(options.cases // 2, seed=1)
    best: dict[str, Run] = {}
    tried: list[Run] = []
    for method, grid in GRIDS.items():
        runs = [
            train(Run(method, *point), train_set, test_set, options.selection, options)
            for point in grid
        ]
        tried += runs
        chosen = min(runs, key=lambda run: run.final_error)
        final = Run(method, chosen.lr, chosen.momentum)
        best[method] = train(final, train_set, test_set, options.seconds, options)

    print(f"\nGrid, {options.selection:g} s a point; the lowest training error is chosen:")
    report(tried)
    print(
        f"\nEqual wall time, {options.seconds:g} s; error is squared, NLL in nats, both per case:"
    )
    report(list(best.values()))
    errors = {method: [error for error, _ in run.train] for method, run in best.items()}
    by_second = {method: (run.seconds, errors[method]) for method, run in best.items()}
    by_iteration = {method: (run.iterations, errors[method]) for method, run in best.items()}
    up = "training error (squared, per case)"
    save_figure(
        [
            Panel("CURVES, by second", "seconds", up, by_second),
            Panel("CURVES, by iteration", "iterations", up, by_iteration),
        ],
        options.output,
    )
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
