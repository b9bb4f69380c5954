"""Dense Fishers of small networks of linear layers, and pictures of matrices.

Parameters are ordered layer by layer, each layer's [W b] with its columns stacked (vec), so that a
block of the Kronecker form is A (x) G (docs/explanation/mathematics.md, section 1). Everything here
has as many entries as parameters squared: it is for networks of a few thousand parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from kfac_fx.errors import UnknownOptionError
from kfac_fx.linalg.positive import damped_factors
from kfac_fx.viz.extras import Axes, new_figure

if TYPE_CHECKING:
    from kfac_fx.optim.preconditioner import Preconditioner

LARGEST = 420
"""Pixels of a panel; larger matrices are averaged, so that nothing small is dropped."""


def exact_fisher(model: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    """Return F of linear layers under a categorical likelihood, from the Jacobian of every case.

    Args:
        model: a function from [cases, ...] to logits [cases, classes].
        names: paths of ``nn.Linear`` modules; their order is that of the blocks.
        x: the cases, over which F is a mean.

    Returns:
        [n, n] for the n parameters of the layers.

    Raises:
        UnknownOptionError: a name is no linear layer.
    """
    layers = _layers(model, names)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    keys = [f"{name}.{leaf}" for name, layer in layers.items() for leaf in _leaves(layer)]

    def logits(own: dict[str, Tensor], case: Tensor) -> Tensor:
        result: Tensor = functional_call(model, parameters | own, (case[None],))[0]
        return result

    # With S the root of the output Fisher, F is the mean of (S^T J)^T (S^T J): a product of what
    # one case has, so that F is positive up to rounding.
    J = vmap(jacrev(logits), (None, 0))({key: parameters[key] for key in keys}, x)
    parts = []
    for name, layer in layers.items():
        V = J[f"{name}.weight"]
        if layer.bias is not None:
            V = torch.cat([V, J[f"{name}.bias"][..., None]], -1)
        parts.append(V.mT.flatten(2))  # columns stacked, as vec() does
    rows = _root(model(x).detach()).mT @ torch.cat(parts, -1)
    rows = rows.flatten(0, 1)
    return rows.mT @ rows / len(x)


def kronecker_fisher(
    model: nn.Module, names: Sequence[str], x: Tensor, damping: float = 0.0
) -> Tensor:
    """Return Ftilde: blocks E[a_i a_j^T] (x) E[g_i g_j^T] of all pairs of linear layers.

    Args:
        model: a function from [cases, ...] to logits [cases, classes]; each layer sees one vector a
            case.
        names: paths of ``nn.Linear`` modules; their order is that of the blocks.
        x: the cases.
        damping: lambda of factored Tikhonov damping of the diagonal blocks; 0 for none.

    Returns:
        [n, n].

    Raises:
        UnknownOptionError: a name is no linear layer.
    """
    a, g = _vectors(model, _layers(model, names), x)
    rows = []
    for i in range(len(a)):
        row = []
        for j in range(len(a)):
            A = a[i].mT @ a[j] / len(x)
            G = torch.einsum("knp,knq->pq", g[i], g[j]) / len(x)
            # Damping belongs to the diagonal: cross blocks are what the couplings are made of.
            if i == j and damping > 0:
                A, G = damped_factors(A, G, damping**0.5)
            row.append(torch.kron(A, G))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def dense_inverse(preconditioner: Preconditioner, names: Sequence[str]) -> Tensor:
    """Return Fhat^-1 (Fbreve^-1 without couplings) of linear layers, column by column.

    Args:
        preconditioner: has inverses; it is applied to every unit vector.
        names: blocks; gradients of all others are zero.

    Returns:
        [n, n].

    Raises:
        UnknownOptionError: a name is no Kronecker block of one layer.
        StatisticsError: there are no inverses yet.
    """
    shapes = []
    for name in names:
        block = preconditioner.curvature.blocks.get(name)
        if block is None or len(block.dimensions) != 2 or len(block.dimensions[0]) != 2:
            raise UnknownOptionError(f"{name!r} is no Kronecker block of one linear layer")
        shapes.append((block.dimensions[1][0], block.dimensions[0][0], block.parameters))
    sizes = [rows * columns for rows, columns, _ in shapes]
    like = preconditioner.factors[names[0]][0]
    result = []
    # What the program computes is compared here, not a formula that should agree with it.
    for unit in torch.eye(sum(sizes), dtype=like.dtype, device=like.device):
        given: dict[str, Tensor] = {}
        for (rows, columns, keys), part in zip(shapes, unit.split(sizes), strict=True):
            V = part.view(columns, rows).mT
            given |= dict(zip(keys, (V[:, :-1], V[:, -1]) if keys[1:] else (V,), strict=True))
        found = preconditioner.apply(given)
        parts = []
        for _, _, keys in shapes:
            U = found[keys[0]]
            U = torch.cat([U, found[keys[1]][:, None]], 1) if keys[1:] else U
            parts.append(U.mT.reshape(-1))
        result.append(torch.cat(parts))
    return torch.stack(result, 1)


def show_matrix(axes: Axes, matrix: Tensor, title: str, sizes: Sequence[int] = ()) -> None:
    """Draw absolute values on matplotlib's axes, brightened as the paper does (power 0.33).

    Args:
        axes: to draw on.
        matrix: [n, m].
        title: above it.
        sizes: the sizes of blocks, between which lines are drawn; none where it is empty.
    """
    values = matrix.detach().abs()
    step = max(len(values) // LARGEST, 1)
    if step > 1:
        values = torch.nn.functional.avg_pool2d(values[None, None], step)[0, 0]
    values = (values / values.max().clamp_min(1e-300)) ** 0.33
    extent = (0, matrix.shape[1], matrix.shape[0], 0)
    axes.imshow(values.cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, extent=extent)
    for border in list(accumulate(sizes))[:-1]:
        axes.axhline(border, color="#c2410c", linewidth=0.5)
        axes.axvline(border, color="#c2410c", linewidth=0.5)
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])


def draw_matrices(
    matrices: Mapping[str, Tensor], path: str | Path, *, columns: int = 3, sizes: Sequence[int] = ()
) -> None:
    """Save heat maps by title, as ``show_matrix`` draws them.

    Args:
        matrices: the matrices by title, from left to right.
        path: the path of a picture in one of matplotlib's formats.
        columns: heat maps in a row, at most.
        sizes: the sizes of blocks, as for ``show_matrix``; the same for all.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = min(columns, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = new_figure(3.2 * columns, 3.3 * rows, constrained=True)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, matrix) in zip(grid, matrices.items(), strict=False):
        show_matrix(axes, matrix, title, sizes)
    for axes in grid[len(matrices) :]:
        axes.axis("off")
    figure.savefig(path, dpi=100)


