"""What a step of training costs with K-FAC, relative to SGD's.

    python tests/benchmarks/steps.py [--threads 1] [--compile] [--workloads autoencoder ResNet-8]

Every setting trains a network of its own, block-diagonal, for a whole refresh period at a time; so
does SGD with momentum in between. Printed is the median of the paired ratios of processor time; the
stages are of single calls. SGD and the settings run in one process with the threads stated.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from couplings import WORKLOADS
from torch import Tensor, nn

import kfac_fx

Step = Callable[[], None]


def loss_of(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(outputs)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Workload:
    """A network with one batch."""

    def __init__(self, name: str, compiled: bool) -> None:
        build, inputs, self.likelihood = WORKLOADS[name]
        torch.manual_seed(0)
        self.model, self.x = build(), inputs()
        outputs = self.model(self.x)
        bernoulli = self.likelihood == "bernoulli"
        self.y = self.x if bernoulli else torch.randint(10, outputs.shape[:-1])
        self.compiled = compiled

    def run(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network as it is called."""
        return torch.compile(model) if self.compiled else model

    def sgd(self) -> Step:
        model = copy.deepcopy(self.model)
        optimizer, run = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), self.run(model)

        def step() -> None:
            optimizer.zero_grad()
            loss_of(self.likelihood, run(self.x), self.y).backward()
            optimizer.step()

        return step

    def preconditioned(self, record: bool = True, **options: Any) -> Step:
        """Gradients from the full batch, preconditioned, and then SGD."""
        model = copy.deepcopy(self.model)
        net = kfac_fx.transform(model, (self.x,), structure="block_diagonal")
        options = {"damping": 1e-1, **options}
        pre = kfac_fx.Preconditioner(net, self.likelihood, **options)
        optimizer, run = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), self.run(net)

        def step() -> None:
            optimizer.zero_grad()
            outputs = run(self.x)
            pre.observe(outputs, self.y)
            loss_of(self.likelihood, outputs, self.y).backward()
            if record:
                pre.step()
            optimizer.step()

        return step

    def stochastic(self, **options: Any) -> Step:
        """``KFAC`` with a learning rate: statistics on a part of the batch."""
        net = kfac_fx.transform(copy.deepcopy(self.model), (self.x,), structure="block_diagonal")
        optimizer = kfac_fx.KFAC(net, self.likelihood, lr=1e-4, damping=1e-1, **options)
        return lambda: optimizer.step(self.x, self.y) and None


SETTINGS: dict[str, tuple[Callable[[Workload], Step], int]] = {
    "(a) sampled on 1/8 every step, refresh every 20": (
        lambda w: w.stochastic(statistics_fraction=1 / 8, refresh_every=20),
        20,
    ),
    "(b) empirical every step, refresh every 10": (
        lambda w: w.preconditioned(fisher="empirical", refresh_every=10),
        10,
    ),
    "(c) sampled every 10, refresh every 100": (
        lambda w: w.preconditioned(statistics_every=10, refresh_every=100),
        100,
    ),
}


def seconds(step: Step, count: int) -> float:
    """Processor seconds a step."""
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count


def paired(ours: Step, theirs: Step, period: int, rounds: int) -> Iterator[tuple[float, float]]:
    for step in (ours, theirs):
        seconds(step, 3)
    for _ in range(rounds):
        yield seconds(ours, period), seconds(theirs, period)


def stages(workload: Workload) -> str:
    """Milliseconds of a refresh, of an apply and of the statistics of the whole batch."""
    net = kfac_fx.transform(copy.deepcopy(workload.model), structure="block_diagonal")
    pre = kfac_fx.Preconditioner(net, workload.likelihood, damping=1e-1)
    gradients = {
        n: torch.randn_like(p) for n, p in net.named_parameters() if n in pre.curvature.covered
    }

    def plain() -> None:
        workload.model.zero_grad()
        loss_of(workload.likelihood, workload.model(workload.x), workload.y).backward()

    pre = kfac_fx.Preconditioner(net, workload.likelihood, fisher="empirical", damping=1e-1)

    def recorded() -> None:
        outputs = net(workload.x)
        pre.observe(outputs, workload.y)
        loss_of(workload.likelihood, outputs, workload.y).backward()

    def off() -> None:
        net.zero_grad()
        loss_of(workload.likelihood, net(workload.x), workload.y).backward()

    recorded()
    pre.step()
    times: dict[str, list[float]] = {}
    for _ in range(7):
        pre._recorder.switch(True)
        for name, run in (("plain", plain), ("recorded", recorded)):
            times.setdefault(name, []).append(1e3 * seconds(run, 1))
        pre._recorder.switch(False)
        runs = (("off", off), ("refresh", pre.refresh), ("apply", lambda: pre.apply(gradients)))
        for name, run in runs:
            times.setdefault(name, []).append(1e3 * seconds(run, 1))
    ms = {name: statistics.median(values) for name, values in times.items()}
    ms["statistics"] = statistics.median(
        a - b for a, b in zip(times["recorded"], times["off"], strict=True)
    )
    ratio = statistics.median(a / b for a, b in zip(times["off"], times["plain"], strict=True))
    parts = ("plain", "statistics", "refresh", "apply")
    return ", ".join(f"{name} {ms[name]:.1f}" for name in parts) + f"; off / plain {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="both networks, not the programs")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = "compiled" if options.compile else "eager"
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {kind}")
    for name in options.workloads:
        workload = Workload(name, options.compile)
        print(f"{name}, ms: {stages(workload)}", flush=True)
        for title, (make, period) in SETTINGS.items():
            pairs = list(paired(make(workload), workload.sgd(), period, options.rounds))
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"    {title}: {ratio:.2f} of SGD's {1e3 * pairs[0][1]:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
