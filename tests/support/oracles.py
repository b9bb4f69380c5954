"""Dense references straight from the definitions: loops over cases, full Jacobians, full matrices.

Nothing here imports the library. A likelihood is described by its summed negative log-likelihood,
the Fisher of one case's outputs, and its number of terms. A layer is described by the rows that
its weight multiplies (`input_rows`) and by the place of its outputs (`output_rows`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_Conv = nn.modules.conv._ConvNd
Batch = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Measured:
    """A preconditioner after one step, and a copy of its factors."""

    preconditioner: Any
    factors: dict[str, tuple[Tensor, ...]]


Measure = Callable[..., Measured]  # the fixture `measure`


def close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Equal up to rounding, one by one."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------- likelihoods
class Likelihood:
    """A reference likelihood; `fisher` is of the flattened outputs of ONE case."""

    name: str

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def fisher(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        raise NotImplementedError

    def terms(self, outputs: Tensor, targets: Tensor | None) -> float:
        return len(outputs)

    def draw(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Class scores on axis `dim`. A term is weighted by the class of the DATA's target.

    The Fisher is that of the weighted mean loss: sum of w F over the sum of w, w given.
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    dim: int = -1
    name: str = "categorical"

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.dim, -1).flatten(0, -2)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            self._scores(outputs),
            targets.flatten(),
            self.weight,
            ignore_index=self.ignore_index,
            reduction="sum",
        )

    def fisher(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """sum over tokens and classes of w p(class) g g^T, g the gradient of -log p(class)."""
        outputs = outputs.detach().requires_grad_()
        scores = self._scores(outputs)
        total = outputs.new_zeros(outputs.numel(), outputs.numel())
        for row, weight in zip(scores, self._weights(outputs, targets), strict=True):
            for log_p in row.log_softmax(-1):
                (g,) = torch.autograd.grad(-log_p, outputs, retain_graph=True)
                p = float(log_p.detach().exp())
                total += float(weight) * p * torch.outer(g.flatten(), g.flatten())
        return total

    def _weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            return outputs.new_ones(outputs.numel() // outputs.shape[self.dim])
        counted = (targets != self.ignore_index).flatten()
        if self.weight is None:
            return counted.to(outputs)
        return self.weight[targets.flatten().where(counted, 0)] * counted

    def terms(self, outputs: Tensor, targets: Tensor | None) -> float:
        return float(self._weights(outputs, targets).sum())

    def draw(self, outputs: Tensor) -> Tensor:
        scores = outputs.movedim(self.dim, -1)
        return torch.randint(scores.shape[-1], scores.shape[:-1])


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    name: str = "bernoulli"

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")

    def fisher(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        p = outputs.detach().flatten().sigmoid()
        return torch.diag(p * (1 - p))

    def draw(self, outputs: Tensor) -> Tensor:
        return torch.randint(2, outputs.shape).to(outputs)


@dataclass(frozen=True)
class Normal(Likelihood):
    variance: float = 1.0
    name: str = "normal"

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum() / (2 * self.variance)

    def fisher(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        return torch.eye(outputs.numel(), dtype=outputs.dtype) / self.variance

    def draw(self, outputs: Tensor) -> Tensor:
        return torch.randn_like(outputs)


@dataclass(frozen=True)
class Joint(Likelihood):
    """sum_k weight_k * mean NLL of part k, of outputs [N, sum of the parts' sizes]; N terms.

    A part is (likelihood, weight, shape of one case's outputs).
    """

    parts: tuple[tuple[Likelihood, float, tuple[int, ...]], ...]
    name: str = "joint"

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        sizes = [math.prod(shape) for _, _, shape in self.parts]
        found = zip(outputs.split(sizes, 1), self.parts, strict=True)
        return tuple(piece.unflatten(1, shape) for piece, (_, _, shape) in found)

    def nll(self, outputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        total = 0.0
        for (part, weight, _), f, y in zip(self.parts, self.split(outputs), targets, strict=True):
            total = total + weight * len(f) * part.nll(f, y) / part.terms(f, y)
        return total

    def fisher(self, outputs: Tensor, targets: None) -> Tensor:
        blocks = [
            weight * part.fisher(f, None) / part.terms(f, None)
            for (part, weight, _), f in zip(self.parts, self.split(outputs), strict=True)
        ]
        return torch.block_diag(*blocks)

    def draw(self, outputs: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.parts, self.split(outputs), strict=True)
        return tuple(part.draw(f) for (part, _, _), f in pairs)


LIKELIHOODS = (Categorical(), Bernoulli(), Normal())


# ----------------------------------------------------------------------------- rows of a layer
def convolution_padding(layer: _Conv) -> list[int]:
    """Left and right padding of each axis, last axis first (the order of F.pad)."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    pads: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [layer.padding[axis]] * 2
    return pads


def patches(layer: _Conv, x: Tensor) -> Tensor:
    """Patches of one case [1, C, ...] as [positions, groups, C / groups * kernel positions]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, convolution_padding(layer), mode=mode)[0]
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    starts = [
        range(0, size - far, step)
        for size, far, step in zip(x.shape[1:], reach, layer.stride, strict=True)
    ]
    found = []
    for corner in itertools.product(*starts):
        window = tuple(
            slice(start, start + far + 1, d)
            for start, far, d in zip(corner, reach, layer.dilation, strict=True)
        )
        found.append(x[(slice(None), *window)].reshape(layer.groups, -1))
    return torch.stack(found)


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What the weight multiplies in one case, as [positions, groups, inputs (+ 1)]."""
    x = x.detach()
    if isinstance(layer, _Conv):
        rows = patches(layer, x)
    else:
        rows = x.reshape(-1, 1, x.shape[-1])
    if layer.bias is None:
        return rows
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def output_rows(layer: nn.Module, index: Tensor) -> Tensor:
    """The outputs (here: their flat indices) of one case, as [positions, groups, outputs]."""
    if isinstance(layer, _Conv):
        return index[0].flatten(1).T.unflatten(1, (layer.groups, -1))
    return index.reshape(-1, 1, index.shape[-1])


# ------------------------------------------------------------------------------------- one case
@dataclass(frozen=True)
class Use:
    """One call of a layer."""

    layer: nn.Module
    x: Tensor
    s: Tensor


def run(model: nn.Module, names: Sequence[str], batch: Batch) -> tuple[Tensor, list[Use]]:
    """Outputs of the model and every call of the named modules, in order."""
    uses: list[Use] = []

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        uses.append(Use(layer, inputs[0], output))

    hooks = [model.get_submodule(name).register_forward_hook(remember) for name in names]
    outputs = model(*batch) if isinstance(batch, tuple) else model(batch)
    for hook in hooks:
        hook.remove()
    return outputs, uses


def cases(batch: Batch) -> list[Batch]:
    """The batch as batches of one."""
    if isinstance(batch, tuple):
        return list(zip(*(part.split(1) for part in batch), strict=True))
    return list(batch.split(1))


def flat_gradient(value: Tensor, wrt: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(value, wrt, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def jacobian(outputs: Tensor, wrt: Sequence[Tensor]) -> Tensor:
    return torch.stack([flat_gradient(value, wrt) for value in outputs.flatten()])


def case_moment(
    likelihood: Likelihood,
    fisher: str,
    outputs: Tensor,
    target: Tensor | None,
    wrt: Sequence[Tensor],
) -> Tensor:
    """E[g g^T] of one case; g is the flattened gradient of the case's summed NLL."""
    if fisher == "empirical":
        g = flat_gradient(likelihood.nll(outputs, target), wrt)
        return torch.outer(g, g)
    jac = jacobian(outputs, wrt)
    return jac.T @ likelihood.fisher(outputs, target) @ jac


# ------------------------------------------------------------------------------------- factors
def kronecker(
    model: nn.Module,
    names: Sequence[str],
    x: Batch,
    y: Tensor | None,
    likelihood: Likelihood,
    fisher: str = "exact",
    sharing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """(A, G) of one weight whose uses are the calls of the modules `names`."""
    A, G = 0.0, 0.0
    terms, positions, count = 0.0, 0, 0
    for n, case in enumerate(cases(x)):
        target = None if y is None else y[n : n + 1]
        outputs, uses = run(model, names, case)
        moment = case_moment(likelihood, fisher, outputs, target, [use.s for use in uses])
        offset, positions, count = 0, 0, count + 1
        for use in uses:
            a = input_rows(use.layer, use.x)
            index = torch.arange(use.s.numel()).reshape(use.s.shape) + offset
            rows = output_rows(use.layer, index)
            offset, positions = offset + use.s.numel(), positions + len(rows)
            A = A + _input_moment(a, sharing)
            G = G + _output_moment(moment, rows, sharing)
        terms += likelihood.terms(outputs, target)
    G = G / (terms * (positions if sharing == "expand" else 1))
    return _squeeze(A / count), _squeeze(G)


def _input_moment(a: Tensor, sharing: str) -> Tensor:
    if sharing == "reduce":
        a = a.mean(0, keepdim=True)
    return torch.einsum("sgi,sgj->gij", a, a)


def _output_moment(moment: Tensor, rows: Tensor, sharing: str) -> Tensor:
    """sum over positions s (and s' when reduced) of the blocks [rows of s, rows of s']."""
    if sharing == "expand":
        return moment[rows[..., :, None], rows[..., None, :]].sum(0)
    return moment[rows[:, None, :, :, None], rows[None, :, :, None, :]].sum((0, 1))


def _squeeze(factor: Tensor) -> Tensor:
    return factor.squeeze(0) if len(factor) == 1 else factor


def covariance(
    model: nn.Module,
    parameters: Sequence[str],
    x: Batch,
    y: Tensor | None,
    likelihood: Likelihood,
    fisher: str = "exact",
) -> Tensor:
    """Second moment of the per-case gradient of the concatenated parameters."""
    wrt = [model.get_parameter(name) for name in parameters]
    total, terms = 0.0, 0.0
    for n, case in enumerate(cases(x)):
        target = None if y is None else y[n : n + 1]
        outputs, _ = run(model, [], case)
        total = total + case_moment(likelihood, fisher, outputs, target, wrt)
        terms += likelihood.terms(outputs, target)
    return total / terms


# ----------------------------------------------- layers whose cases meet (batch norm in training)
def output_gradients(
    model: nn.Module, name: str, x: Batch, y: Tensor | None, likelihood: Likelihood, fisher: str
) -> tuple[Use, list[Tensor], float]:
    """Gradients at one layer's own output: one full-batch backward per column, or per target."""
    outputs, (use,) = run(model, [name], x)
    terms = likelihood.terms(outputs, y)
    if fisher == "empirical":
        values = [likelihood.nll(outputs, y)]
    else:
        root = torch.stack([likelihood.fisher(f, None).diag().sqrt() for f in outputs])
        values = list((outputs.flatten(1) * root).sum(0))
    gradients = [torch.autograd.grad(v, use.s, retain_graph=True)[0] for v in values]
    return use, gradients, terms


def batch_norm_covariance(
    model: nn.Module, name: str, x: Batch, y: Tensor | None, likelihood: Likelihood, fisher: str
) -> Tensor:
    """2C x 2C; the per-case gradient is (sum over positions of g xhat, sum over positions of g)."""
    use, gradients, terms = output_gradients(model, name, x, y, likelihood, fisher)
    rows = use.x.detach().flatten(2) if use.x.dim() > 2 else use.x.detach().unsqueeze(-1)
    mean = rows.mean((0, 2), keepdim=True)
    variance = (rows - mean).square().mean((0, 2), keepdim=True)
    normalised = (rows - mean) / (variance + use.layer.eps).sqrt()
    total = 0.0
    for gradient in gradients:
        g = gradient.reshape(rows.shape)
        per_case = torch.cat([(g * normalised).sum(2), g.sum(2)], dim=1)
        total = total + per_case.T @ per_case
    return total / terms


# ---------------------------------------------------------------------------- damping and blocks
def column_stacked(matrix: Tensor) -> Tensor:
    return matrix.T.reshape(-1)


def tikhonov(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi gamma I, G + gamma / pi I)."""
    gamma = damping**0.5
    mean_a, mean_g = A.trace() / len(A), G.trace() / len(G)
    pi = (mean_a / mean_g).sqrt() if mean_a > 0 and mean_g > 0 else torch.ones_like(mean_a)
    return A + pi * gamma * torch.eye(len(A)).to(A), G + gamma / pi * torch.eye(len(G)).to(G)


def solve_kronecker(A: Tensor, G: Tensor, V: Tensor, damping: float) -> Tensor:
    """vec(result) = (damped A (x) damped G)^-1 vec(V), all dense."""
    block = torch.kron(*tikhonov(A, G, damping))
    return torch.linalg.inv(block).mv(column_stacked(V)).reshape(V.T.shape).T


def solve_full(C: Tensor, v: Tensor, damping: float) -> Tensor:
    dense = torch.diag(C) if C.dim() == 1 else C
    return torch.linalg.inv(dense + damping * torch.eye(len(dense)).to(dense)).mv(v)


# ------------------------------------------------------------------- couplings (block-tridiagonal)
def averages_over_cells(positions: Sequence[int], grid: Sequence[int]) -> Tensor:
    """[cells, positions]: torch's adaptive pooling as a matrix, scaled to shorten every vector."""
    result = torch.ones(1, 1)
    for size, cells in zip(positions, grid, strict=True):
        pool = F.adaptive_avg_pool1d(torch.eye(size)[:, None], cells)[:, 0].T
        result = torch.kron(result, pool / pool.sum(0).max().sqrt())
    return result


def cross_kronecker(
    model: nn.Module,
    names: tuple[str, str],
    x: Batch,
    y: Tensor | None,
    likelihood: Likelihood,
    fisher: str = "exact",
    pooling: tuple[Tensor, Tensor] | None = None,
    sharing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """(A_ij, G_ij) of two layers that are called once; `pooling` has a matrix for each side."""
    A, G, terms, count = 0.0, 0.0, 0.0, 0
    for n, case in enumerate(cases(x)):
        target = None if y is None else y[n : n + 1]
        outputs, uses = run(model, names, case)
        moment = case_moment(likelihood, fisher, outputs, target, [use.s for use in uses])
        places, inputs, offset = [], [], 0
        for use in uses:
            index = torch.arange(use.s.numel()).reshape(use.s.shape) + offset
            places.append(output_rows(use.layer, index).squeeze(1))
            inputs.append(input_rows(use.layer, use.x).squeeze(1))
            offset += use.s.numel()
        (one, two), (S, T) = inputs, map(len, inputs)
        block = moment[places[0][:, :, None, None], places[1][None, None]]  # [S, out, T, out']
        if sharing == "reduce":
            A, G = A + torch.outer(one.mean(0), two.mean(0)), G + block.sum((0, 2))
        else:
            P, Q = pooling or (torch.eye(S), torch.eye(T))
            A = A + (P @ one).T @ (Q @ two)
            G = G + torch.einsum("cs,sitj,ct->ij", P, block, Q) / (S * T) ** 0.5
        terms, count = terms + likelihood.terms(outputs, target), count + 1
    return A / count, G / terms


Blocks = dict[str, tuple[Tensor, ...]]


def tridiagonal_inverse(
    factors: Blocks, cross: dict[tuple[str, str], tuple[Tensor, Tensor]], damping: float
) -> tuple[Tensor, dict[str, slice]]:
    """Xi^T Lambda Xi of a forest, dense, over the coupled blocks, and where each block stands.

    The blocks' vectors are the columns of [W b], stacked.
    """
    names = [n for n in factors if any(n in pair for pair in cross)]
    F_ii = {n: torch.kron(*tikhonov(*factors[n], damping)) for n in names}
    ends = list(itertools.accumulate(len(F_ii[n]) for n in names))
    places = {n: slice(e - len(F_ii[n]), e) for n, e in zip(names, ends, strict=True)}
    Xi, Sigma = torch.eye(ends[-1]), torch.zeros(ends[-1], ends[-1])
    for n in names:
        Sigma[places[n], places[n]] = F_ii[n]
    for (child, parent), (A, G) in cross.items():
        F_ip, F_pp = torch.kron(A, G), F_ii[parent]
        Psi = F_ip @ torch.linalg.inv(F_pp)
        Xi[places[child], places[parent]] = -Psi
        Sigma[places[child], places[child]] = F_ii[child] - Psi @ F_pp @ Psi.T
    return Xi.T @ torch.linalg.inv(Sigma) @ Xi, places
