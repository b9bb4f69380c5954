"""Tables and the picture of time_to_target.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from problem_parts import Problem
from target_methods import Method

SMALLEST = 1e-9
"""Losses below it count as equal: they are of the last places of float32 outputs."""

COLOURS = {
    "SGD": "#94a3b8",
    "Adam": "#1d4ed8",
    "Muon": "#15803d",
    "SOAP": "#7c3aed",
    "Shampoo": "#0e7490",
    "Preconditioner": "#c2410c",
    "KFAC(lr)": "#f59e0b",
    "KFAC()": "#dc2626",
}


class Run(Protocol):
    """What a report reads of a run."""

    problem: str
    method: str
    rate: float
    seed: int
    limit: float
    seconds: list[float]
    steps: list[int]
    train: list[float]
    test: list[float]
    accuracy: list[float]

    @property
    def diverged(self) -> bool:
        """Whether it failed, or ends no better than it began."""

    @property
    def final(self) -> float:
        """Return the lowest training loss; infinite for a run that diverged."""


@dataclass(frozen=True)
class Choice:
    """The runs of a method on a problem with the rate whose first seed ended lowest."""

    method: Method
    rate: float
    runs: Sequence[Run]
    rates: Sequence[float]
    diverged: int
    tried: int

    @property
    def final(self) -> float:
        """Return the median over seeds."""
        return statistics.median(run.final for run in self.runs)

    @property
    def edge(self) -> bool:
        """Whether the best rate is the smallest or the largest that was tried."""
        return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))

    def reached(self, level: float, across: Callable[[Run], Sequence[float]]) -> float:
        """Return where the level is reached, in seconds or steps; the median over seeds."""
        return statistics.median(_first(run, level, across(run)) for run in self.runs)


def _first(run: Run, level: float, across: Sequence[float]) -> float:
    """Return the place where the loss comes down to a level, between two evaluations by its log."""
    wanted = math.log(max(level, SMALLEST))
    before: tuple[float, float] | None = None
    for place, loss in zip(across, run.train, strict=True):
        now = math.log(max(loss, SMALLEST)) if math.isfinite(loss) else math.inf
        if now <= wanted:
            if before is None or before[1] <= wanted or not math.isfinite(before[1]):
                return place
            share = (before[1] - wanted) / (before[1] - now)
            return before[0] + share * (place - before[0])
        before = (place, now)
    return math.inf


def seconds_of(run: Run) -> Sequence[float]:
    """Return the times of a run's evaluations."""
    return run.seconds


def steps_of(run: Run) -> Sequence[float]:
    """Return the numbers of steps at a run's evaluations."""
    return run.steps


def choices(runs: Sequence[Run], problem: Problem, methods: Sequence[Method]) -> list[Choice]:
    """Return what each method's best rate did."""
    found = []
    for method in methods:
        own = [r for r in runs if r.problem == problem.name and r.method == method.name]
        if not own:
            continue
        longest = max(run.limit for run in own)
        own = [run for run in own if run.limit == longest]
        first = [run for run in own if run.seed == min(r.seed for r in own)]
        rate = min(first, key=lambda run: run.final).rate
        chosen = [run for run in own if run.rate == rate]
        rates = sorted({run.rate for run in own})
        diverged = sum(run.diverged for run in own)
        found.append(Choice(method, rate, chosen, rates, diverged, len(own)))
    return found


def targets(found: Iterable[Choice]) -> tuple[float, float]:
    """Return the final loss of tuned Adam, and the best rival's."""
    finals = {choice.method.name: choice.final for choice in found if not choice.method.ours}
    return finals.get("Adam", math.nan), min(finals.values(), default=math.nan)


HEADER = (
    "method",
    "rate",
    "of rates",
    "steps",
    "train loss",
    "test",
    "accuracy",
    "s to Adam's",
    "steps",
    "s to best rival's",
    "steps",
    "diverged",
)


