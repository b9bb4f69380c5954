"""What symbolic values and the contexts around them ask of the tracer that records them."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

from torch import Tensor, fx

from kfac_fx.capture.mode_regions import Regions
from kfac_fx.capture.value_kinds import Kind

Value = Any
"""What fx hands to a tracer: a proxy, a tensor, or any argument of the user's."""


class Recording(Protocol):
    """A tracer, as its values see it.

    Attributes:
        regions: where the model switches modes.
        missed: attributes that the code has asked tensors for, and that these do not have.
    """

    regions: Regions
    missed: set[str]

    def refuse(self, reason: str) -> NoReturn:
        """Stop the trace for a reason."""

    def known(self, value: Value) -> Kind:
        """Return the class of a node's value, None where it is not certain."""

    def kind(self, node: fx.Node) -> Kind:
        """Return the class of a node's value, perhaps by an assumption that the graph checks."""

    def create_proxy(
        self, kind: str, target: Value, args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> fx.Proxy:
        """Return the proxy of a new node."""

    def call(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value]) -> fx.Proxy:
        """Return the proxy of a call of a torch function."""

    def is_member(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer of the model."""

    def member(self, tensor: Tensor) -> fx.Proxy:
        """Return the proxy of a parameter or buffer of the model."""

    def reads(self, tensor: Tensor) -> None:
        """Take note that the code computes with a tensor, whose values are in the graph then."""

    def updates(self, node: fx.Node, tensor: Tensor | None) -> bool:
        """Tell whether a node returns a parameter or buffer that it has changed in place."""
