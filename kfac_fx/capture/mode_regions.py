"""Record in a graph where the model switches gradients or autocast, as calls of the switches.

``with torch.no_grad():`` leaves no trace in fx's graphs, and what it protects would be trained. The
calls stand flat among the others, so the rules see what is inside a region. The mode of the caller
is kept apart from a mode that the model sets: it may be another at each call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from kfac_fx.capture.parameter_paths import ancestors
from kfac_fx.torch_internals.modes import (
    autocast_setting,
    autocast_state,
    enter_autocast,
    exit_autocast,
    grad_context,
    is_grad_enabled,
    set_grad_enabled,
)
from kfac_fx.torch_internals.operators import runs_nested_graph

CALLER = "caller"
"""Stands for the gradient mode in which the graph is called."""


class Regions:
    """Follow the switches while a model is traced.

    Args:
        create: makes a node of a function and its arguments.
        refuse: is told what cannot be recorded.
    """

    def __init__(
        self,
        create: Callable[[object, tuple[object, ...]], fx.Node],
        refuse: Callable[[str], object],
    ) -> None:
        self._create = create
        self._refuse = refuse
        self._mode: object = CALLER
        self._recorded: object = CALLER
        self._callers: fx.Node | None = None
        self._before: dict[int, tuple[object, object]] = {}
        self._autocasts: list[fx.Node] = []
        self._autocast = autocast_state()
        self._busy = False

    def gradients(self, mode: bool) -> None:
        """Take note that the user's code switches gradients; called before it happens."""
        found = grad_context()
        if found is None:
            self._mode = mode
            return
        context, method = found
        if method in ("__exit__", "__call__"):
            # What it goes back to may be the caller's mode, of which its own record is a number.
            self._mode = self._before.pop(id(context), (None, mode))[1]
            return
        if id(context) not in self._before:
            self._before[id(context)] = context, self._mode
        self._mode = mode

    def autocast(self, region: torch.autocast, entered: bool) -> None:
        """Take note that a region of autocast was entered or left."""
        self._autocast = autocast_state()
        if entered:
            node = self._create(enter_autocast, autocast_setting(region))
            self._autocasts.append(node)
        elif self._autocasts:
            self._create(exit_autocast, (self._autocasts.pop(),))

    def before_node(self) -> None:
        """Let the graph switch gradients where the next node is made in another mode."""
        if self._busy:
            return
        expected = True if self._mode is CALLER else self._mode
        if is_grad_enabled() is not expected:
            self._mode = is_grad_enabled()  # by a way that no function of torch shows
        if autocast_state() != self._autocast:
            self._refuse("autocast is switched by another way than torch.autocast")
        if self._mode is not self._recorded:
            self._busy = True
            try:
                self._switch()
            finally:
                self._busy = False

    def end(self) -> None:
        """Let the graph go back to the mode of its caller, where the model did so.

        A model that leaves another mode behind does so in its graph as well.
        """
        self.before_node()

    def _switch(self) -> None:
        """Make the node that switches gradients."""
        if self._callers is None:
            self._callers = self._create(is_grad_enabled, ())
        mode = self._callers if self._mode is CALLER else self._mode
        self._create(set_grad_enabled, (mode,))
        self._recorded = self._mode


class GradMode:
    """Tell of the nodes of a graph, in order, whether gradients are off where they run."""

    def __init__(self) -> None:
        self.off = False
        self._switched_off = False

    def read(self, node: fx.Node) -> None:
        """Follow one node."""
        if node.op == "call_function" and node.target is set_grad_enabled:
            # The caller's mode is that of a training step; the switch may read it from a node.
            self._switched_off = node.args[0] is False
        self.off = self._switched_off or _is_region_without(node)


def _is_region_without(node: fx.Node) -> bool:
    """Tell whether a node runs a graph of its own with gradients off, as exports write regions.

    One that reads what else there is a use of is none: a spectral norm's iteration is a part of how
    a weight is computed, and is followed with it.
    """
    if not runs_nested_graph(node.target) or str(node.target) != "wrap_with_set_grad_enabled":
        return False
    owner, (enabled, place, *read) = node.graph.owning_module, node.args
    if enabled is not False or owner is None or not isinstance(place, fx.Node):
        return False
    for each in read:
        if not isinstance(each, fx.Node):
            continue
        if each.op == "get_attr":
            elsewhere = len(each.users) > 1
        else:
            elsewhere = any(above.op == "get_attr" for above in ancestors(each))
        if elsewhere:
            return False
    inner = getattr(owner.get_submodule(str(place.target)), "graph", None)
    # A region inside of it may switch them on again: then it is looked at as others are.
    return inner is not None and not any(runs_nested_graph(one.target) for one in inner.nodes)


def switches_modes(graph: fx.Graph) -> bool:
    """Tell whether a graph switches modes, so that an error in it must put them back."""
    switches = (set_grad_enabled, enter_autocast)
    return any(n.op == "call_function" and n.target in switches for n in graph.nodes)