def report(runs: Sequence[Run], problems: Sequence[Problem], methods: Sequence[Method]) -> str:
    """Return a table for each problem, and how often each method reaches the targets."""
    parts = [_settings(methods)]
    counts: dict[str, list[tuple[float, float]]] = {}
    for problem in problems:
        found = choices(runs, problem, methods)
        if not found:
            continue
        adam, best = targets(found)
        rows = [_row(choice, adam, best) for choice in found]
        limit = found[0].runs[0].limit
        kind = "deterministic" if problem.deterministic else "small batches"
        parts.append(f"\n{problem.name}: {problem.title}; {limit:g} s, {kind}\n")
        parts.append(_table(HEADER, rows))
        for choice in found:
            reached = [choice.reached(level, seconds_of) / limit for level in (adam, best)]
            counts.setdefault(choice.method.name, []).append((reached[0], reached[1]))
    parts.append("\nproblems on which a method reaches a loss within a share of the time\n")
    header = ("method", "Adam's, 1/2", "Adam's, 1", "best rival's, 1/2", "best rival's, 1", "of")
    summary = []
    for name, shares in counts.items():
        cells = [sum(pair[k] <= share for pair in shares) for k in (0, 1) for share in (0.5, 1)]
        summary.append([name, *map(str, cells), str(len(shares))])
    parts.append(_table(header, summary))
    return "\n".join(parts)


def _settings(methods: Sequence[Method]) -> str:
    lines = ["Methods; the search for a rate goes on until the best has a worse one on either side"]
    lines += [f"  {m.name}: {m.setting}; rates from {m.first or '-'}" for m in methods]
    return "\n".join(lines)


def _row(choice: Choice, adam: float, best: float) -> list[str]:
    last = choice.runs[0]
    accuracy = statistics.median(r.accuracy[-1] for r in choice.runs) if last.accuracy else None
    reached = [
        _number(choice.reached(level, across))
        for level in (adam, best)
        for across in (seconds_of, steps_of)
    ]
    rates = f"{min(choice.rates):g}..{max(choice.rates):g}{' edge' if choice.edge else ''}"
    return [
        choice.method.name,
        f"{choice.rate:g}" if choice.rate else "-",
        rates if choice.rate else "-",
        f"{statistics.median(r.steps[-1] for r in choice.runs):,.0f}",
        f"{choice.final:.2e}",
        f"{statistics.median(r.test[-1] for r in choice.runs):.2e}",
        "" if accuracy is None else f"{accuracy:.1%}",
        *reached,
        f"{choice.diverged} of {choice.tried}",
    ]


def _number(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns aligned on the right, the first on the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def draw(
    runs: Sequence[Run], problems: Sequence[Problem], methods: Sequence[Method], path: Path
) -> None:
    """Save a panel a problem: best training loss so far by second, thick for ours.

    The dotted line is tuned Adam's final loss; a cross stands where every rate diverged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(p, choices(runs, p, methods)) for p in problems]
    shown = [(problem, found) for problem, found in shown if found]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4 * columns, 2.9 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    handles = {}
    for axes, (problem, found) in zip(panels, shown, strict=False):
        axes.axhline(max(targets(found)[0], SMALLEST), color=COLOURS["Adam"], ls=":", lw=1)
        for choice in found:
            name = choice.method.name
            run = sorted(choice.runs, key=lambda r: r.final)[len(choice.runs) // 2]
            # An unrestrained maximum of a run that diverged would squeeze all others.
            best = [max(min(run.train[: k + 1]), SMALLEST) for k in range(len(run.train))]
            style = "--" if run.diverged else "-"
            width = 2.4 if choice.method.ours else 1.3
            (handles[name],) = axes.plot(
                run.seconds,
                best,
                style,
                color=COLOURS.get(name),
                linewidth=width,
                zorder=3 if choice.method.ours else 2,
            )
            if choice.final == math.inf:
                axes.plot(run.seconds[-1], best[-1], "x", color=COLOURS.get(name))
        axes.set_title(problem.title, fontsize=10)
        axes.set(yscale="log")
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(shown) :]:
        axes.remove()
    figure.supxlabel("processor seconds, one thread", fontsize=10)
    figure.supylabel("best training loss so far", fontsize=10)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=8, frameon=False
    )
    figure.savefig(path, dpi=110)
