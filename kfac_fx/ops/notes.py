"""Taps of a pass whose backward is asked for statistics alone: they are noted, without nodes.

A noted tap leaves an edge of the graph and what it has seen of the forward. All derivatives then
come from one call of ``torch.autograd.grad``, and statistics are formed behind it, in the order of
the forward. That is cheaper than a call back into Python at each tap, and keeps all derivatives
until the end; so only small tensors are noted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from kfac_fx.errors import ObservationError
from kfac_fx.ops.modes import forward_mode, saved_elsewhere, traced

SMALL = 2**18
"""Entries of a tensor whose derivative may wait for the others."""


class Note(NamedTuple):
    """A tap that was passed.

    Attributes:
        versions: of the tensors, when they were seen.
        edge: where the derivative arrives.
        guard: the hook that sees derivatives inside of the forward.
    """

    statistics: Any
    tensors: list[Tensor | None]
    versions: list[int]
    factors: Sequence[Tensor]
    edge: GradientEdge
    guard: RemovableHandle

    def seen(self) -> list[Tensor | None]:
        """The tensors.

        Raises:
            ObservationError: the model has changed one in place since.
        """
        if self.versions != _versions(self.tensors):
            raise ObservationError(
                "what a layer has read was changed by an in-place operation afterwards, so its "
                "statistics cannot be formed: use the operation out of place"
            )
        return self.tensors


def noted(
    notes: list[Note],
    y: Tensor,
    statistics: Any,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    hand_on: Callable[[Tensor], Tensor],
) -> Tensor:
    """y, noted.

    Args:
        hand_on: what derivatives of y inside of the forward go through.
    """
    alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # what follows may write into it
    held = [None if t is None else t.detach() for t in tensors]
    edge = get_gradient_edge(alias)
    guard = edge.node.register_prehook(
        lambda found: tuple(None if g is None else hand_on(g) for g in found)
    )
    notes.append(Note(statistics, held, _versions(held), factors, edge, guard))
    return alias


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t._version for t in tensors]


class _Open(threading.local):
    notes: list[Note] | None = None
    factors: frozenset[int] = frozenset()


_open = _Open()


@contextmanager
def noting(factors: Iterable[Tensor]) -> Iterator[list[Note]]:
    """Small taps inside that record into these factors are appended to the list.

    The others record as ever. A note takes nothing that happens behind the context for its own.
    """
    notes: list[Note] = []
    before = _open.notes, _open.factors
    _open.notes, _open.factors = notes, frozenset(map(id, factors))
    try:
        yield notes
    finally:
        _open.notes, _open.factors = before
        for note in notes:
            note.guard.remove()


def open_notes(y: Tensor, factors: Sequence[Tensor]) -> list[Note] | None:
    """Where the tap of y is noted, if it is."""
    notes = _open.notes
    if notes is None or not _open.factors.issuperset(map(id, factors)):
        return None
    small = y.numel() <= SMALL and y.requires_grad and torch.is_grad_enabled()
    return notes if small and not (traced() or forward_mode() or saved_elsewhere()) else None
