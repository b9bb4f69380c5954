"""Multiply-adds of the stages, counted from the dimensions of the blocks, and the machine's rate.

Products of matrices are counted, and minimally: half of a symmetric product, d^3 / 2 for the
inverse of a symmetric matrix (d^3 / 6 its Cholesky factor, the rest the inverse from that). Where a
convolution has stride 1, the patches' Gram matrix counts as the correlation of the input with
itself if that is less. Embeddings, diagonals and what is elementwise count nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import sample
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workloads import Workload

import kfac_fx
from kfac_fx.ir.curvature_graph import CurvatureBlock

GEMM = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices whose product gives the machine's rate."""


def gemm_rate(device: str = "cpu", repeats: int = 9) -> float:
    """Multiply-adds in a second of float32 products: of processor time, or of a GPU's time."""
    d = GEMM[device]
    a, b, out = torch.randn(3, d, d, device=device).unbind()
    sample(lambda: torch.mm(a, b, out=out), 3)
    times = [sample(lambda: torch.mm(a, b, out=out)) for _ in range(repeats)]
    return d**3 / statistics.median(t.cpu if device == "cpu" else t.wall for t in times)


class Positions(NamedTuple):
    """Where a layer's weight is used: outputs, and entries of the input, over the whole batch."""

    outputs: int
    inputs: int


class Counts(NamedTuple):
    """Multiply-adds of one step's stages, over the whole batch."""

    forward: float
    training: float
    sampling: float
    covariances: float
    refresh: float
    apply: float

    def statistics(self, fisher: str, part: float = 1.0) -> float:
        """Of the ``fisher``, of a part of the batch.

        The empirical one has the training's backward, the sampled one a backward of its own
        without weight gradients; a part of the batch a forward of its own besides.
        """
        passes = self.sampling if fisher == "sampled" else 0.0
        return part * (passes + self.covariances) + (part < 1) * part * self.forward


def positions(model: nn.Module, x: Tensor) -> dict[str, Positions]:
    """Of every linear and convolution layer, by the name of the weight."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Positions] = {}

    def see(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs = output.numel() // layer.weight.shape[0]
        found[names[id(layer.weight)]] = Positions(outputs, inputs[0].numel())

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(see) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def counted(call: Callable[[], object]) -> float:
    """Multiply-adds of the products in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def matrices(block: CurvatureBlock) -> list[tuple[int, ...]]:
    """Shapes of the factors that are matrices, or stacks of them."""
    return [shape for shape in block.dimensions if len(shape) > 1]


def squares(block: CurvatureBlock, power: int) -> float:
    """The sum of the sides of the block's matrices, to a power."""
    return float(sum(math.prod(s[:-2]) * s[-1] ** power for s in matrices(block)))


def patches(layer: nn.Module, where: Positions) -> float:
    """Half of the Gram matrix of a layer's inputs, the cheaper of two ways."""
    weight = getattr(layer, "weight", torch.empty(0, 0))
    side = weight[0].numel() + (getattr(layer, "bias", None) is not None)
    direct = where.outputs * side**2 / 2
    if not isinstance(layer, nn.Conv2d) or set(layer.stride) != {1}:
        return direct
    lags = math.prod(2 * k - 1 for k in layer.kernel_size)
    return min(direct, where.inputs * layer.in_channels * lags / 2)


def covariance(
    block: CurvatureBlock, model: nn.Module, where: dict[str, Positions], n: int
) -> float:
    """Multiply-adds of a block's statistics."""
    name = block.parameters[0]
    if name not in where:
        return n * squares(block, 2) / 2
    layer = model.get_submodule(name.rpartition(".")[0])
    outputs = sum(
        where[name].outputs * s[-1] ** 2 / 2
        for use in block.uses
        for f in use.factors
        if f.role == "gradient" and len(s := f.shape) > 1
    )
    dense = any(f.role == "input" and len(f.shape) > 1 for u in block.uses for f in u.factors)
    return outputs + (patches(layer, where[name]) if dense else 0.0)


def product(block: CurvatureBlock) -> float:
    """Multiply-adds of a block's inverse and its gradient."""
    if not block.approximation.startswith("kronecker"):
        return squares(block, 2)
    entries, forms = block.parameter_count, 2 if block.approximation == "kronecker_sum" else 1
    return entries * sum(s[-1] for s in matrices(block)[: 2 // forms])


def count(work: Workload) -> Counts:
    """Counts the stages of a workload, block-diagonal."""
    x, y = work.batches[0]
    net = kfac_fx.transform(work.model, (x,), structure="block_diagonal", check=False)
    where, blocks = positions(work.model, x), list(net.curvature.blocks.values())
    forward = counted(lambda: work.model(x))
    training = counted(lambda: work.loss(work.model(x), y).backward())
    work.model.zero_grad()
    layers = {n: p for n, p in work.model.named_parameters() if n in where}
    weights = sum(where[name].outputs * p.numel() for name, p in layers.items())
    return Counts(
        forward,
        training,
        training - forward - weights,
        sum(covariance(block, work.model, where, work.cases) for block in blocks),
        sum(squares(block, 3) / 2 for block in blocks),
        sum(product(block) for block in blocks),
    )
