"""Run a network on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext

from kfac_fx.errors import UnknownOptionError
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.torch_internals.linear_below_jvp import LinearBelowJvp

Network = Callable[..., Tree]
"""An instrumented module, or a function that runs it with other tensors."""

Forward = Callable[[Network, Tree], Tree]
"""Maps the network (a callable) and a batch's inputs to the outputs of the likelihood."""


def run_network(net: Network, inputs: Tree) -> Tree:
    """Return the outputs; a tuple is spread as positional arguments, a mapping as keywords."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def outputs_of(forward: Forward, net: Network, inputs: Tree, compiled: bool = False) -> Tree:
    """Return what ``forward`` makes of the inputs, or what a closure in their place returns.

    Args:
        forward: a function from (network, inputs) to outputs.
        net: the network.
        inputs: its inputs, or a closure from the network to outputs.
        compiled: whether a compiler runs the network, which has to see all that is called.

    Raises:
        UnknownOptionError: the closure does not take the network.
    """
    if not callable(inputs):
        return forward(net, inputs)
    try:
        inspect.signature(inputs).bind(net)
    except TypeError as error:
        raise UnknownOptionError(
            "a closure takes the network and returns the outputs of the likelihood, not the loss: "
            "step(lambda net: net(x), targets)"
        ) from error
    # Closures are where derivatives by the inputs are taken.
    with nullcontext() if compiled else LinearBelowJvp():
        return inputs(net)
