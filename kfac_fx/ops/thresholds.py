"""Sizes at which taps change how they work; statistics are the same on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Thresholds:
    """The sizes, for the whole process.

    Attributes:
        noted: entries of a tensor whose derivative may wait for the others (``ops/state.py``). All
            that wait are alive at once, so larger ones would cost memory for nothing: what noting
            saves is a call back into Python for each tap, whatever its size.
        slab: features of a slab of few rows, for each thread (``Rows``): narrower ones multiply
            slowly.
        at_once: entries that are read at once on a CPU (``ops/parts.py``): copies of more may be
            fresh memory each time, and first touches of its pages take longer than what is done
            with them.
    """

    noted: int = 2**18
    slab: int = 128
    at_once: int = 2**19

    @contextmanager
    def changed(self, **sizes: int) -> Iterator[None]:
        """Take other sizes inside, by name: for tests of both sides of a threshold."""
        before = {name: getattr(self, name) for name in sizes}
        vars(self).update(sizes)
        try:
            yield
        finally:
            vars(self).update(before)


THRESHOLDS = Thresholds()
