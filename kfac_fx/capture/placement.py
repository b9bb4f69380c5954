"""Where taps go in a running model, and who knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, fx

from kfac_fx.capture.view import GraphView
from kfac_fx.ir import Tap


class Placement(NamedTuple):
    """A tap of a call that is about to run.

    Attributes:
        tap: says which tensor is tapped.
        record: from that tensor, and all tensors of the call by node, to the tensor in its place.
        parameters: whose use is recorded.
        factors: what an operator that runs instead of the call is to fill.
    """

    tap: Tap
    record: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    parameters: tuple[str, ...]
    factors: Sequence[Tensor] = ()


class Taps(Protocol):
    """Knows the taps of the calls that read parameters.

    Attributes:
        computed: parameters that are recorded where a weight computed from them is used.
    """

    computed: frozenset[str]

    def place(self, view: GraphView, node: fx.Node) -> Sequence[Placement]:
        """Those of a call that is about to run."""

    def instead(self, plans: Sequence[Placement], values: Mapping[str, Tensor]) -> Any:
        """Runs the operator that takes the place of a call with such taps."""

    def missed(self, names: set[str], node: fx.Node) -> None:
        """Notes parameters that a call uses and no tap records."""
