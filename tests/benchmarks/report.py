"""Tables and a picture of what stages.py measured.

A row of ours says where a rival is faster at the same: statistics of the same kind, a refresh or an
apply of any K-FAC, and the whole step, of any method.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]

PERIOD = 10
"""Steps from one refresh to the next in a whole step's cost."""

MARGIN = 1.03
"""Two figures closer than this are the same."""

LEGEND = (
    f"step: statistics and apply every step, refresh every {PERIOD}th; *: with the update of the "
    "preconditioner; cosine: between a gradient and what becomes of it"
)

PARTS = ("statistics", "update", "refresh", "apply")
COLORS = {"sgd": "#b8b8b8", "statistics": "#4878cf", "refresh": "#d65f5f", "apply": "#6acc65"}
COLORS["update"] = "#956cb4"


def step(method: Numbers, clock: str = "cpu") -> float:
    """A whole step: statistics and apply each time, a tenth of a refresh, in steps of SGD."""
    return sum(parts(method, clock).values())


def parts(method: Numbers, clock: str = "cpu") -> dict[str, float]:
    """The parts of a whole step, in steps of SGD; what is in no stage is with SGD's."""
    stages = method["stages"][clock]
    each = {name: max(stages[name], 0.0) for name in PARTS if name in stages}
    refresh = each.pop("refresh", 0.0)
    rest = stages["whole"] - sum(each.values()) if "whole" in stages else 1.0
    return {"sgd": rest, **each, "refresh": refresh / PERIOD}


def rivals_of(method: Numbers, stage: str, methods: list[Numbers]) -> Iterator[list[Numbers]]:
    """Rivals that do the same in a stage; for the step, those without a Fisher apart."""
    others = [m for m in methods if not m["ours"]]
    same = [m for m in others if m["kind"] == method["kind"]]
    if stage == "step":
        yield same
        yield [m for m in others if m["kind"] == "gradients"]
    elif stage == "statistics":
        yield [m for m in same if stage in m["stages"]["cpu"]]
    else:
        apart = ("gradients", "diagonal")
        yield [m for m in others if stage in m["stages"]["cpu"] and m["kind"] not in apart]


def remarks(method: Numbers, methods: list[Numbers], clock: str = "cpu") -> list[str]:
    """Where the best rival is faster than we are, and what it does differently."""
    found = []
    for stage in ("statistics", "refresh", "apply", "step"):
        for group in rivals_of(method, stage, methods):
            rival = min(group, key=lambda m: value(m, stage, clock), default=method)
            best = value(rival, stage, clock)
            if value(method, stage, clock) > MARGIN * best:
                why = refresh_is(method, clock) if stage == "refresh" else rival["note"]
                found.append(f"{stage} slower than {rival['name']} ({best:.3f}): {why}")
    return found


def refresh_is(method: Numbers, clock: str) -> str:
    """What our refresh consists of."""
    stages = method["stages"][clock]
    whole, layers = stages["cholesky"], stages["cholesky of layers"]
    return (
        f"torch's Cholesky inverses alone take {layers:.3f} for linear and convolution layers, "
        f"{whole - layers:.3f} for blocks that rivals lack; {stages['refresh'] - whole:.3f} is ours"
    )


def value(method: Numbers, stage: str, clock: str) -> float:
    return step(method, clock) if stage == "step" else float(method["stages"][clock][stage])


def cell(method: Numbers, stage: str, clock: str) -> str:
    stages = method["stages"][clock]
    if stage == "statistics" and "update" in stages:
        return f"{stages['update']:.2f}*"
    return f"{stages[stage]:.2f}" if stage in stages else "-"


def stage_table(numbers: Numbers, clock: str) -> list[str]:
    """A row a method: its stages in steps of SGD, and where a rival is faster."""
    heading = f"{'':32}{'SGD ms':>8}{'fwd/bwd':>9}{'statistics':>12}{'refresh':>9}{'apply':>7}"
    lines = [heading + f"{'step':>7}{'cosine':>8}"]
    for method in numbers["methods"]:
        cells = [cell(method, s, clock) for s in ("training", "statistics", "refresh", "apply")]
        lines.append(
            f"{method['name']:32}{1e3 * method['sgd'][clock]:8.1f}"
            f"{cells[0]:>9}{cells[1]:>12}{cells[2]:>9}{cells[3]:>7}"
            f"{step(method, clock):7.2f}{method['cosine']:8.3f}"
        )
        if method["ours"]:
            lines += [f"    {note}" for note in remarks(method, numbers["methods"], clock)]
    notes = {f"{m['name'].split()[0]}: {m['note']}": None for m in numbers["methods"]}
    return [*lines, *(f"  {note}" for note in notes if not note.startswith("kfac_fx"))]


