"""What a step of training costs with K-FAC, relative to SGD's.

    python tests/benchmarks/steps.py [--threads 1] [--compile] [--workloads ae cnn lm] [--only a b]
    python tests/benchmarks/steps.py --device cuda --compile --workloads resnet50 gpt2

Every setting trains a network of its own, block-diagonal, for a whole refresh period at a time; SGD
with momentum does the same in turn. Printed is the median of the paired ratios of processor time,
its interval of 95 %, and the ratio that is asked for. SGD and the settings run in one process with
the threads stated.

With --compile, SGD's forward and loss are one graph (on a GPU, a CUDA graph); ours are two, as
``observe`` wants the outputs in between, and the programs are compiled too. In a ``TrainingStep``,
forward, loss, gradients and statistics are one.

``off / plain`` is forward and backward of the transformed network with nothing to record, over
those of the model.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from methods import own
from timing import Call, Interleaved
from torch import Tensor, nn
from workloads import SMALL, WORKLOADS, Workload, make, of_device

import kfac_fx

OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"fisher": "sampled", "refresh_every": 20},
    "b": {"fisher": "empirical", "refresh_every": 10},
    "c": {"fisher": "sampled", "statistics_every": 10, "refresh_every": 100},
}
TITLES = {
    "a": "sampled on 1/8 every step, refresh every 20",
    "b": "empirical every step, refresh every 10",
    "c": "sampled every 10, refresh every 100",
}
LIMITS = {
    "a": {"ae": 1.9, "cnn": 1.3, "lm": 1.4},
    "b": {"ae": 2.4, "cnn": 2.0, "lm": 1.85},
    "c": {"cnn": 1.10, "lm": 1.25},
}
OFF_LIMIT = 1.02


class Trained(NamedTuple):
    """SGD with momentum, and how the network and its loss are called."""

    forward: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer


def whole(work: Workload, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled; on a GPU, into CUDA graphs, as our passes are."""
    on_gpu = work.batches[0][0].is_cuda
    return torch.compile(function, mode="reduce-overhead" if on_gpu else "default")


def trained(work: Workload, net: nn.Module, compiled: bool) -> Trained:
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr, momentum=0.9)
    if compiled:
        return Trained(whole(work, net), whole(work, work.loss), optimizer)
    return Trained(net, work.loss, optimizer)


def sgd(work: Workload, compiled: bool = False) -> Call:
    """The plain step; compiled, its forward and its loss are one graph."""
    work = own(work)
    optimizer = torch.optim.SGD(work.model.parameters(), lr=work.lr, momentum=0.9)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return work.loss(work.model(x), y)

    run = whole(work, forward) if compiled else forward

    def step() -> None:
        optimizer.zero_grad()
        run(*work.next()).backward()
        optimizer.step()

    return step


def transformed(work: Workload) -> Any:
    return kfac_fx.transform(work.model, (work.batches[0][0],), structure="block_diagonal")


