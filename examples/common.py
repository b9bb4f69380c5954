"""What the examples share: --quick, threads, a printed table and a figure of training curves."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLOURS = {"K-FAC": "#c2410c", "SGD": "#1d4ed8", "Adam": "#6b7280", "Muon": "#15803d"}


def parse(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Parse the command line with one more flag, --quick.

    Args:
        quick: The defaults under --quick. Options that are typed as well keep what was typed.
    """
    parser.add_argument("--quick", action="store_true", help="a run of seconds: does it work?")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def use_threads(threads: int) -> str:
    """Set the number of threads and return a line that states it."""
    torch.set_num_threads(threads)
    return f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads"


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns aligned on the right, the first on the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for number, row in enumerate([header, *rows]):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]))
        if number == 0:
            print("  ".join("-" * width for width in widths))


@dataclass(frozen=True)
class Panel:
    """One set of axes; `lines` maps a method to its points, `level` is dotted, `log` is for x."""

    title: str
    across: str
    up: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    level: float | None = None
    log: bool = False


def save_figure(panels: Sequence[Panel], path: str | Path) -> None:
    """Save the panels side by side, y logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for method, (x, y) in panel.lines.items():
            axes.plot(x, y, label=method, color=COLOURS.get(method), linewidth=1.8)
        if panel.level is not None:
            axes.axhline(panel.level, color=COLOURS["SGD"], linewidth=1, linestyle=":")
        axes.set(title=panel.title, xlabel=panel.across, ylabel=panel.up, yscale="log")
        axes.set_xscale("log" if panel.log else "linear")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=160)