def count_table(numbers: Numbers, clock: str) -> list[str]:
    """Multiply-adds of our stages, and the share of the rate of matrix products reached."""
    lines = [f"{'':32}{'stage':>12}{'10^6 multiply-adds':>20}{'ms':>9}{'of GEMM rate':>14}"]
    for method in numbers["methods"]:
        for stage, amount in numbers["counts"].get(method["kind"], {}).items():
            if not method["ours"]:
                continue
            seconds = method["stages"][clock][stage] * method["sgd"][clock]
            share = amount / seconds / numbers["gemm"]
            lines.append(
                f"{method['name']:32}{stage:>12}{amount / 1e6:20,.0f}{1e3 * seconds:9.1f}"
                f"{share:14.0%}"
            )
    return lines


def on_gpu(numbers: Numbers) -> bool:
    return bool(numbers.get("device", "cpu") != "cpu")


def clocks_of(numbers: Numbers) -> list[str]:
    """What tables are by: processor time says nothing of a GPU, and not all of several threads."""
    if on_gpu(numbers):
        return ["wall"]
    return ["cpu", "wall"] if numbers["threads"] > 1 else ["cpu"]


def where(numbers: Numbers) -> str:
    """The device, or the threads of the CPU."""
    threads = numbers["threads"]
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    return str(numbers["device"]) if on_gpu(numbers) else cpu


def tables(numbers: Numbers) -> str:
    """All tables as text."""
    lines, clocks = [], clocks_of(numbers)
    for name, one in numbers["workloads"].items():
        lines.append(f"{name}: {one['title']}")
        lines.append(
            f"torch {numbers['torch']}, {where(numbers)}; float32 products: "
            f"{one['gemm'] / 1e9:,.1f} 10^9 multiply-adds/s"
        )
        for clock in clocks:
            kind = "processor" if clock == "cpu" else "wall"
            lines.append(f"\nIn steps of SGD, {kind} time. {LEGEND}")
            lines += stage_table(one, clock)
        lines += ["", *count_table(one, clocks[0]), ""]
        lines += [f"left out: {reason}" for reason in one["absent"]]
        lines.append("")
    return "\n".join(lines)


def picture(numbers: Numbers, path: Path) -> None:
    """A whole step of every method, by its parts, a panel a workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = [len(one["methods"]) + 1.5 for one in numbers["workloads"].values()]
    figure, axes = plt.subplots(
        len(counts),
        figsize=(9.5, 0.27 * sum(counts) + 1.2 * len(counts)),
        squeeze=False,
        height_ratios=counts,
        layout="constrained",
    )
    for axis, (name, one) in zip(axes[:, 0], numbers["workloads"].items(), strict=True):
        panel(axis, one["methods"], clocks_of(numbers)[0])
        axis.set_title(f"{name}: {one['title']}", fontsize=10, loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[part]) for part in COLORS]
    labels = ["forward, backward, SGD", "statistics", "refresh / 10", "apply"]
    labels.append("statistics and update in one (singd)")
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    kind = "wall" if on_gpu(numbers) else "processor"
    axes[-1, 0].set_xlabel(
        f"{kind} time of a step, in steps of SGD ({where(numbers)}; statistics and apply every "
        f"step, refresh every {PERIOD}th)",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def panel(axis: Any, methods: list[Numbers], clock: str) -> None:
    """Bars from the fastest to the slowest; ours are in bold."""
    ordered = sorted(methods, key=lambda method: step(method, clock))
    for row, method in enumerate(ordered):
        left = 0.0
        for part, length in parts(method, clock).items():
            axis.barh(row, length, left=left, color=COLORS[part], height=0.72)
            left += length
        axis.text(left, row, f" {left:.2f}", va="center", fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(ordered)), [m["name"] for m in ordered], fontsize=8)
    for label, method in zip(axis.get_yticklabels(), ordered, strict=True):
        label.set_fontweight("bold" if method["ours"] else "normal")
    axis.set_xlim(0, 1.08 * max(step(m, clock) for m in methods))
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
