"""Comparisons of tensors and of named groups of tensors; the tolerance stands in the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Group = Tensor | Sequence[Tensor] | None
"""What stands under one name: a tensor, several in an order, or nothing."""


def assert_near(got: Tensor, want: Tensor, rtol: float = 1e-8) -> None:
    """Equal up to `rtol` of each entry, and of the largest entry where entries are small."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())


def assert_same(
    got: Mapping[object, Group],
    want: Mapping[object, Group],
    rtol: float,
    atol: float,
    nonzero: bool = False,
) -> None:
    """The same names, and equal tensors under each of them.

    Args:
        nonzero: No wanted tensor may be zero everywhere: an equality of zeros would say nothing.
    """
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        for one, other in zip(_tensors(got[name]), _tensors(value), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=_headed(name))
            assert not nonzero or float(other.abs().max()) > 0, name


def _headed(name: object) -> Callable[[str], str]:
    """Torch's own message with the name before it."""
    return lambda message: f"{name}: {message}"


def _tensors(value: Group) -> Sequence[Tensor]:
    assert value is not None
    return (value,) if isinstance(value, Tensor) else value
