"""What is compared of a model, and where it differs from what was captured."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Says whose a watched container is.

    Attributes:
        module: path of the module; "" for the model itself.
        name: of the attribute that holds it; "" for the module's own dictionary.
    """

    module: str
    name: str = ""

    def __str__(self) -> str:
        return ".".join(part for part in (self.module, self.name) if part) or "the model"


class Change(NamedTuple):
    """One entry that differs from what was captured.

    Attributes:
        place: the container.
        key: the entry of it.
        words: says it to the user.
    """

    place: Place
    key: str
    words: str
