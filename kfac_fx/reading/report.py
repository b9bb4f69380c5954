"""Report on statistics: spectra of factors, the damping in force, strength of couplings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import BlockApproximation, matrices_of
from kfac_fx.curvature.choose_couplings import whiteners
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.ir.curvature_graph import CurvatureBlock
from kfac_fx.ir.use import FactorSpec
from kfac_fx.linalg.conditional import correlation, mutual_information

STRONGEST = 5
"""How many canonical correlations of a side are reported."""


@dataclass(frozen=True)
class FactorReport:
    """The spectrum of a factor, and of what is inverted.

    Attributes:
        size: the number of eigenvalues; of grouped factors, of all groups together.
        effective_rank: exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007).
        damping: what is added to the eigenvalues; the largest of the groups. Zero where the
            product is damped rather than its factors.
        condition: the condition of the damped factor; the largest of the groups, infinite if it is
            singular.
    """

    name: str
    size: int
    trace: float
    largest: float
    smallest: float
    effective_rank: float
    damping: float
    condition: float


@dataclass(frozen=True)
class BlockReport:
    """A block: its factors, and how they are damped.

    Attributes:
        recorded: number of statistics in its averages.
        pi: the pi of factored Tikhonov damping, one for each group; empty where it has no place.
        damping: what is added to the eigenvalues of the product A (x) G; None where its factors
            are damped.
        condition: the condition of the damped block; None where it does not follow from its factors
            (sums).
    """

    factors: tuple[FactorReport, ...]
    recorded: int
    pi: tuple[float, ...]
    damping: float | None
    condition: float | None

    def lines(self) -> list[str]:
        """Return the numbers in short, for pictures."""
        if not self.recorded:
            return ["no statistics"]
        condition = "" if self.condition is None else f"κ {self.condition:.2g}   "
        ranks = "  ".join(f"{f.name} {f.effective_rank:.1f}/{f.size}" for f in self.factors)
        traces = "  ".join(f"{f.name} {f.trace:.2g}" for f in self.factors)
        damping = "  ".join(f"{f.name} {f.damping:.2g}" for f in self.factors)
        if self.damping is not None:
            damping = f"{self.damping:.2g}"
        return [f"{condition}rank {ranks}", f"trace {traces}", f"damping {damping}"]


@dataclass(frozen=True)
class CouplingReport:
    """A child and its parent.

    Attributes:
        strength: the largest canonical correlation, that of A times that of G.
        A, G: the largest canonical correlations of either side, damped.
        mutual_information: in nats.
    """

    strength: float
    A: tuple[float, ...]
    G: tuple[float, ...]
    mutual_information: float


@dataclass(frozen=True)
class CurvatureReport:
    """All blocks, and the couplings in use by (child, parent); ``print`` shows a table.

    Attributes:
        gamma: the gamma of factored Tikhonov damping, the square root of what other blocks are
            damped with.
    """

    gamma: float
    blocks: Mapping[str, BlockReport]
    couplings: Mapping[tuple[str, str], CouplingReport]

    def plain(self) -> dict[str, object]:
        """Return plain values only, for JSON."""
        couplings = [
            {"child": child, "parent": parent} | asdict(found)
            for (child, parent), found in self.couplings.items()
        ]
        blocks = {name: asdict(found) for name, found in self.blocks.items()}
        return {"gamma": self.gamma, "blocks": blocks, "couplings": couplings}

    def __str__(self) -> str:
        lines = _table(self.blocks)
        lines += ["", f"gamma {self.gamma:.3g}"]
        silent = [name for name, block in self.blocks.items() if not block.recorded]
        lines += [f"no statistics: {', '.join(silent)}"] if silent else []
        for (child, parent), c in self.couplings.items():
            lines.append(
                f"{child} given {parent}: strength {c.strength:.3f} "
                f"(A {c.A[0]:.3f}, G {c.G[0]:.3f}), {c.mutual_information:.3g} nats"
            )
        return "\n".join(lines)


def _table(blocks: Mapping[str, BlockReport]) -> list[str]:
    head = ("block", "factor", "size", "trace", "eff. rank", "damping", "cond", "pi")
    rows: list[tuple[str, ...]] = [head]
    for name, block in blocks.items():
        ends = dict.fromkeys((min(block.pi), max(block.pi))) if block.pi else ()
        pi = "..".join(f"{value:.2g}" for value in ends)
        for index, f in enumerate(block.factors):
            numbers = (f.trace, f.effective_rank, f.damping, f.condition)
            cells = [f"{number:.3g}" for number in numbers]
            shown = (name, pi or "-") if index == 0 else ("", "")
            rows.append((shown[0], f.name, str(f.size), *cells, shown[1]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


@torch.no_grad()
def report_of(inverse: InverseFisher, gamma: float) -> CurvatureReport:
    """Return a report of the present averages, as the next refresh would damp them.

    Args:
        inverse: has the averages, and a program whose approximations say how they are damped.
        gamma: the square root of lambda.
    """
    estimate = inverse.estimate
    blocks = {
        name: _block(
            inverse.program.recipe.of(block),
            block,
            estimate.blocks[name].read(),
            estimate.blocks[name].recorded,
            gamma,
        )
        for name, block in inverse.curvature.blocks.items()
    }
    couplings = {}
    for coupling in inverse.program.couplings:
        pair = coupling.child, coupling.parent
        if all(estimate.blocks[name].recorded for name in pair):
            cross = estimate.cross(coupling)
            sides = [estimate.blocks[name].read() for name in pair]
            couplings[pair] = _coupling(sides, cross, gamma)
    return CurvatureReport(gamma, blocks, couplings)


@torch.no_grad()
def spectra(block: CurvatureBlock, factors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return eigenvalues by factor name, undamped, in float64, the largest first.

    Args:
        block: the block whose factors they are.
        factors: the factors as ``Preconditioner.factors`` has them; the groups of a grouped layer
            are rows of the result.
    """
    specs = matrices_of(block)
    return {s.name: _eigenvalues(s, f) for s, f in zip(specs, factors, strict=True)}


