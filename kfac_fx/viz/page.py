"""One HTML file with the picture and the facts of every block; it loads nothing else.

It can be sent by mail or kept beside a run: scripts and styles are in page.html, the template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kfac_fx.ir import CurvatureGraph
from kfac_fx.reading.report import BlockReport, CurvatureReport
from kfac_fx.viz.facts import Json, block_facts
from kfac_fx.viz.picture import Picture

_TEMPLATE = Path(__file__).with_name("page.html")


def page(
    curvature: CurvatureGraph,
    report: CurvatureReport | None,
    pictures: Sequence[Picture],
    drawings: Sequence[str],
) -> str:
    """Return the page's text.

    Args:
        curvature: gives the facts of blocks and the lines between them.
        report: adds statistics; None where there is no preconditioner.
        pictures: one or two, the folded one first.
        drawings: the pictures as SVG.
    """
    statistics: dict[str, dict[str, Json]] = {}
    if report is not None:
        statistics = {name: _statistics(block) for name, block in report.blocks.items()}
        for (child, parent), found in report.couplings.items():
            statistics[child]["coupling: canonical correlations"] = {
                "parent": parent,
                "strength": found.strength,
                "A": _row(found.A),
                "G": _row(found.G),
                "mutual information, nats": found.mutual_information,
            }
    blocks = curvature.blocks.values()
    content = {
        "title": ", ".join(pictures[0].caption[:1]),
        "totals": [
            [kind, f"{number:,} parameters"] for kind, number in curvature.coverage.scalars.items()
        ],
        "blocks": {block.name: block_facts(curvature, block) for block in blocks},
        "edges": [
            {"source": edge.source, "target": edge.target, "weight": edge.weight}
            for edge in curvature.edges
        ],
        "shown": [shown.tree.shown for shown in pictures],
        "statistics": statistics,
    }
    # A browser ends a script at the next "</script>", even inside of a string: a block's name or a
    # file's path could hold one.
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    # What Graphviz writes before <svg> (the XML declaration) has no place inside of HTML.
    sheets = "\n".join(f"<div>{drawing[drawing.index('<svg') :]}</div>" for drawing in drawings)
    text = _TEMPLATE.read_text(encoding="utf-8")
    head, rest = text.split("@DRAWINGS@")
    middle, tail = rest.split("@DATA@")
    return "".join((head, sheets, middle, data, tail))


def _statistics(block: BlockReport) -> dict[str, Json]:
    """Return the tables of a block: of all of it, and of each factor; by title."""
    if not block.recorded:
        return {"statistics": {"recorded": 0}}
    general: dict[str, Json] = {"recorded": block.recorded, "pi": _row(block.pi)}
    if block.damping is not None:
        general["damping"] = block.damping
    if block.condition is not None:
        general["condition, damped"] = block.condition
    factors: dict[str, Json] = {}
    for factor in block.factors:
        rows = {key.replace("_", " "): value for key, value in asdict(factor).items()}
        factors[f"factor {rows.pop('name')}"] = rows
    return {"statistics": {k: v for k, v in general.items() if v != ""}} | factors


def _row(numbers: Sequence[float]) -> str:
    """Return the first numbers as text: groups and blocks may have hundreds."""
    return ", ".join(f"{number:.4g}" for number in numbers[:8])
