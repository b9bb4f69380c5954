"""The table of the zoo: python tests/zoo/table.py [names or globs...] [--json FILE]."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from collection import entries
from harness import LEAST, LIMIT, Entry, Row, check_isolated, row_of

HEAD = (
    "architecture",
    "route",
    "transform s",
    "total s",
    "nodes",
    "parameters",
    "covered %",
    "diagonal %",
    "generic %",
    "unused %",
    "outputs",
    "gradients",
    "result",
    "blocks",
)
NOTES = ("warning", "batch", "evaluation", "structure", "count")


HOW = f"""\
Tiny configurations with random weights, torch {torch.__version__}, one thread: python table.py
--short table.txt. "covered" is the share of the trained elements whose block is more than a
diagonal. "ok": outputs, gradients and buffers are those of the model, outputs in evaluation and for
another batch size too, and a step of the default Preconditioner has statistics for every parameter
with a gradient. "warning": it logged parts that the likelihood does not reach, or
factors that float32 could not factorise; "batch": only the batch size of the example inputs."""


def selected(patterns: Sequence[str]) -> list[Entry]:
    """Entries whose name, or the part after the slash, matches one of the globs."""
    return [
        e
        for e in entries()
        if not patterns
        or any(fnmatchcase(e.name, p) or fnmatchcase(e.name.split("/")[1], p) for p in patterns)
    ]


def line(row: Row) -> tuple[str, ...]:
    def share(kind: str) -> str:
        return f"{100 * row.approximations.get(kind, 0) / max(row.elements, 1):.2f}"

    result = ", ".join(row.errors) or ("ok" if not row.notes else "ok; " + ", ".join(row.notes))
    blocks = " ".join(f"{kind}:{count}" for kind, count in sorted(row.blocks.items()))
    return (
        row.name,
        row.route or "-",
        f"{row.seconds:.2f}",
        f"{row.total_seconds:.1f}",
        str(row.nodes),
        f"{row.elements:,}",
        f"{row.coverage:.2f}" if row.route else "-",
        share("elementwise"),
        share("generic"),
        share("unused"),
        f"{row.output_error:.0e}",
        f"{row.gradient_error:.0e}",
        result,
        blocks,
    )


def table(rows: Iterable[Row]) -> str:
    """All rows, aligned."""
    lines = [HEAD, *(line(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(HEAD))]
    text = [
        "  ".join(
            cell.rjust(width) if 2 <= i <= 11 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def short(rows: Sequence[Row]) -> str:
    """What tests/zoo/table.txt keeps of a run: route, time, blocks and coverage, and totals."""
    head = ("architecture", "route", "seconds", "covered %", "result", "blocks")
    cells = [line(row) for row in rows]
    lines = [head, *((c[0], c[1], c[2], c[6], c[12], c[13]) for c in cells)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(head))]
    text = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in lines]
    return "\n".join([HOW, "", *summary(rows), "", *(row.rstrip() for row in text), ""])


def summary(rows: Sequence[Row]) -> list[str]:
    """How many models came through, what is covered, and how long it took."""
    ran = [row for row in rows if row.route]
    totals: dict[str, int] = defaultdict(int)
    for row in ran:
        for kind, count in row.approximations.items():
            totals[kind] += count
    elements = sum(row.elements for row in ran)
    trained, covered = sum(row.trained for row in ran), sum(row.covered for row in ran)
    seconds = sorted(row.seconds for row in ran) or [0.0]
    broken = [row for row in rows if "build" in row.errors or "original" in row.errors]
    routes = Counter(row.route for row in ran)
    return [
        f"{len(rows)} models: {len(ran)} transformed, {sum(not r.errors for r in rows)} without "
        f"any failure; {len(broken)} that the zoo itself cannot build or run.",
        f"coverage of {trained:,} trained elements: {100 * covered / max(trained, 1):.2f} %; "
        f"mean over models {sum(r.coverage for r in ran) / max(len(ran), 1):.2f} %; "
        f"{sum(r.coverage >= LEAST for r in ran)} models at {LEAST:g} % or more",
        "elements: "
        + ", ".join(
            f"{kind} {count:,} ({100 * count / max(elements, 1):.2f} %)"
            for kind, count in sorted(totals.items(), key=lambda item: -item[1])
        ),
        "routes: " + ", ".join(f"{route} {count}" for route, count in routes.most_common()),
        f"seconds to transform: median {seconds[len(seconds) // 2]:.2f}, largest {seconds[-1]:.2f}",
    ]


def _pattern(text: str, names: str = "") -> str:
    """A reason or an exception without names and numbers, so that equal ones meet."""
    for name in names.split(", "):
        text = text.replace(name or "\0", "<parameter>")
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    text = re.sub(r"\b[\w]+(\.[\w]+)*\.(weight|bias)\b", "<parameter>", text)
    text = re.sub(r"\b[a-z]\w*_\d+\b", "<node>", text)
    return re.sub(r"\d+", "#", text)


def grouped(found: Iterable[tuple[str, str, int, str]], limit: int = 5) -> str:
    """(reason, model, elements, parameter) by reason, the largest first."""
    groups: dict[str, list[tuple[str, str, int, str]]] = defaultdict(list)
    for item in found:
        groups[_pattern(item[0], item[3])].append(item)
    lines = []
    for items in sorted(groups.values(), key=lambda items: -sum(item[2] for item in items)):
        models = list(dict.fromkeys(item[1] for item in items))
        size = sum(item[2] for item in items)
        lines.append(
            f"- {size:,} elements, {len(items)} blocks, {len(models)} models: {items[0][0]}"
        )
        shown = ", ".join(models[:limit]) + (" ..." if len(models) > limit else "")
        lines.append(f"    {shown}; for instance {items[0][3]} ({items[0][2]:,})")
    return "\n".join(lines) or "none"


def failures(rows: Iterable[Row], stages: Sequence[str], *, notes: bool = False) -> str:
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        for stage, text in (row.notes if notes else row.errors).items():
            if stage in stages:
                groups[_pattern(text)].append((row.name, f"{stage}: {text}"))
    lines = []
    for items in sorted(groups.values(), key=len, reverse=True):
        lines.append(f"- {len(items)} x {items[0][1]}")
        lines.append("    " + ", ".join(name for name, _ in items))
    return "\n".join(lines) or "none"


def report(rows: Sequence[Row]) -> str:
    """Totals, failures by stage, and the reasons of what is not covered."""
    ran = [row for row in rows if row.route]
    below = sorted((row for row in ran if row.coverage < LEAST), key=lambda row: row.coverage)
    low = ", ".join(f"{row.name} {row.coverage:.1f}" for row in below)
    parts = [
        "## Summary",
        *summary(rows),
        "",
        "## 0. The zoo's own: models that cannot be built or run",
        failures(rows, ("build", "original", "harness")),
        "",
        "## 1. transform fails (or the process dies, or time runs out)",
        failures(rows, ("transform", "timeout", "crash")),
        "",
        "## 2. Outputs, gradients or buffers differ",
        failures(rows, ("equality",)),
        "",
        "## 3. The step of Preconditioner fails",
        failures(rows, ("step",)),
        "",
        "## 4. Generic blocks by reason",
        grouped(
            (reason, row.name, size, name) for row in ran for name, size, reason in row.generic
        ),
        "",
        "## 5. Blocks weaker than their kind allows, not generic",
        grouped((reason, row.name, size, name) for row in ran for name, size, reason in row.weaker),
        "",
        "## 6. Notes: warnings, another batch size, evaluation mode, structure of the outputs",
        failures(rows, NOTES, notes=True),
        "",
        "## 7. Called unused though the original gives them a gradient",
        "\n".join(
            f"- {row.name}: {row.approximations['missed']:,} elements, " + ", ".join(row.missed)
            for row in ran
            if row.missed
        )
        or "none",
        "",
        f"## 8. Below {LEAST:g} %: {len(below)} models",
        low or "none",
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names or globs; none for all")
    parser.add_argument(
        "--json", type=Path, help="where the rows go; with --merge, also from where"
    )
    parser.add_argument("--short", type=Path, help="where the short table goes")
    parser.add_argument("--merge", action="store_true", help="keep the other rows of the JSON file")
    parser.add_argument("--print", action="store_true", help="only print what the JSON file holds")
    parser.add_argument(
        "--failed",
        action="store_true",
        help="only those of the JSON file that failed or fall short",
    )
    parser.add_argument("--double", action="store_true", help="in float64, to 1e-9")
    parser.add_argument("--no-step", action="store_true", help="leave the Preconditioner out")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[str, Row] = {}
    if (
        options.json
        and options.json.exists()
        and (options.merge or options.print or options.failed)
    ):
        rows = {r["name"]: row_of(r) for r in json.loads(options.json.read_text())}
    if not options.print:
        for entry in selected(options.names):
            old = rows.get(entry.name)
            if options.failed and old is not None and old.passed and old.coverage >= LEAST:
                continue
            row = check_isolated(
                entry, step=not options.no_step, double=options.double, limit=options.limit
            )
            rows[row.name] = row
            cells = line(row)
            print(
                f"{cells[0]}: {cells[12]}, {cells[6]} %, {cells[3]} s", file=sys.stderr, flush=True
            )
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in rows.values()], indent=1))
    if options.short:
        options.short.write_text(short(list(rows.values())))
    print(table(rows.values()))
    print()
    print(report(list(rows.values())))


if __name__ == "__main__":
    main()
