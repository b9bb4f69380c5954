"""The simulator against measurement, at 1, 2 and 4 gloo processes.

    python tests/benchmarks/distributed.py [ROUNDS] [--cpu]

Every round runs one step of each kind, those that the simulator's parts are taken from and those
that it predicts, one after the other in the same processes: neither knows how much of the machine
others have, but both have the same. Parts are differences of whole steps (repeated by themselves
they would find the caches warm) of all processes at the same time, each alone, so that their share
of the cores is in the numbers; what the simulator predicts is how the parts add up, who waits for
whom, and what is sent. A time is that of the slowest process; medians are taken over the rounds.
With --cpu times are those of the processes on a core, in which other users of the machine show
little, and waiting not at all.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kfac_fx
from kfac_fx.distributed import Compute, DataParallel, Network, Plan, measured_costs, simulate
from kfac_fx.distributed.buckets import TensorForm, cut
from kfac_fx.linalg.packing import packed_size

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.processes import run_in_world

WIDTH, LAYERS, CASES = 256, 8, 64
EVERY = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def slowest(seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


CLOCK = time.perf_counter


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, of the slowest process."""
    dist.barrier()
    start = CLOCK()
    call()
    return slowest(CLOCK() - start)


class Training:
    """SGD after a Preconditioner."""

    def __init__(self, net: Any, **options: Any) -> None:
        self.net = net
        self.preconditioner = kfac_fx.Preconditioner(net, **options)
        self.sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(CASES, WIDTH), torch.randint(10, (CASES,))

    def plain(self) -> None:
        self.sgd.zero_grad()
        F.cross_entropy(self.net(self.x), self.y).backward()
        self.sgd.step()

    def apply(self) -> None:
        """A step in which nothing but the apply is due."""
        self.sgd.zero_grad()
        F.cross_entropy(self.net(self.x), self.y).backward()
        self.preconditioner.step()
        self.sgd.step()

    def step(self) -> None:
        self.sgd.zero_grad()
        outputs = self.net(self.x)
        loss = F.cross_entropy(outputs, self.y)
        self.preconditioner.observe(outputs)
        loss.backward()
        self.preconditioner.step()
        self.sgd.step()


class Rounds:
    """One number of processes, one form of division."""

    def __init__(self, structure: str, fraction: float) -> None:
        net = kfac_fx.transform(network(), structure=structure)
        rare = {"statistics_every": 10**9, "refresh_every": 10**9}
        self.alone = Training(copy.deepcopy(net), **rare)
        self.alone.step()
        self.workers = DataParallel(memory_fraction=fraction)
        wrapped = DistributedDataParallel(net) if self.workers.size > 1 else net
        self.together = Training(wrapped, workers=self.workers, refresh_every=EVERY)
        for _ in range(EVERY):
            self.together.step()
        self.plan = Plan(self.workers.size, refresh_every=EVERY, memory_fraction=fraction)
        self.square = torch.eye(WIDTH + 1)
        self.small, self.large = torch.zeros(1), torch.zeros(2**20)
        self.times: dict[str, list[float]] = defaultdict(list)

    def recorded(self) -> None:
        preconditioner = self.alone.preconditioner
        preconditioner.recorder.switch(True)  # as step() does before such a step
        preconditioner.statistics_every, rarely = 1, preconditioner.statistics_every
        self.alone.step()
        preconditioner.statistics_every = rarely

    def packed(self) -> None:
        forms = [TensorForm(self.square.shape, self.square.dtype, self.square.device, True)]
        (bucket,) = cut(forms, 2**30)
        list(bucket.unpack(bucket.pack([self.square])))

    def refreshed(self) -> None:
        self.alone.preconditioner.refresh()
        self.recorded()

    def round(self) -> None:
        self.alone.preconditioner.recorder.switch(False)
        kinds: dict[str, Callable[[], Any]] = {
            "plain": self.alone.plain,
            "due": self.together.step,
            "applied": self.alone.apply,
            "other": self.together.step,
            "recorded": self.recorded,
            "other again": self.together.step,
            "refreshed": self.refreshed,
            "packed": self.packed,
            "handshake": lambda: self.workers.agree("timing"),
            "small": lambda: dist.all_reduce(self.small),
            "large": lambda: dist.all_reduce(self.large),
        }
        for kind, call in kinds.items():
            self.times[kind].append(timed(call))
        for _ in range(EVERY - 3):
            self.together.step()

    def result(self) -> tuple[float, float]:
        """Predicted and measured seconds of a step."""
        of = {kind: statistics.median(values) for kind, values in self.times.items()}
        costs = measured_costs(self.alone.preconditioner)
        refresh = (of["refreshed"] - of["recorded"]) / sum(costs.values())
        compute = Compute(
            of["plain"],
            of["recorded"] - of["applied"],
            of["applied"] - of["plain"],
            {name: refresh * cost for name, cost in costs.items()},
        )
        size, large = self.workers.size, self.large.numel() * 4
        links = Network(0.0, 1.0)
        if size > 1:
            moved = 2 * (size - 1) / size * large
            bandwidth = moved / max(of["large"] - of["small"], 1e-9)
            packing = of["packed"] / (4 * packed_size(self.square.shape))
            links = Network(of["small"] / 2 / (size // 2), bandwidth, of["handshake"], packing)
        program = self.together.preconditioner.program
        predicted = simulate(program, compute, links, self.plan).step
        other = (of["other"] + of["other again"]) / 2
        return predicted, (of["due"] + (EVERY - 1) * other) / EVERY


def rounds(cpu: bool, count: int, structure: str, fraction: float) -> tuple[float, float]:
    global CLOCK
    CLOCK = time.process_time if cpu else time.perf_counter
    made = Rounds(structure, fraction)
    for _ in range(count):
        made.round()
    return made.result()


def main() -> None:
    count = int(next((a for a in sys.argv[1:] if a.isdigit()), 25))
    print("structure          fraction  processes  predicted ms  measured ms  ratio")
    for structure, fraction in (
        ("block_diagonal", 1.0),
        ("block_diagonal", 0.0),
        ("block_tridiagonal", 1.0),
    ):
        for size in (1, 2, 4):
            found = run_in_world(
                size, rounds, "--cpu" in sys.argv, count, structure, fraction, wait=600
            )[0]
            assert isinstance(found, tuple), found
            predicted, measured = found
            print(
                f"{structure:18} {fraction:8}  {size:9}  {1e3 * predicted:12.1f}  "
                f"{1e3 * measured:11.1f}  {predicted / measured:5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
