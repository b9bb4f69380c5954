"""A custom autograd.Function as one node of a graph.

Were its forward traced through, the graph would have the values and lose the backward.
"""

from __future__ import annotations

from typing import Any

import torch

Value = Any
"""An argument or result of the user's function."""


class FunctionCall:
    """Call an ``autograd.Function``; graphs have it as their target.

    fx writes the module and the name of a target into its code, and those of the bound method
    ``apply`` are torch's for every function.

    Args:
        function: the user's class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = f"apply_{function.__name__}"
        self.__qualname__ = self.__name__
        self.__module__ = __name__

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)