def _eigenvalues(spec: FactorSpec, factor: Tensor) -> Tensor:
    factor = factor.detach().double()
    if spec.diagonal or len(spec.shape) == 1:  # eigenvalues as they are
        return torch.sort(factor, descending=True)[0]
    values: Tensor = torch.linalg.eigvalsh(factor).clamp_min(0.0)
    if spec.cut:  # sub-blocks of one matrix; the zeros that fill the last one do not count
        values = torch.sort(values.flatten())[0][-spec.cut :]
    return values.flip(-1)


def _block(
    approximation: BlockApproximation,
    block: CurvatureBlock,
    factors: Sequence[Tensor],
    recorded: int,
    gamma: float,
) -> BlockReport:
    # On the CPU in float64: the smallest eigenvalues are below float32's rounding of the largest.
    values = [value.cpu() for value in spectra(block, factors).values()]
    damping = approximation.damping(block, factors, gamma)
    parts = zip(matrices_of(block), values, damping.amounts, strict=True)
    condition = approximation.condition(values, damping)
    return BlockReport(
        tuple(_factor(spec.name, value, amount) for spec, value, amount in parts),
        recorded,
        () if damping.pi is None else tuple(damping.pi.flatten().tolist()),
        damping.product,
        None if condition is None else float(condition.max()),
    )


def _factor(name: str, values: Tensor, amount: Tensor) -> FactorReport:
    """Return a factor's numbers; its condition is the largest of the groups."""
    # The entropy of the eigenvalues' shares; a factor of zeros has the rank one by it.
    shares = values.flatten() / values.sum().clamp_min(1e-300)
    rank = torch.exp(-torch.xlogy(shares, shares).sum())
    damped = values + amount.unsqueeze(-1)
    condition = damped.amax(-1) / damped.amin(-1)
    return FactorReport(
        name=name,
        size=values.numel(),
        trace=float(values.sum()),
        largest=float(values.max()),
        smallest=float(values.min()),
        effective_rank=float(rank),
        damping=float(amount.max()),
        condition=float(condition.max()),
    )


def _coupling(
    sides: Sequence[Sequence[Tensor]], cross: Sequence[Tensor], gamma: float
) -> CouplingReport:
    # Whitened, so that strengths are those under the damping in force: undamped, two layers of more
    # units than cases are perfectly correlated.
    child, parent = (whiteners(factors, gamma**2) for factors in sides)
    A, G = (
        torch.linalg.svdvals(correlation(W, C, W_parent)).clamp_max(1.0).double().cpu()
        for W, C, W_parent in zip(child, cross, parent, strict=True)
    )
    information = float(mutual_information(A.square(), G.square()))
    top = [tuple(side[:STRONGEST].tolist()) for side in (A, G)]
    return CouplingReport(float(A[0] * G[0]), top[0], top[1], information)
