"""Refreshes as they are emitted, parts of them, and the record of what one made."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from kfac_fx.codegen.approximations.base import FlagKey, InverseKey
from kfac_fx.codegen.leaf import Value


@dataclass(frozen=True)
class Refreshed:
    """The inverses that one refresh made, and the damping that they are of.

    Attributes:
        inverses: the inverses by key; of several processes those that this one keeps, which may be
            none.
        damping: lambda, [], in the precision and on the device of the inverses.
        clamped: entries of conditionals that rounding had pushed to one.
    """

    inverses: Mapping[InverseKey, Tensor]
    damping: Tensor
    clamped: int = 0


class RefreshModule(NamedTuple):
    """An emitted refresh: damping, factors -> inverses and flags, as a dict by their names.

    Attributes:
        module: its arguments are the damping, the factors in the order of the blocks, and A and G
            of every coupling, child by parent.
        inverses: keys of what it makes.
        flags: keys of what it says about itself.
    """

    module: fx.GraphModule
    inverses: tuple[InverseKey, ...]
    flags: tuple[FlagKey, ...]

    def shapes(self, factors: Sequence[Sequence[int]]) -> dict[InverseKey, torch.Size]:
        """Return the shapes of the inverses, by a run on tensors without values.

        Args:
            factors: shapes of the factors and cross factors, in the order of the arguments.
        """
        with torch.no_grad():
            given = [torch.empty(tuple(shape), device="meta") for shape in factors]
            found = self.module(torch.empty((), device="meta"), *given)
        return {key: found[key.name].shape for key in self.inverses}


def part_of_refresh(refresh: RefreshModule, wanted: Collection[InverseKey]) -> RefreshModule:
    """Return the program of some of the inverses, with the flags of all that it needs.

    Args:
        refresh: the whole; the part has the same arguments.
        wanted: keys of the inverses.
    """
    # Cut from the emitted graph rather than emitted anew: parts and whole cannot differ, and parts
    # of a pair of blocks keep what both need.
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs: Value = graph.graph_copy(refresh.module.graph, copies)
    needed: set[fx.Node] = set()
    todo = [outputs[key.name] for key in wanted]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    # A flag counts if all that it is computed from is computed anyway.
    flags = [f for f in refresh.flags if needed.issuperset(outputs[f.name].all_input_nodes)]
    inverses = [key for key in refresh.inverses if key in wanted]
    graph.output({key.name: outputs[key.name] for key in (*inverses, *flags)})
    graph.eliminate_dead_code()
    graph.lint()
    module = fx.GraphModule(nn.Module(), graph, "RefreshPart")
    return RefreshModule(module, tuple(inverses), tuple(flags))


def depending_on(refresh: RefreshModule, flags: Collection[FlagKey]) -> tuple[InverseKey, ...]:
    """Return the keys of the inverses that are made of the factorisations that flags are of.

    Args:
        refresh: without batches, in which a factorisation would be of several blocks.
        flags: of factorisations.
    """
    (output,) = (node for node in refresh.module.graph.nodes if node.op == "output")
    outputs: Value = output.args[0]
    # A flag and an inverse are two results of one call: what follows from that call is affected.
    reached: set[fx.Node] = set()
    todo = [call for flag in flags for call in outputs[flag.name].all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo += node.users
    return tuple(key for key in refresh.inverses if outputs[key.name] in reached)


def converting(refresh: fx.GraphModule) -> fx.GraphModule:
    """Return the program of factors in other precisions and places than the damping, its first.

    A factor becomes like the damping where it is first used, and is let go after its last use: all
    at once would take as much memory as the averages do.
    """
    graph = copy.deepcopy(refresh.graph)
    damping, *factors = (node for node in graph.nodes if node.op == "placeholder")
    for factor in (f for f in factors if f.users):
        uses = list(factor.users)
        first = next(node for node in graph.nodes if node in factor.users)
        with graph.inserting_before(first):
            read = graph.call_method("to", (factor, damping), {"non_blocking": True})
        for use in uses:
            use.replace_input_with(factor, read)
    graph.lint()
    return fx.GraphModule(nn.Module(), graph, "ConvertingRefresh")
