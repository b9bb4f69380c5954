"""Peak memory beyond SGD's: the formula's and the measured one, of both precisions of averages.

    python tests/benchmarks/memory.py [--workloads ae cnn lm] [--storages none bfloat16 host]

Every number is a process of its own, which trains for two refreshes. On the CPU its peak is
``ru_maxrss`` (SGD's process makes a preconditioner too and drops it, and both first train small
networks, so that code and libraries count in neither); on CUDA ``torch.cuda.max_memory_allocated``.

    averages + inverses + max(statistics + taps, inverses + workspace)

is the formula. It is about a bound: what SGD's own peak has of activations is free again while
inverses are computed. ``taps`` is fitted: nine times the largest input of a convolution.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from methods import sgd
from torch import nn
from workloads import SMALL, WORKLOADS, Workload, images, make

import kfac_fx

STEPS, REFRESH_EVERY = 7, 3
MIB = 2**20


def small() -> Workload:
    """Loads what training takes of libraries."""
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(144, 16),
        nn.LayerNorm(16),
    )
    return Workload("small", nn.Sequential(*layers), "categorical", images(2, 8, 8, 16), 1e-3)


def preconditioned(work: Workload, storage: str | None) -> kfac_fx.Preconditioner:
    net = kfac_fx.transform(work.model)
    options = {"damping": 1e-2, "refresh_every": REFRESH_EVERY, "factor_storage": storage}
    return kfac_fx.Preconditioner(net, work.likelihood, **options)


def train(work: Workload, preconditioner: kfac_fx.Preconditioner | None, steps: int) -> None:
    """Steps of SGD with momentum; with ``observe`` and ``step`` if there is a preconditioner."""
    optimizer = sgd(work.model.parameters(), work.lr)
    net = work.model if preconditioner is None else preconditioner.recorder.net
    for _ in range(steps):
        x, y = (part.to(next(work.model.parameters()).device) for part in work.next())
        optimizer.zero_grad()
        outputs = net(x)
        if preconditioner is not None:
            preconditioner.observe(outputs)
        loss = work.loss(outputs, y)
        del outputs
        loss.backward()
        del loss
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()


def largest_input(work: Workload) -> int:
    """Bytes of the largest input of a convolution that is no 1x1."""
    found = [0]

    def seen(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(layer, nn.Conv2d) and prod(layer.kernel_size) > 1:
            found.append(4 * inputs[0].numel())

    handles = [layer.register_forward_pre_hook(seen) for layer in work.model.modules()]
    with torch.no_grad():
        work.model(work.batches[0][0])
    for handle in handles:
        handle.remove()
    return max(found)


def predicted(
    preconditioner: kfac_fx.Preconditioner, storage: str | None, convolved: int
) -> dict[str, int]:
    """The parts of the formula, in bytes; those on the host do not count on a GPU."""
    curvature, program = preconditioner.curvature, preconditioner.program
    on_host = storage == "host" and torch.cuda.is_available()
    stored = 0 if on_host else 2 if storage == "bfloat16" else 4
    shapes = program.inverse_shapes().values()
    sides = [f.shape for b in curvature.blocks.values() for f in b.factors]
    averages = stored * curvature.factor_elements
    statistics, inverses = 4 * curvature.factor_elements, 4 * sum(prod(s) for s in shapes)
    workspace = 3 * 4 * max(prod(side) for side in sides)
    taps = 9 * convolved  # fitted to the peak of cnn
    return {
        "averages": averages,
        "inverses": inverses,
        "statistics": statistics,
        "workspace": workspace,
        "taps": taps,
        "peak": averages + inverses + max(statistics + taps, inverses + workspace),
    }


def one(name: str, method: str) -> dict[str, int]:
    """In a process of its own: peak bytes, and the formula where there is a preconditioner."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    storage = None if method in ("sgd", "none") else method
    work = small()
    work.model.to(device)
    train(work, preconditioned(work, storage), STEPS)
    largest = largest_input(make(name))
    work = make(name)
    work.model.to(device)
    preconditioner: kfac_fx.Preconditioner | None = preconditioned(work, storage)
    found = predicted(preconditioner, storage, largest)
    if method == "sgd":
        preconditioner = None
        work.model = make(name).model.to(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train(work, preconditioner, STEPS)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"measured": torch.cuda.max_memory_allocated() if device == "cuda" else peak}


def measured(name: str, method: str) -> dict[str, int]:
    """``one`` in a fresh process, which gives freed memory back at once."""
    here = str(Path(__file__).resolve())
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, here, "--one", name, method],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(workloads: Sequence[str], storages: Sequence[str]) -> None:
    """A line for each workload and storage, in MiB."""
    columns = ("averages", "inverses", "statistics", "workspace", "taps", "peak", "measured")
    print("MiB       storage  ", *(f"{'predicted' if c == 'peak' else c:>11}" for c in columns))
    for name in workloads:
        base = measured(name, "sgd")["measured"]
        for storage in storages:
            found = measured(name, storage)
            found["measured"] -= base
            print(
                f"{name:9} {storage:9}", *(f"{found[c] / MIB:11.2f}" for c in columns), flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(SMALL), choices=list(WORKLOADS))
    kinds = ("none", "bfloat16", "host")
    parser.add_argument("--storages", nargs="+", default=list(kinds[:2]), choices=kinds)
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
    else:
        table(arguments.workloads, arguments.storages)


if __name__ == "__main__":
    main()
