"""A run's record as curves: in a picture, or in TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kfac_fx.errors import MissingExtraError, UnknownOptionError
from kfac_fx.viz.extras import new_figure

Record = Sequence[Mapping[str, float]]

PANELS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("loss", ("loss",), "log"),
    ("reduction ratio", ("rho",), "linear"),
    ("damping", ("damping", "gamma"), "log"),
    ("step", ("alpha", "mu", "trust"), "linear"),
)
LABELS = {"damping": "λ", "gamma": "γ", "alpha": "α", "mu": "μ", "rho": "ρ"}
SECONDS = "seconds_"


def draw_training(record: Record, path: str | Path) -> None:
    """Saves loss, reduction ratio, damping, step sizes and seconds by stage over the iterations.

    Panels of which the record has nothing are left out.

    Args:
        record: one ``KFAC.diagnostics`` an iteration (``record.append(dict(opt.diagnostics))``).
        path: of a picture in one of matplotlib's formats.

    Raises:
        UnknownOptionError: the record is empty.
        MissingExtraError: matplotlib is not installed.
    """
    panels = [panel for panel in PANELS if any(_points(record, key)[1] for key in panel[1])]
    stages = sorted({key for entry in record for key in entry if key.startswith(SECONDS)})
    number = len(panels) + bool(stages)
    if number == 0:
        raise UnknownOptionError("the record holds nothing to draw: append KFAC.diagnostics to it")
    columns = min(number, 3)
    rows = -(-number // columns)
    figure = new_figure(3.4 * columns, 2.6 * rows, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, keys, scale) in zip(grid, panels, strict=False):
        for key in keys:
            x, y = _points(record, key)
            if y:
                axes.plot(x, y, linewidth=1.3, label=LABELS.get(key, key), **_dots(y))
        # Likelihoods of densities have losses below zero.
        positive = all(value > 0 for key in keys for value in _points(record, key)[1])
        _finish(axes, title, scale if positive else "linear", len(keys) > 1)
        if title == "reduction ratio":
            axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    if stages:
        _stages(grid[len(panels)], record, stages)
    for axes in grid[number:]:
        axes.axis("off")
    figure.savefig(path, dpi=120)


def write_tensorboard(record: Record, directory: str | Path) -> None:
    """Writes every number of a record as a scalar of TensorBoard, under its own name.

    Args:
        record: as for ``draw_training``.
        directory: of the event file.

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
            # "seconds_update" -> "seconds/update": TensorBoard groups by what is before the slash.
            name = key.replace("_", "/", 1) if key.startswith(SECONDS) else f"kfac/{key}"
            writer.add_scalar(name, value, int(entry.get("iteration", place)))
    writer.close()


def _points(record: Record, key: str) -> tuple[list[float], list[float]]:
    """Iterations and values where the record has a finite one."""
    found = [
        (entry.get("iteration", place), entry[key])
        for place, entry in enumerate(record, 1)
        if key in entry and math.isfinite(entry[key])
    ]
    return [x for x, _ in found], [y for _, y in found]


def _dots(values: Sequence[float]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(values) < 40 else {}


def _stages(axes: Any, record: Record, stages: Sequence[str]) -> None:
    """Cumulated seconds, one stage on top of the other."""
    x = [entry.get("iteration", place) for place, entry in enumerate(record, 1)]
    sums: list[list[float]] = []
    for stage in stages:
        total, line = 0.0, []
        for entry in record:
            total += entry.get(stage, 0.0)
            line.append(total)
        sums.append(line)
    axes.stackplot(x, sums, labels=[stage.removeprefix(SECONDS) for stage in stages], alpha=0.85)
    _finish(axes, "seconds by stage", "linear", True)


def _finish(axes: Any, title: str, scale: str, legend: bool) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("iteration", fontsize=8)
    axes.set_yscale(scale)
    axes.tick_params(which="both", labelsize=7)
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=7)
