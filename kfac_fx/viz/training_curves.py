"""A run's record as curves: in a picture, or in TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from kfac_fx.errors import MissingExtraError, UnknownOptionError
from kfac_fx.viz.extras import Axes, new_figure

Record = Sequence[Mapping[str, float]]
"""One ``KFAC.diagnostics`` an iteration."""

Scale = Literal["log", "linear"]


class Panel(NamedTuple):
    """The content of one panel.

    Attributes:
        title: above it.
        keys: the keys of the record; those that it lacks are left out.
        scale: the kind of scale of the vertical axis.
    """

    title: str
    keys: tuple[str, ...]
    scale: Scale


PANELS = (
    Panel("loss", ("loss",), "log"),
    Panel("reduction ratio", ("rho",), "linear"),
    Panel("damping", ("damping", "gamma"), "log"),
    Panel("step", ("alpha", "mu", "trust"), "linear"),
)
LABELS = {"damping": "λ", "gamma": "γ", "alpha": "α", "mu": "μ", "rho": "ρ"}
"""The papers' symbols, for keys of the record."""

SECONDS = "seconds_"
"""What keys begin with that hold the seconds of a stage."""

FEW = 40
"""Points below which each is marked by a dot."""


def draw_training(record: Record, path: str | Path) -> None:
    """Save loss, reduction ratio, damping, step sizes and seconds by stage over the iterations.

    Panels of which the record has nothing are left out.

    Args:
        record: one ``KFAC.diagnostics`` an iteration (``record.append(dict(opt.diagnostics))``).
        path: the path of a picture in one of matplotlib's formats.

    Raises:
        UnknownOptionError: the record is empty.
        MissingExtraError: matplotlib is not installed.
    """
    panels = [panel for panel in PANELS if any(_points(record, key).y for key in panel.keys)]
    stages = sorted({key for entry in record for key in entry if key.startswith(SECONDS)})
    number = len(panels) + bool(stages)
    if number == 0:
        raise UnknownOptionError("the record holds nothing to draw: append KFAC.diagnostics to it")
    columns = min(number, 3)
    rows = -(-number // columns)
    figure = new_figure(3.4 * columns, 2.6 * rows, constrained=True)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        points = {key: _points(record, key) for key in panel.keys}
        for key, (x, y) in points.items():
            # A short run is drawn with dots: a line through three points looks like a measurement.
            marker = "o" if len(y) < FEW else None
            if y:
                label = LABELS.get(key, key)
                axes.plot(x, y, linewidth=1.3, label=label, marker=marker, markersize=3)
        # A likelihood of densities has losses below zero, which a logarithmic axis would drop.
        positive = all(value > 0 for found in points.values() for value in found.y)
        _finish(axes, panel.title, panel.scale if positive else "linear", len(panel.keys) > 1)
        if panel.title == "reduction ratio":
            # At one the quadratic model told the change of the objective exactly.
            axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    if stages:
        _stages(grid[len(panels)], record, stages)
    for axes in grid[number:]:
        axes.axis("off")
    figure.savefig(path, dpi=120)


def write_tensorboard(record: Record, directory: str | Path) -> None:
    """Write every number of a record as a scalar of TensorBoard, under its own name.

    Args:
        record: the same as for ``draw_training``.
        directory: the directory of the event file.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "this needs tensorboard, which is not installed: pip install tensorboard"
        ) from error
    writer = SummaryWriter(str(directory))
    for place, entry in enumerate(record, 1):
        for key, value in entry.items():
            if key == "iteration":
                continue
            # "seconds_update" becomes "seconds/update": TensorBoard makes a group of the scalars
            # whose names agree up to the slash.
            name = key.replace("_", "/", 1) if key.startswith(SECONDS) else f"kfac/{key}"
            writer.add_scalar(name, value, int(entry.get("iteration", place)))
    writer.close()


class _Points(NamedTuple):
    """A curve: iterations, and values of the same length."""

    x: list[float]
    y: list[float]


def _points(record: Record, key: str) -> _Points:
    """Return iterations and values where the record has a finite one."""
    # rho is there every few iterations only, and a rejected step has no alpha.
    found = [
        (entry.get("iteration", place), entry[key])
        for place, entry in enumerate(record, 1)
        if key in entry and math.isfinite(entry[key])
    ]
    return _Points([x for x, _ in found], [y for _, y in found])


def _stages(axes: Axes, record: Record, stages: Sequence[str]) -> None:
    """Draw the seconds of all iterations so far, one stage on top of the other."""
    x = [entry.get("iteration", place) for place, entry in enumerate(record, 1)]
    sums: list[list[float]] = []
    for stage in stages:
        total = 0.0
        line = []
        for entry in record:
            total += entry.get(stage, 0.0)
            line.append(total)
        sums.append(line)
    axes.stackplot(x, sums, labels=[stage.removeprefix(SECONDS) for stage in stages], alpha=0.85)
    _finish(axes, "seconds by stage", "linear", True)


def _finish(axes: Axes, title: str, scale: Scale, legend: bool) -> None:
    """Set what all panels have: title, axes, grid, and a legend where there are several curves."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("iteration", fontsize=8)
    axes.set_yscale(scale)
    axes.tick_params(which="both", labelsize=7)
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=7)
