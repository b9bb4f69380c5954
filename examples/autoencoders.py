"""K-FAC against tuned SGD, Adam and Muon on deep autoencoders, by second and by iteration.

CURVES has the architecture of Martens & Grosse (2015), section 13, and the sparse initialisation;
--data digits trains a smaller one on the digits of scikit-learn. Every method gets the same
processor seconds for each setting of its grid, and then the best setting gets the full time. K-FAC
is ``kfac_fx.KFAC`` with growing batches; SGD has Nesterov momentum and the schedule of Sutskever et
al. (2013). Seconds are of the processor, with one thread; evaluation is not on the clock.

    python examples/autoencoders.py --seconds 600 --selection 60
    python examples/autoencoders.py --data digits --seconds 60 --selection 10
    python examples/autoencoders.py --quick
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Panel, parse, save_figure, show_table, use_threads
from curves import curves
from curves_autoencoder import SIZES, autoencoder, evaluate, momentum_at, negative_log_likelihood
from torch import Tensor, nn
from tqdm import tqdm

import kfac_fx

Setting = dict[str, Any]
Steps = Iterator[nn.Module]
"""Makes one update before each item; the item is the network to evaluate."""


def kfac(model: nn.Sequential, images: Tensor, setting: Setting) -> Steps:
    """Algorithm 2 with its own step length, momentum and damping, and growing batches."""
    growth = setting.get("growth", 300)
    net = kfac_fx.transform(model)
    optimizer = kfac_fx.KFAC(net, "bernoulli", damping=setting["damping"])
    cases, first = len(images), setting["batch"]
    for k in range(10**9):
        size = min(round(first * math.exp(k / growth)), cases, setting["largest"])
        batch = images[torch.randperm(cases)[:size]]
        optimizer.step(batch, batch)
        yield net


def gradient_descent(
    model: nn.Sequential,
    images: Tensor,
    batch_size: int,
    optimizers: list[torch.optim.Optimizer],
    before: Callable[[int], None] = lambda iteration: None,
) -> Steps:
    """The loop of every method that needs only gradients."""
    for iteration in range(10**9):
        before(iteration)
        batch = images[torch.randint(len(images), (batch_size,))]
        loss = negative_log_likelihood(model(batch), batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        yield model


def sgd(model: nn.Sequential, images: Tensor, setting: Setting) -> Steps:
    """Nesterov momentum that grows to its largest value."""
    optimizer = torch.optim.SGD(model.parameters(), lr=setting["lr"], momentum=0.5, nesterov=True)

    def schedule(iteration: int) -> None:
        optimizer.param_groups[0]["momentum"] = momentum_at(iteration, setting["momentum"])

    return gradient_descent(model, images, setting["batch"], [optimizer], schedule)


def adam(model: nn.Sequential, images: Tensor, setting: Setting) -> Steps:
    """torch.optim.Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=setting["lr"])
    return gradient_descent(model, images, setting["batch"], [optimizer])


