"""The curvature graph as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _row(block: CurvatureBlock) -> tuple[str, ...]:
    factors = "  ".join(
        f"{factor.name} {_shape(factor.shape)}"
        for factor in block.factors
        if factor.role != "count"
    )
    uses = f"{len(block.uses)} uses" if len(block.uses) > 1 else ""
    approximation = ", ".join(filter(None, (block.approximation, uses)))
    return block.name, block.kind, approximation, factors, f"{block.parameter_count:,}"


def table(curvature: CurvatureGraph) -> str:
    """A line a block, then what is weaker than it could be and what was left alone."""
    head = ("block", "kind", "approximation", "factors", "parameters")
    rows = [head, *(_row(block) for block in curvature.blocks.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index == len(head) - 1 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    coverage = curvature.coverage
    parts = [
        f"{kind} {count:,} ({100 * count / max(coverage.total, 1):.1f} %)"
        for kind, count in coverage.scalars.items()
    ]
    lines += ["", f"coverage of {coverage.total:,} parameters: " + ", ".join(parts)]
    lines.append(f"factors and inverses in float32: {curvature.memory() / 2**20:,.2f} MiB")
    lines += _couplings(curvature)
    lines += [f"weaker than it could be: {b.name}: {b.reason}" for b in curvature.fallbacks]
    for label in ("frozen", "excluded", "unused"):
        names = getattr(curvature, label)
        if names:
            lines.append(f"{label}: " + ", ".join(names))
    return "\n".join(lines)


def _couplings(curvature: CurvatureGraph) -> list[str]:
    """The forest, and who is in no tree for which reason."""
    if curvature.structure != "block_tridiagonal":
        return []
    lines = [f"couplings ({curvature.selection}): {len(curvature.couplings)}"]
    lines += [f"  {c.child} given {c.parent}" for c in curvature.couplings]
    reasons: dict[str, list[str]] = {}
    for name, reason in curvature.uncoupled.items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"not coupled: {', '.join(ns)}: {reason}" for reason, ns in reasons.items()]
