"""What each stage of a step costs, ours and rivals', relative to a step of SGD with momentum.

    python tests/benchmarks/stages.py [--threads 1] [--workloads ae cnn lm resnet50 gpt2]
                                      [--rivals singd curvlinops ...] [--out build/stages]
    python tests/benchmarks/stages.py --device cuda --workloads resnet50 gpt2

The calls of a method take turns with SGD's step, in one process with the threads stated. A stage is
the median, over the rounds, of its processor time (or of the difference between a step that has it
and one that lacks it) over that of SGD's step; on a GPU, of wall time. Printed are tables;
PREFIX.json gets the raw times, PREFIX.png the picture. --redraw PREFIX.json makes tables and
picture of earlier numbers.

A rival that is not installed, or cannot run a workload, is named with the reason. README.md here
says how to make the environment.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from counts import count, gemm_rate
from methods import Method, cosine, ours, own, sgd, training
from report import picture, tables
from rivals import RIVALS, rivals
from timing import Interleaved
from workloads import SMALL, WORKLOADS, Workload, make, of_device

Numbers = dict[str, Any]


def methods(work: Workload, names: Sequence[str]) -> Iterator[Method | str]:
    """Ours, then the rivals', each made when the one before is done with."""
    large = work.name not in SMALL
    yield ours(work, "empirical")
    if large:
        return
    yield ours(work, "sampled")
    yield ours(work, "sampled", part=1 / 8)
    if work.name != "ae":  # where nothing is shared, there is nothing to reduce
        yield ours(work, "empirical", sharing="reduce")
        yield ours(work, "sampled", sharing="reduce")
    yield from rivals(work, names)


def timed(work: Workload, method: Method, rounds: int, seconds: float) -> Numbers:
    """Raw times and stages of a method; plain values."""
    base = own(work)
    step = training(base, base.model, sgd(base.model.parameters(), base.lr))
    warmup = 2 if work.name in SMALL else 1
    calls = {"sgd": method.base or step, **method.calls}
    found = Interleaved(calls, warmup=warmup).run(rounds, seconds)
    clocks = {}
    for clock in ("cpu", "wall"):
        clocks[clock] = {
            stage: found.ratio(call, "sgd", clock).value
            if less is None
            else found.difference(call, less, "sgd", clock)
            for stage, (call, less) in method.stages.items()
        }
        if method.whole:
            clocks[clock]["whole"] = found.ratio(method.whole, "sgd", clock).value
    return {
        "name": method.name,
        "kind": method.kind,
        "part": method.part,
        "note": method.note,
        "ours": method.name.startswith("kfac_fx"),
        "cosine": cosine(method),
        "sgd": {clock: found.seconds("sgd", clock) for clock in clocks},
        "stages": clocks,
        "samples": {name: [list(s) for s in samples] for name, samples in found.samples.items()},
    }


def measured(work: Workload, names: Sequence[str], rounds: int, seconds: float) -> Numbers:
    """All methods on a workload."""
    device = work.batches[0][0].device.type
    gemm, rows, absent = [gemm_rate(device)], [], []
    for method in methods(work, names):
        if isinstance(method, str):
            absent.append(method)
            continue
        try:
            rows.append(timed(work, method, rounds, seconds))
        except RuntimeError as error:
            absent.append(f"{method.name}: {error}")
        del method
        gc.collect()
    return {
        "title": str(of_device(device)[work.name].__doc__).rstrip("."),
        "gemm": max(*gemm, gemm_rate(device)),
        "counts": counted(work),
        "methods": rows,
        "absent": absent,
    }


def counted(work: Workload) -> dict[str, dict[str, float]]:
    """Multiply-adds of the stages of each of our methods."""
    found = count(work)
    shared = {"refresh": found.refresh, "apply": found.apply, "training": found.training}
    return {
        "empirical": {**shared, "statistics": found.statistics("empirical")},
        "sampled": {**shared, "statistics": found.statistics("sampled")},
        "sampled of 1/8": {**shared, "statistics": found.statistics("sampled", 1 / 8)},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: wall time")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=60, help="most of them for a method")
    parser.add_argument("--workloads", nargs="+", default=list(SMALL), choices=list(WORKLOADS))
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--out", type=Path, default=Path("build/stages"), metavar="PREFIX")
    parser.add_argument("--redraw", type=Path, metavar="PREFIX.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    out = options.redraw.with_suffix("") if options.redraw else options.out
    if options.redraw:
        numbers = json.loads(options.redraw.read_text())
        print(tables(numbers))
        picture(numbers, out.with_suffix(".png"))
        return
    torch.set_num_threads(options.threads)
    numbers = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "workloads": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.workloads:
        work = make(name, options.device)
        one = measured(work, options.rivals, options.rounds, options.seconds)
        numbers["workloads"][name] = one
        print(tables({**numbers, "workloads": {name: one}}), flush=True)
        out.with_suffix(".json").write_text(json.dumps(numbers))
        del work
        gc.collect()
    picture(numbers, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