def muon(model: nn.Sequential, images: Tensor, setting: Setting) -> Steps:
    """torch.optim.Muon for the weights, Adam for the biases, at one learning rate."""
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    options: Any = {"lr": setting["lr"], "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [torch.optim.Muon(weights, **options), torch.optim.Adam(biases, lr=setting["lr"])]
    return gradient_descent(model, images, setting["batch"], optimizers)


METHODS: dict[str, Callable[[nn.Sequential, Tensor, Setting], Steps]] = {
    "K-FAC": kfac,
    "SGD": sgd,
    "Adam": adam,
    "Muon": muon,
}


@dataclass(frozen=True)
class Task:
    """Data, layer sizes and the settings that each method may choose from."""

    train: Tensor
    test: Tensor
    sizes: tuple[int, ...]
    grids: dict[str, list[Setting]]


def curves_task() -> Task:
    """20,000 and 10,000 images of CURVES."""
    grids: dict[str, list[Setting]] = {
        "K-FAC": [{"damping": d, "batch": 1000, "largest": 4000} for d in (150.0, 10.0, 1.0)],
        "SGD": [
            {"lr": lr, "momentum": momentum, "batch": 100}
            for lr in (0.0005, 0.001, 0.002)
            for momentum in (0.95, 0.99)
        ],
        "Adam": [{"lr": lr, "batch": 100} for lr in (3e-4, 1e-3, 3e-3)],
        "Muon": [{"lr": lr, "batch": 100} for lr in (1e-3, 3e-3, 1e-2)],
    }
    return Task(curves(20_000, seed=0), curves(10_000, seed=1), SIZES, grids)


def digits_task() -> Task:
    """1,500 and 297 digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    grids: dict[str, list[Setting]] = {
        "K-FAC": [{"damping": d, "batch": 500, "largest": 1500} for d in (150.0, 10.0, 1.0)],
        "SGD": [
            {"lr": lr, "momentum": momentum, "batch": 50}
            for lr in (0.002, 0.005, 0.01, 0.02)
            for momentum in (0.95, 0.99)
        ],
        "Adam": [{"lr": lr, "batch": 50} for lr in (3e-4, 1e-3, 3e-3, 1e-2)],
        "Muon": [{"lr": lr, "batch": 50} for lr in (3e-4, 1e-3, 3e-3, 1e-2)],
    }
    return Task(images[:1500], images[1500:], (64, 60, 40, 20, 8, 20, 40, 60, 64), grids)


TASKS = {"curves": curves_task, "digits": digits_task}


@dataclass
class Run:
    """One training run; every list has an entry for each evaluation."""

    method: str
    setting: Setting
    seconds: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The lowest training error; infinite when the run diverged."""
        return min(self.train) if math.isfinite(self.train[-1]) else math.inf

    def reached(self, level: float) -> tuple[float, int]:
        """Seconds and iterations to a training error; infinite seconds when it was not reached."""
        found = (at for at, error in enumerate(self.train) if error <= level)
        at = next(found, None)
        return (math.inf, 0) if at is None else (self.seconds[at], self.iterations[at])


def evaluation_times(limit: float, count: int) -> Iterator[float]:
    """0 and the limit, and between them as many on a linear axis as on a logarithmic one."""
    linear = {limit * k / count for k in range(count + 1)}
    yield from sorted(linear | {limit * 10 ** (-2 * k / count) for k in range(count + 1)})
    yield math.inf


def train(
    method: str, setting: Setting, task: Task, limit: float, seed: int, evaluations: int = 4
) -> Run:
    """Train for so many seconds; errors are of at most 5,000 cases."""
    torch.manual_seed(seed)
    net: nn.Module = autoencoder(seed, task.sizes)
    run = Run(method, setting)
    steps = METHODS[method](net, task.train, setting)
    due, clock, iteration = evaluation_times(limit, evaluations), 0.0, 0
    following = next(due)
    with tqdm(total=round(limit), desc=f"{method} {shown(setting)}", bar_format=BAR) as bar:
        while True:
            if clock >= following:
                following = next(time for time in due if time > clock)
                run.seconds.append(clock)
                run.iterations.append(iteration)
                run.train.append(evaluate(net, task.train[:5000])[0])
                run.test.append(evaluate(net, task.test[:5000])[0])
                bar.set_postfix_str(f"{iteration} iterations, error {run.train[-1]:.3g}")
                bar.update(min(round(clock), bar.total) - bar.n)
                if clock >= limit or not math.isfinite(run.train[-1]):
                    return run
            start = time.process_time()
            net = next(steps)
            clock += time.process_time() - start
            iteration += 1


BAR = "{desc} {percentage:3.0f}%|{bar:16}| {n_fmt}/{total_fmt} s, {postfix}"


def shown(setting: Setting) -> str:
    """A setting in a few words."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def compare(task: Task, options: argparse.Namespace) -> list[Run]:
    """Tune every method, and run its best settings for the full time."""
    finals = []
    for method in options.methods:
        grid = task.grids[method]
        tried = [train(method, point, task, options.selection, options.seed) for point in grid]
        print(f"\n{method}, {options.selection:g} s a setting:")
        show_table(("setting", "train error"), [[shown(r.setting), f"{r.best:.3f}"] for r in tried])
        best = sorted(tried, key=lambda run: run.best)[: options.finalists]
        runs = [train(method, r.setting, task, options.seconds, options.seed, 30) for r in best]
        finals.append(min(runs, key=lambda run: run.best))
    return finals


def report(runs: list[Run]) -> None:
    """Print the last errors, and what K-FAC needs to reach the best of each other method."""
    header = ("method", "setting", "iterations", "seconds", "train error", "test error")
    rows = []
    for run in runs:
        errors = [f"{run.best:.3f}", f"{run.test[-1]:.3f}"]
        spent = [str(run.iterations[-1]), f"{run.seconds[-1]:.0f}"]
        rows.append([run.method, shown(run.setting), *spent, *errors])
    show_table(header, rows)
    ours = [run for run in runs if run.method == "K-FAC"]
    for other in runs:
        if ours and other.method != "K-FAC":
            at = other.train.index(other.best)
            seconds, iterations = ours[0].reached(other.best)
            print(
                f"{other.method}'s best, {other.best:.3f}: after {other.seconds[at]:.0f} s and "
                f"{other.iterations[at]} iterations; K-FAC after {seconds:.0f} s "
                f"(1/{other.seconds[at] / seconds:.1f}) and {iterations} iterations "
                f"(1/{other.iterations[at] / max(iterations, 1):.0f})"
            )


def main() -> None:
    """Compare, print the table, save the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=TASKS, default="curves")
    parser.add_argument("--seconds", type=float, default=600, help="of each method's final runs")
    parser.add_argument("--selection", type=float, default=60, help="seconds of a grid point")
    parser.add_argument("--finalists", type=int, default=1, help="settings that get the full time")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="JSON file that collects runs between calls")
    parser.add_argument("--output", default="autoencoders_{data}.png")
    options = parse(parser, data="digits", seconds=0.5, selection=0.05)
    print(use_threads(1), options.data, sep=", ")

    runs: list[Run] = []
    if options.runs and options.runs.exists():
        runs = [Run(**run) for run in json.loads(options.runs.read_text())]
        runs = [run for run in runs if run.method not in options.methods]
    runs += compare(TASKS[options.data](), options)
    if options.runs:
        options.runs.write_text(json.dumps([asdict(run) for run in runs]))

    print(f"\nEqual processor time, {options.seconds:g} s; squared error of a case:")
    report(runs)
    by_second = {run.method: (run.seconds[1:], run.train[1:]) for run in runs}
    by_iteration = {run.method: (run.iterations[1:], run.train[1:]) for run in runs}
    up, output = "training error (squared, per case)", options.output.format(data=options.data)
    seconds = Panel("by second", "processor seconds, one thread", up, by_second)
    save_figure([seconds, Panel("by iteration", "iterations", up, by_iteration, log=True)], output)
    print(f"saved {output}")


if __name__ == "__main__":
    main()
