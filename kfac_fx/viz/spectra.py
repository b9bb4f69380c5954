"""Spectra of factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_fx.errors import StatisticsError, UnknownOptionError
from kfac_fx.reading.report import spectra
from kfac_fx.viz.extras import new_figure

if TYPE_CHECKING:
    from kfac_fx.optim import Preconditioner

COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce")
COLUMNS = 4


def draw_spectra(
    preconditioner: Preconditioner,
    path: str | Path,
    blocks: Sequence[str] | None = None,
) -> None:
    """Saves the eigenvalues of every factor, a panel a block; dotted: the damping in force.

    Args:
        path: of a picture in one of matplotlib's formats.
        blocks: names; None for all that have statistics.

    Raises:
        UnknownOptionError: a name is no block.
        StatisticsError: there are none yet.
        MissingExtraError: matplotlib is not installed.
    """
    report = preconditioner.report()
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
    figure = new_figure(2.9 * columns, 2.3 * rows, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        block = preconditioner.curvature.blocks[name]
        found = spectra(block, preconditioner.factors[name])
        for factor, colour, values in zip(
            report.blocks[name].factors, COLOURS, found.values(), strict=False
        ):
            flat = values.flatten().sort(descending=True).values.cpu().numpy()
            positive = flat[flat > 0]
            axes.plot(range(1, len(positive) + 1), positive, color=colour, label=factor.name)
            if factor.damping > 0:
                axes.axhline(factor.damping, color=colour, linestyle=":", linewidth=1)
        axes.set_title(name, fontsize=8)
        axes.set(xscale="log", yscale="log")
        axes.tick_params(which="both", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    for axes in list(figure.axes)[len(names) :]:
        axes.axis("off")
    figure.supxlabel("number of the eigenvalue", fontsize=8)
    figure.savefig(path, dpi=110)
