"""Curvature graphs as JSON and back, equal to what they were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import networkx as nx

from kfac_fx import ir
from kfac_fx.errors import FormatError
from kfac_fx.ir.layout import Step
from kfac_fx.viz.networks import to_networkx

FORMAT = "kfac_fx.CurvatureGraph"
VERSION = 1
_RECORDS: dict[str, Any] = {
    record.__name__: record
    for record in (
        ir.CurvatureGraph,
        ir.CurvatureBlock,
        ir.Coupling,
        ir.Edge,
        ir.FactorSpec,
        ir.Layout,
        ir.Moment,
        ir.NodeRef,
        ir.Pair,
        ir.ParameterUse,
        ir.Scale,
        ir.Tap,
        Step,
    )
}
_TYPE = "type"


def to_json(curvature: ir.CurvatureGraph) -> str:
    """The whole graph, and under "graph" the same blocks and dependencies as networkx writes them.

    Raises:
        FormatError: a rule of one's own put an object into a tap's options that JSON cannot hold.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "curvature": _plain(curvature),
        "graph": nx.node_link_data(to_networkx(curvature), edges="edges"),
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def from_json(text: str) -> ir.CurvatureGraph:
    """The inverse of ``to_json``.

    Raises:
        FormatError: the text is no curvature graph of this version.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise FormatError(f"this is no {FORMAT} of version {VERSION}")
        found = _record(content["curvature"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FormatError(f"this is no JSON of a curvature graph ({error!r})") from error
    if not isinstance(found, ir.CurvatureGraph):
        raise FormatError("this is no JSON of a curvature graph")
    return found


def load(path: str | Path) -> ir.CurvatureGraph:
    """A curvature graph from a file that ``save("....json")`` wrote.

    Raises:
        FormatError: the file holds something else.
    """
    return from_json(Path(path).read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """Records as objects with their type's name, tuples as arrays."""
    name = type(value).__name__
    if _RECORDS.get(name) is type(value):
        keys = getattr(value, "_fields", None) or [field.name for field in fields(value)]
        return {_TYPE: name} | {key: _plain(getattr(value, key)) for key in keys}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise FormatError(f"a curvature graph with {value!r} cannot be written as JSON")


def _record(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_record(item) for item in value)
    if not isinstance(value, dict):
        return value
    content = {key: _record(item) for key, item in value.items() if key != _TYPE}
    # A mapping may have a key "type": only a record has one that names a record.
    name = value.get(_TYPE)
    if isinstance(name, str) and name in _RECORDS:
        return _RECORDS[name](**content)
    return content if name is None else content | {_TYPE: _record(name)}
