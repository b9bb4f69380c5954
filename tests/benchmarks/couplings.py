"""What the couplings cost: python tests/benchmarks/couplings.py [--threads 1] [--workloads ae].

Refresh, apply and one recorded forward and backward, block-tridiagonal over block-diagonal, in the
same process; CPU time, the best of several repeats.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch import Tensor, nn
from workloads import SMALL, WORKLOADS, make

import kfac_fx


def best(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of CPU time."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def stages(model: nn.Module, x: Tensor, likelihood: str, structure: str) -> list[float]:
    """Refresh, apply, and a recorded pass."""
    net = kfac_fx.transform(model, (x,), structure=structure)
    pre = kfac_fx.Preconditioner(net, likelihood, damping=1e-2)
    gradients = {
        n: torch.randn_like(p) for n, p in model.named_parameters() if n in net.curvature.covered
    }

    def record() -> None:
        pre.observe(outputs := net(x))
        outputs.float().square().mean().backward()

    record()
    pre.step()
    pre.statistics_every = 1
    return [
        best(pre.refresh, 7),
        best(lambda: pre.apply(gradients), 20),
        best(lambda: (record(), pre.recorder.switch(True)), 3),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", default=list(SMALL), choices=list(WORKLOADS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; ms, and the ratio")
    for name in options.workloads:
        work = make(name)
        alone, coupled = (
            stages(copy.deepcopy(work.model), work.batches[0][0], work.likelihood, structure)
            for structure in ("block_diagonal", "block_tridiagonal")
        )
        cells = [
            f"{stage} {a:.1f} -> {b:.1f} ({b / a:.2f})"
            for stage, a, b in zip(
                ("refresh", "apply", "recorded pass"), alone, coupled, strict=True
            )
        ]
        print(f"{name:12} " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
