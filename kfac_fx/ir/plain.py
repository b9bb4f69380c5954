"""Records (frozen dataclasses, named tuples) as plain values that JSON holds, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TypeAlias

from kfac_fx.errors import FormatError

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

_TYPE = "type"


class PlainCodec:
    """Writes records of known types as mappings that name their type, and reads them back.

    A mapping that happens to have a key "type" of its own is told from a record by the name under
    it, so records' names must not be used as values there.

    Args:
        records: the types that may occur; any other object is an error when it is written.
        renamed: names that older files use, and the types that they stand for today.
    """

    def __init__(self, records: Iterable[type], renamed: Mapping[str, type] | None = None) -> None:
        self._types = {record.__name__: record for record in records}
        self._names = {record: name for name, record in self._types.items()}
        self._types |= renamed or {}

    def write(self, value: object) -> Plain:
        """Return a value with records as mappings and tuples as lists.

        Raises:
            FormatError: an object inside is neither plain nor of a known type, as the options that
                a rule of the user's own gives to its tap may be.
        """
        # By the exact type: an object of a subclass would come back as its base.
        name = self._names.get(type(value))
        if name is not None:
            return {_TYPE: name} | {key: self.write(getattr(value, key)) for key in _keys(value)}
        if isinstance(value, tuple):
            return [self.write(item) for item in value]
        if isinstance(value, Mapping):
            return {key: self.write(item) for key, item in value.items()}
        # Subclasses of int and str (symbolic sizes, enums) would come back as something else.
        if value is None or type(value) in (str, int, float, bool):
            return value  # type: ignore[return-value]  # mypy does not narrow by `type(x) in`
        raise FormatError(f"a curvature graph with {value!r} cannot be written as plain values")

    def read(self, value: object) -> object:
        """Return what ``write`` was given: records, and tuples in place of lists."""
        if isinstance(value, (list, tuple)):
            return tuple(self.read(item) for item in value)
        if not isinstance(value, Mapping):
            return value
        content = {key: self.read(item) for key, item in value.items() if key != _TYPE}
        name = value.get(_TYPE)
        if isinstance(name, str) and name in self._types:
            return self._types[name](**content)
        return content if name is None else content | {_TYPE: self.read(name)}


def _keys(record: object) -> tuple[str, ...]:
    """Return the names of a record's fields."""
    if is_dataclass(record):
        return tuple(field.name for field in fields(record))
    names: tuple[str, ...] = getattr(record, "_fields")  # noqa: B009  # of a named tuple
    return names
