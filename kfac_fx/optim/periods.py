"""When statistics and refreshes are due: counted in steps, not by a clock, so that runs repeat."""

from __future__ import annotations

from typing import NamedTuple

from kfac_fx.config import period


class Usual(NamedTuple):
    """A period that the library chose, which begins with shorter ones.

    Attributes:
        early: steps, counted from 0, in which something is due besides.
        every: the period.
    """

    early: frozenset[int]
    every: int


# The averages are of one batch at first, then of two, of four: an inverse of the first, kept for a
# whole period, makes long steps in all directions that this batch did not show.
REFRESHES = Usual(frozenset((1, 2, 4, 8, 16)), 20)

# Averages of many batches move little by one more, which costs as much as a step without any.
STATISTICS = Usual(frozenset(range(20)), 3)


def checked(option: str, value: int | None) -> int | None:
    """Return a period that the user gave, or None for ours; else raise UnknownOptionError."""
    return None if value is None else period(option, value)


def is_due(step: int, given: int | None, usual: Usual) -> bool:
    """Say whether something is due.

    Args:
        step: counted from 0.
        given: the user's period, which is kept to from the first step on; None for ours.
        usual: ours.
    """
    if given is not None:
        return step % given == 0
    return step % usual.every == 0 or step in usual.early