def _layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise UnknownOptionError(f"{name!r} is no linear layer of the model")
        found[name] = layer
    return found


def _leaves(layer: nn.Linear) -> tuple[str, ...]:
    return ("weight", "bias") if layer.bias is not None else ("weight",)


def _root(logits: Tensor) -> Tensor:
    """Return S with S S^T = diag(p) - p p^T, case by case: [cases, classes, classes]."""
    # S = diag(sqrt p) - p sqrt(p)^T needs no decomposition, and p of zero is no special case.
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p[..., None] * p.sqrt()[:, None]


def _vectors(
    model: nn.Module, layers: Mapping[str, nn.Linear], x: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's a [cases, d_in], homogeneous, and g [classes, cases, d_out].

    g has one derivative a column of the output Fisher's root, so that sums over them are exact.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0].detach(), output)})
        )
        for name, layer in layers.items()
    ]
    logits = model(x)
    for hook in hooks:
        hook.remove()
    a = []
    for name, layer in layers.items():
        value = seen[name][0]
        ones = value.new_ones(len(value), 1)
        a.append(torch.cat([value, ones], 1) if layer.bias is not None else value)
    outputs = [seen[name][1] for name in layers]
    derivatives = [
        torch.autograd.grad((logits * column).sum(), outputs, retain_graph=True)
        for column in _root(logits.detach()).unbind(-1)
    ]
    return a, [torch.stack(part) for part in zip(*derivatives, strict=True)]
