"""The options' valid values as types, their checks, and the sizes at which blocks change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeVar, get_args

from kfac_fx.errors import UnknownOptionError

# Each option is written once, as a type that mypy checks in every signature; the tuple that error
# messages and the command line show is read off the type, so the two cannot differ.
Structure = Literal["block_diagonal", "block_tridiagonal"]
Couplings = Literal["topology", "data"]
Fisher = Literal["sampled", "exact", "empirical"]
Tikhonov = Literal["factored", "exact", "ekfac"]
FactorStorage = Literal["bfloat16", "host"]
WeightSharing = Literal["expand", "reduce"]
LargeFactors = Literal["diagonal", "blocks"]
Capture = Literal["auto", "symbolic_trace", "export", "eager"]
FlowDirection = Literal["TB", "LR"]
"""Where the forward pass goes in a picture, as Graphviz has it: downwards, or to the right."""

STRUCTURES: Final = get_args(Structure)
COUPLINGS: Final = get_args(Couplings)
FISHERS: Final = get_args(Fisher)
TIKHONOV: Final = get_args(Tikhonov)
FACTOR_STORAGES: Final = get_args(FactorStorage)
WEIGHT_SHARING: Final = get_args(WeightSharing)
LARGE_FACTORS: Final = get_args(LargeFactors)
CAPTURES: Final = get_args(Capture)
FLOW_DIRECTIONS: Final = get_args(FlowDirection)

MAX_FACTOR_DIM: Final = 8192
"""Largest side of a Kronecker factor that is not a diagonal, unless a limit is given."""

MAX_WHOLE_DIM: Final = 1280
"""Largest side that is whole where it could be cut, unless a limit is given.

Networks of 1,024 channels or inputs, and convolutions of 128 channels and 3x3 taps, lie below it.
"""

SUB_BLOCK_DIM: Final = 640
"""Largest sub-block of a longer side, unless a limit is given.

A refresh costs the side times the square of this: at 8,192 as much as a whole side of 1,500. In
equal time 512 and 768 train about as well; 1,024 makes a fifth to a third fewer steps.
"""


class SideLimits(NamedTuple):
    """The sizes at which the form of a Kronecker factor changes.

    Attributes:
        whole: the largest side that is whole where it could be cut.
        sub_block: the largest sub-block of those that are cut.
        matrix: the largest side of all others that is a matrix; longer ones are diagonals.
    """

    whole: int = MAX_WHOLE_DIM
    sub_block: int = SUB_BLOCK_DIM
    matrix: int = MAX_FACTOR_DIM


DEFAULT_LIMITS: Final = SideLimits()

MAX_FULL_DIM: Final = 1024
"""Largest side of a full covariance block; above it the block becomes 2x2 blocks or a diagonal."""

Option = TypeVar("Option", bound=str)


@dataclass(frozen=True)
class CurvatureOptions:
    """Options of the inverse of the approximate Fisher; ``Preconditioner`` and ``KFAC`` fill it.

    Both optimizers hand these four on unchanged, and only curvature/ reads them. As one value they
    cannot be passed in another order, and a new one does not run through every signature.

    Args:
        structure: "block_tridiagonal" records and uses the couplings, "block_diagonal" leaves them
            out. Here it is never None: the module's own structure is filled in before.
        tikhonov: how Kronecker blocks are damped (docs/explanation/mathematics.md, section 5).
        factor_storage: how running averages are kept between folds; None as they are computed.
        compile: whether the generated program runs through torch.compile; a name is that of a
            backend of torch.compile.

    Raises:
        UnknownOptionError: a value is none of the valid ones.
    """

    structure: Structure
    tikhonov: Tikhonov = "factored"
    factor_storage: FactorStorage | None = None
    compile: bool | str = False

    def __post_init__(self) -> None:
        choice("structure", self.structure, STRUCTURES)
        choice("tikhonov", self.tikhonov, TIKHONOV)
        if self.factor_storage is not None:
            choice("factor_storage", self.factor_storage, FACTOR_STORAGES)


def choice(option: str, value: Option, valid: Iterable[str]) -> Option:
    """Return ``value`` if it is among the valid ones.

    The type is not enough: most callers are not checked by mypy, and a misspelt option that is
    taken for "anything else" would train with another approximation and say nothing.

    Args:
        option: name of the option, for the message.
        value: what was given.
        valid: what may be given; the message lists it.

    Raises:
        UnknownOptionError: it is not; the message lists the valid ones.
    """
    valid = tuple(valid)  # it is gone through twice
    if value not in valid:
        names = ", ".join(repr(name) for name in valid)
        raise UnknownOptionError(f"{option}={value!r} is unknown; valid are {names}")
    return value


def period(option: str, value: int) -> int:
    """Return ``value`` if it is a whole number of at least 1; else raise UnknownOptionError."""
    if not isinstance(value, int) or value < 1:
        raise UnknownOptionError(f"{option} must be an integer of at least 1, got {value!r}")
    return value


def period_or_ours(option: str, value: int | None) -> int | None:
    """Return a period that the user gave, or None for the library's own; see ``period``."""
    return None if value is None else period(option, value)


def within(option: str, value: float, low: float, high: float) -> float:
    """Return ``value`` if it lies in [low, high); else raise UnknownOptionError."""
    if not low <= value < high:
        raise UnknownOptionError(f"{option} must lie in [{low}, {high}), got {value!r}")
    return value


def share(option: str, value: float) -> float:
    """Return ``value`` if it lies in (0, 1]; else raise UnknownOptionError."""
    if not 0 < value <= 1:
        raise UnknownOptionError(f"{option} must lie in (0, 1], got {value!r}")
    return value


def positive(option: str, value: float | None) -> float | None:
    """Return ``value`` if it is above zero or None; else raise UnknownOptionError."""
    if value is not None and not value > 0:
        raise UnknownOptionError(f"{option} must be positive or None, got {value}")
    return value
