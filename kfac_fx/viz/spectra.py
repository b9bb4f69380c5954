"""Pictures of the spectra of factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from kfac_fx.errors import StatisticsError, UnknownOptionError
from kfac_fx.ir.curvature_graph import CurvatureBlock
from kfac_fx.reading.inspection import HasCurvature
from kfac_fx.reading.report import BlockReport, spectra
from kfac_fx.viz.extras import Axes, new_figure

COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce")
"""One a factor of a block, the first for A."""

COLUMNS = 4
"""Panels in a row, at most."""


def draw_spectra(
    preconditioner: HasCurvature,
    path: str | Path,
    blocks: Sequence[str] | None = None,
) -> None:
    """Save the eigenvalues of every factor, a panel a block; dotted: the damping in force.

    Directions left of where a curve meets its dotted line are learnt with their own step size,
    those on the right with one that the damping gives.

    Args:
        preconditioner: a ``Preconditioner`` or ``KFAC`` with statistics.
        path: the path of a picture in one of matplotlib's formats.
        blocks: names; None for all that have statistics.

    Raises:
        UnknownOptionError: a name is no block.
        StatisticsError: there are none yet.
        MissingExtraError: matplotlib is not installed.
    """
    report = preconditioner.report()
    # A block that never ran has no spectrum: left out of all, but an error where it is asked for.
    names = [n for n, b in report.blocks.items() if b.recorded] if blocks is None else list(blocks)
    for name in names:
        if name not in report.blocks:
            raise UnknownOptionError(f"{name!r} is no block of this module")
        if not report.blocks[name].recorded:
            raise StatisticsError(f"no statistics of {name} yet")
    if not names:
        raise StatisticsError("no statistics yet: there are no spectra")
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(2.9 * columns, 2.3 * rows, constrained=True)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        block = preconditioner.program.curvature.blocks[name]
        _panel(axes, block, report.blocks[name], preconditioner.factors[name])
    for axes in list(figure.axes)[len(names) :]:
        axes.axis("off")
    figure.supxlabel("number of the eigenvalue", fontsize=8)
    figure.savefig(path, dpi=110)


def _panel(
    axes: Axes, block: CurvatureBlock, report: BlockReport, factors: Sequence[Tensor]
) -> None:
    """Draw the spectra of one block's factors, largest eigenvalue first."""
    found = spectra(block, factors)
    for factor, colour, values in zip(report.factors, COLOURS, found.values(), strict=False):
        flat = values.flatten().sort(descending=True).values.cpu().numpy()
        positive = flat[flat > 0]  # zeros, of dead units, have no place on a logarithmic axis
        axes.plot(range(1, len(positive) + 1), positive, color=colour, label=factor.name)
        if factor.damping > 0:
            axes.axhline(factor.damping, color=colour, linestyle=":", linewidth=1)
    axes.set_title(block.name, fontsize=8)
    axes.set(xscale="log", yscale="log")
    axes.tick_params(which="both", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
