"""How a curvature graph is shown is decided above this floor; what decides it registers here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kfac_fx.ir.curvature_graph import CurvatureGraph


class Face(Protocol):
    """Shows curvature graphs; see the methods of ``CurvatureGraph`` of the same names."""

    def to_networkx(self, curvature: CurvatureGraph) -> Any:
        """As a networkx graph."""

    def to_pydot(
        self, curvature: CurvatureGraph, preconditioner: Any, *, fold: bool, direction: str
    ) -> Any:
        """As a pydot graph."""

    def save(
        self,
        curvature: CurvatureGraph,
        path: str | Path,
        preconditioner: Any,
        *,
        fold: bool,
        direction: str,
    ) -> None:
        """As a file."""


_faces: list[Face] = []


def register(face: Face) -> None:
    """Makes ``face`` the one that is used."""
    _faces[:] = [face]


def face() -> Face:
    """The registered face; importing ``kfac_fx`` registers one."""
    return _faces[0]
