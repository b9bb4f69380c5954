"""Stacks of inverses of equal blocks, put together when the inverses change, not at every apply."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from kfac_fx.codegen.approximations.base import InverseKey


class Stacks:
    """The stacks of inverses that a batched apply takes, kept until the inverses change.

    Args:
        stacked: the inverses in each stack, in the order of the program's arguments.
        alone: those that are arguments of their own after the stacks.
    """

    def __init__(
        self, stacked: Sequence[tuple[InverseKey, ...]], alone: Sequence[InverseKey]
    ) -> None:
        self._stacked = stacked
        self._alone = alone
        self._parts: list[list[Tensor]] = [[] for _ in stacked]
        self._stacks: list[Tensor] = [torch.empty(0) for _ in stacked]

    def arguments(self, inverses: Mapping[InverseKey, Tensor]) -> list[Tensor]:
        """Return the stacks, made anew where one of their parts is another tensor, and the rest."""
        for place, keys in enumerate(self._stacked):
            parts = [inverses[key] for key in keys]
            known = self._parts[place]
            # By identity: a refresh makes new tensors, and EKFAC replaces single ones.
            if not known or any(a is not b for a, b in zip(parts, known, strict=True)):
                self._parts[place] = parts
                self._stacks[place] = joined(parts)
        return [*self._stacks, *(inverses[key] for key in self._alone)]


def given_stacks(
    apply: fx.GraphModule, inverses: Sequence[InverseKey]
) -> tuple[fx.GraphModule, Stacks]:
    """Return the program with stacks of inverses for its first arguments, and what makes them.

    Inverses that are nowhere used alone are no arguments any more.

    Args:
        apply: inverses, in the order given, and gradients -> updates.
        inverses: keys of its first arguments.
    """
    # A stack at every apply would copy all inverses, which change at refreshes alone.
    graph = copy.deepcopy(apply.graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    # The builder may have changed a name to make it unique, so arguments are told by place.
    key_of = dict(zip(placeholders, inverses, strict=False))
    stacks: dict[tuple[InverseKey, ...], fx.Node] = {}
    for node in list(graph.nodes):
        parts = node.args[0] if node.target is torch.stack else ()
        if not parts or any(part not in key_of for part in parts):
            continue
        keys = tuple(key_of[part] for part in parts)
        if keys not in stacks:
            with graph.inserting_before(placeholders[0]):
                stacks[keys] = graph.placeholder(f"all_{keys[0].name}")
        node.replace_all_uses_with(stacks[keys])
        graph.erase_node(node)
    alone = []
    for node, key in key_of.items():
        if node.users:
            alone.append(key)
        else:
            graph.erase_node(node)
    graph.lint()
    module = fx.GraphModule(nn.Module(), graph, "ApplyOfStacks")
    return module, Stacks(list(stacks), alone)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return [k, ...] of k tensors; without a copy where they are the pieces of such a tensor."""
    # A batched refresh makes one stack and hands out its pieces: then it is there already.
    first = parts[0]
    at = [part.storage_offset() for part in parts]
    step = at[1] - at[0] if len(at) > 1 else 0
    storage = first.untyped_storage().data_ptr()
    in_line = step == first.numel() and at == [at[0] + k * step for k in range(len(at))]
    alike = all(
        part.untyped_storage().data_ptr() == storage
        and part.shape == first.shape
        and part.dtype == first.dtype
        and part.stride() == first.stride()
        for part in parts
    )
    if in_line and alike:
        return first.as_strided((len(parts), *first.shape), (step, *first.stride()))
    return torch.stack(list(parts))
