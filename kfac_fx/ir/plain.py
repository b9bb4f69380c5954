"""The records of the analysis as plain values (dict, list, str, numbers) and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kfac_fx.errors import FormatError
from kfac_fx.ir.coupling import Coupling, Edge, Pair
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.ir.layout import Layout, Step
from kfac_fx.ir.moment import Moment
from kfac_fx.ir.use import FactorSpec, NodeRef, ParameterUse, Scale, Tap

_RECORDS: dict[str, Any] = {
    record.__name__: record
    for record in (
        *(CurvatureGraph, CurvatureBlock, Coupling, Edge, FactorSpec, Layout, Moment, NodeRef),
        *(Pair, ParameterUse, Scale, Step, Tap),
    )
}
_TYPE = "type"


def to_plain(value: Any) -> Any:
    """Records as mappings with their type's name, tuples as lists.

    Raises:
        FormatError: a rule of one's own put an object into a tap's options that is no plain value.
    """
    name = type(value).__name__
    if _RECORDS.get(name) is type(value):
        keys = getattr(value, "_fields", None) or [field.name for field in fields(value)]
        return {_TYPE: name} | {key: to_plain(getattr(value, key)) for key in keys}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise FormatError(f"a curvature graph with {value!r} cannot be written as plain values")


def from_plain(value: Any) -> Any:
    """The inverse of ``to_plain``."""
    if isinstance(value, (list, tuple)):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    content = {key: from_plain(item) for key, item in value.items() if key != _TYPE}
    # A mapping may have a key "type": only a record has one that names a record.
    name = value.get(_TYPE)
    if isinstance(name, str) and name in _RECORDS:
        return _RECORDS[name](**content)
    return content if name is None else content | {_TYPE: from_plain(name)}
