"""The curvature as one dense matrix over the flat vector of all parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support import oracles
from support.networks import Conv1D

Placed = list[tuple[Tensor, Tensor]]  # flat indices and the dense matrix of their block


def indices(model: nn.Module) -> dict[str, Tensor]:
    """The place of every entry of every parameter in the flat vector."""
    found, start = {}, 0
    for name, p in model.named_parameters():
        found[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    return found


def matrices(model: nn.Module, name: str, at: dict[str, Tensor]) -> Tensor:
    """Flat indices of a Kronecker block as [groups, out, in + 1]."""
    if name in at:  # rows of a bare parameter, as an embedding's
        return at[name].T[None]
    layer, weight, bias = model.get_submodule(name), at[f"{name}.weight"], at.get(f"{name}.bias")
    if isinstance(layer, (Conv1D, nn.Embedding)):
        weight = weight.T
    groups = getattr(layer, "groups", 1)
    rows = weight.reshape(groups, len(weight) // groups, -1)
    return rows if bias is None else torch.cat([rows, bias.reshape(groups, -1, 1)], 2)


def dense_blocks(pre: object, model: nn.Module, damping: float, tikhonov: str) -> Placed:
    """Blocks of the block-diagonal structure."""
    at, placed = indices(model), []
    for name, block in pre.curvature.blocks.items():
        factors = pre.factors[name]
        if block.approximation == "kronecker":
            index = matrices(model, name, at)
            batched = [f if len(index) > 1 else f[None] for f in factors]
            for i, A, G in zip(index, *batched, strict=True):
                placed.append((oracles.column_stacked(i), product(A, G, damping, tikhonov)))
        elif block.approximation == "pairs":
            both = torch.stack([at[p] for p in block.parameters], 1)
            eye = damping * torch.eye(2)
            placed += [(i, C + eye) for i, C in zip(both, factors[0], strict=True)]
        else:
            C = torch.diag(factors[0]) if factors[0].dim() == 1 else factors[0]
            index = torch.cat([at[p].flatten() for p in block.parameters])
            placed.append((index, C + damping * torch.eye(len(C))))
    return placed


def product(A: Tensor, G: Tensor, damping: float, tikhonov: str) -> Tensor:
    A, G = (torch.diag(f) if f.dim() == 1 else f for f in (A, G))
    if tikhonov == "factored":
        return torch.kron(*oracles.tikhonov(A, G, damping))
    return torch.kron(A, G) + damping * torch.eye(len(A) * len(G))


def assembled(placed: Placed, size: int) -> Tensor:
    whole = torch.eye(size)
    for index, block in placed:
        whole[index[:, None], index] = block
    return whole
