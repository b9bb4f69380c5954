"""Options of tap operators: one frozen dataclass an operator, and its ways to arguments and text.

The rule that writes a tap, the operator that reads it and the coupling that compares two of them
use the same class. torch's operator schemas know no records, so what a graph holds are the values
in the order of the fields (``to_args``), or one string where an operator takes the options of other
operators (``to_text``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

Flag: TypeAlias = bool | tuple[str]
"""A bool, or the name of one (``kfac_fx.ir.use.NodeRef``) that is read when the graph runs."""

Option: TypeAlias = bool | int | float | str | tuple[int, ...] | tuple[str]

_Options = TypeVar("_Options", bound="TapOptions")

# By class and values; as many as there are kinds of layers in the process.
_known: dict[tuple[type, tuple[object, ...]], object] = {}

_SCHEMAS: dict[object, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    tuple[int, ...]: "int[]",
    Flag: "bool",
}


@dataclass(frozen=True)
class TapOptions:
    """Base of the options of a tap operator; the fields of a subclass are its options, in order.

    A field is a bool, int, float, str, ``tuple[int, ...]``, a Literal of strings or a ``Flag``.
    """

    @classmethod
    def schema(cls) -> str:
        """Return the options as torch's operator schemas declare them: "int[] dims, bool bias"."""
        # Annotations are strings here: each is looked up in the file of its class.
        hints = get_type_hints(cls)
        return ", ".join(f"{_schema(hints[entry.name])} {entry.name}" for entry in fields(cls))

    def to_args(self) -> tuple[Option, ...]:
        """Return the values in the order of the schema."""
        return tuple(getattr(self, entry.name) for entry in fields(self))

    @classmethod
    def from_args(cls: type[_Options], args: Sequence[object]) -> _Options:
        """Return the options that an operator was called with; its lists become tuples.

        Raises:
            TypeError: there are more or fewer values than options.
        """
        values = tuple([tuple(arg) if isinstance(arg, list) else arg for arg in args])
        # A tap is called with the same values in every forward.
        try:
            known = _known.get((cls, values))
        except TypeError:  # symbolic sizes cannot be looked up, and must not be kept
            return cls(*values)
        if known is None:
            known = _known[cls, values] = cls(*values)
        assert isinstance(known, cls)
        return known

    def to_text(self) -> str:
        """Return the options as one string."""
        # By position, like the arguments: one order of the fields serves both.
        return json.dumps(self.to_args())

    @classmethod
    def from_text(cls: type[_Options], text: str) -> _Options:
        """Return the options that ``to_text`` wrote."""
        return cls.from_args(json.loads(text))


def _schema(hint: object) -> str:
    """Return the type of a field in the language of operator schemas."""
    if get_origin(hint) is Literal and all(isinstance(value, str) for value in get_args(hint)):
        return "str"
    return _SCHEMAS[hint]
