"""Names of the options and the sizes at which an approximation changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kfac_fx.errors import UnknownOptionError

STRUCTURES: Final = ("block_diagonal", "block_tridiagonal")
COUPLINGS: Final = ("topology", "data")
FISHERS: Final = ("sampled", "exact", "empirical")
TIKHONOV: Final = ("factored", "exact", "ekfac")
FACTOR_STORAGES: Final = ("bfloat16", "host")
WEIGHT_SHARING: Final = ("expand", "reduce")
LARGE_FACTORS: Final = ("diagonal", "blocks")
CAPTURES: Final = ("auto", "symbolic_trace", "export", "eager")

MAX_FACTOR_DIM: Final = 8192
"""Default of the largest side of a Kronecker factor that is kept as a matrix."""

MAX_FULL_DIM: Final = 1024
"""Largest side of a full covariance block; above it the block becomes 2x2 blocks or a diagonal."""


def choice(option: str, value: str, valid: Iterable[str]) -> str:
    """``value`` if it is valid.

    Raises:
        UnknownOptionError: it is not; the message lists the valid ones.
    """
    valid = tuple(valid)
    if value not in valid:
        names = ", ".join(repr(name) for name in valid)
        raise UnknownOptionError(f"{option}={value!r} is unknown; valid are {names}")
    return value


def period(option: str, value: int) -> int:
    """``value`` if it is a whole number of at least 1; else UnknownOptionError."""
    if not isinstance(value, int) or value < 1:
        raise UnknownOptionError(f"{option} must be an integer of at least 1, got {value!r}")
    return value


def within(option: str, value: float, low: float, high: float) -> float:
    """``value`` if it lies in [low, high); else UnknownOptionError."""
    if not low <= value < high:
        raise UnknownOptionError(f"{option} must lie in [{low}, {high}), got {value!r}")
    return value


def share(option: str, value: float) -> float:
    """``value`` if it lies in (0, 1]; else UnknownOptionError."""
    if not 0 < value <= 1:
        raise UnknownOptionError(f"{option} must lie in (0, 1], got {value!r}")
    return value