def preconditioned(
    work: Workload, setting: str, compiled: bool = False, eighth: bool = False
) -> Call:
    """``Preconditioner`` in front of SGD; statistics of 1/8 of the batch in a pass of their own."""
    work, options = own(work), OPTIONS[setting]
    net = transformed(work)
    pre = kfac_fx.Preconditioner(net, work.likelihood, damping=1e-1, compile=compiled, **options)
    forward, loss, optimizer = trained(work, net, compiled)
    part = max(1, work.cases // 8) if eighth else work.cases
    by_inputs = eighth or (compiled and options["fisher"] == "sampled")

    def step() -> None:
        x, y = work.next()
        optimizer.zero_grad()
        if by_inputs:
            pre.observe(inputs=x[:part], targets=y[:part])
        outputs = forward(x)
        if not by_inputs:
            pre.observe(outputs, y)
        loss(outputs, y).backward()
        pre.step()
        optimizer.step()

    return step


def fused(work: Workload, setting: str, compiled: bool = True) -> Call:
    """``Preconditioner`` with a ``TrainingStep`` in front of SGD."""
    work = own(work)
    net, options = transformed(work), OPTIONS[setting]
    pre = kfac_fx.Preconditioner(net, work.likelihood, damping=1e-1, compile=compiled, **options)
    run = kfac_fx.TrainingStep(pre, work.loss)
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        run(*work.next())
        pre.step()
        optimizer.step()

    return step


def kfac(work: Workload, setting: str, compiled: bool = False) -> Call:
    """``KFAC`` with a learning rate."""
    work = own(work)
    options = kfac_fx.optim.KFACOptions(statistics_fraction=1 / 8 if setting == "a" else 1.0)
    net = transformed(work)
    optimizer = kfac_fx.KFAC(
        net,
        work.likelihood,
        lr=work.lr,
        damping=1e-1,
        compile=compiled,
        options=options,
        **OPTIONS[setting],
    )
    return lambda: optimizer.step(*work.next())


def ways(setting: str, compiled: bool) -> Iterator[tuple[str, Callable[..., Call]]]:
    """How a setting can be had."""
    on_eighth = functools.partial(preconditioned, eighth=True)
    if setting == "a":
        yield "Preconditioner", on_eighth
        yield "KFAC", kfac
        return
    yield "Preconditioner", preconditioned
    if setting == "c":
        yield "Preconditioner on 1/8", on_eighth
    if compiled:
        yield "TrainingStep", fused


def record_once(work: Workload, net: Any) -> None:
    """Leave a network that has nothing to record."""
    pre = kfac_fx.Preconditioner(net, work.likelihood, statistics_every=10**9)
    x, y = work.next()
    outputs = net(x)
    pre.observe(outputs)
    work.loss(outputs, y).backward()
    pre.step()


def backward(work: Workload, net: nn.Module, compiled: bool) -> Call:
    """Forward and backward alone."""
    forward, loss, optimizer = trained(work, net, compiled)

    def call() -> None:
        x, y = work.next()
        optimizer.zero_grad()
        loss(forward(x), y).backward()

    return call


def off_over_plain(work: Workload, compiled: bool, precision: float) -> str:
    """Forward and backward of the transformed network and of the model."""
    plain, other = own(work), own(work)
    net = transformed(other)
    record_once(other, net)
    calls = {
        "plain": backward(plain, plain.model, compiled),
        "off": backward(other, net, compiled),
    }
    found = Interleaved(calls, warmup=3)
    ratio = found.until("off", "plain", precision, 120)
    if work.batches[0][0].is_cuda:
        ratio = found.ratio("off", "plain", "wall")
    rounds = len(found.samples["off"])
    return (
        f"off / plain {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], limit {OFF_LIMIT}, "
        f"{rounds} rounds; plain {1e3 * found.seconds('plain'):.1f} ms"
    )


def measured(
    work: Workload, setting: str, way: Callable[..., Call], compiled: bool, rounds: int
) -> str:
    """The ratio of a setting, and the limit if there is one."""
    period = OPTIONS[setting]["refresh_every"]
    calls = {"ours": way(work, setting, compiled), "sgd": sgd(work, compiled)}
    found = Interleaved(calls, warmup=12, counts=dict.fromkeys(calls, period))
    found.run(rounds)
    on_gpu = work.batches[0][0].is_cuda  # where processor time says nothing
    clock = "wall" if on_gpu else "cpu"
    ratio, limit = found.ratio("ours", "sgd", clock), LIMITS[setting].get(work.name)
    verdict = "" if limit is None else f", limit {limit}" + (" MISSED" * (ratio.value > limit))
    wall = ""
    if torch.get_num_threads() > 1:
        wall = f", by wall time {found.ratio('ours', 'sgd', 'wall').value:.2f}"
    return (
        f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{wall}{verdict}; "
        f"SGD {1e3 * found.seconds('sgd', clock):.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", type=float, default=0.01, help="of off / plain; 0 to skip")
    parser.add_argument("--compile", action="store_true", help="SGD's network and all of ours")
    parser.add_argument("--device", default="cpu", help="cuda: by wall time")
    parser.add_argument("--workloads", nargs="+", default=list(SMALL), choices=list(WORKLOADS))
    parser.add_argument("--only", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = "compiled" if options.compile else "eager"
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {kind}")
    for name in options.workloads:
        work = make(name, options.device)
        print(f"{name}: {of_device(options.device)[name].__doc__}", flush=True)
        if options.precision:
            print("   ", off_over_plain(work, options.compile, options.precision), flush=True)
        for setting in options.only:
            for way, build in ways(setting, options.compile):
                found = measured(work, setting, build, options.compile, options.rounds)
                print(f"    ({setting}) {TITLES[setting]}, {way}: {found}", flush=True)
                torch.compiler.reset()
                gc.collect()


if __name__ == "__main__":
    main()
