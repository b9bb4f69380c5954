"""The symmetric products of statistics, apart from all around them, beside the GEMM rate.

    python tests/benchmarks/kernels.py [--threads 1] [--workloads ae lm]

Every linear layer of a workload: A with its homogeneous coordinate and G, from rows in the layer's
shapes. The share is minimal multiply-adds, half of a symmetric product, over the time that the
machine's GEMM rate, measured in turns with it, allows them.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from counts import gemm_rate, positions
from timing import sample
from torch import nn
from workloads import make

from kfac_fx.ops.gram import gram, homogeneous_gram

Sizes = tuple[int, int, int]


def layers(name: str) -> dict[Sizes, int]:
    """(rows, inputs, outputs) of the linear layers -> how many there are of the kind."""
    work = make(name)
    found: dict[Sizes, int] = {}
    where = positions(work.model, work.batches[0][0])
    for path, layer in work.model.named_modules():
        if isinstance(layer, nn.Linear):
            sizes = (where[f"{path}.weight"].outputs, layer.in_features, layer.out_features)
            found[sizes] = found.get(sizes, 0) + 1
    return found


def measure(sizes: Sizes, rounds: int) -> tuple[float, float]:
    """Seconds of both products, and their minimal multiply-adds."""
    rows, inputs, outputs = sizes
    x, g = torch.randn(rows, inputs), torch.randn(rows, outputs)

    def products() -> None:
        homogeneous_gram(x, 1 / rows)
        gram(g)

    calls = max(1, 2 * 10**9 // (rows * (inputs**2 + outputs**2)))
    sample(products, calls)
    times = [sample(products, calls).cpu for _ in range(rounds)]
    minimal = rows * ((inputs + 1) * (inputs + 2) + outputs * (outputs + 1)) / 2
    return statistics.median(times), minimal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workloads", nargs="+", default=["ae", "lm"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads")
    for name in options.workloads:
        seconds = needed = 0.0
        for sizes, count in layers(name).items():
            rate = gemm_rate()
            spent, minimal = measure(sizes, options.rounds)
            share = minimal / rate / spent
            print(f"    {count} x rows {sizes[0]}, {sizes[1]} to {sizes[2]}: {share:.0%}")
            seconds += count * spent
            needed += count * minimal / rate
        print(
            f"{name}: {1e3 * seconds:.1f} ms, {needed / seconds:.0%} of the GEMM rate", flush=True
        )


if __name__ == "__main__":
    main()
