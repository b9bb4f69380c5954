"""Stacks of inverses of equal blocks, put together when the inverses change, not at every apply."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_fx.codegen.compile import compiled

Stack = tuple[str, ...]


def given_stacks(
    apply: fx.GraphModule, inverses: Collection[str]
) -> tuple[fx.GraphModule, list[Stack]]:
    """The program with stacks of inverses for its first arguments, and the names in each.

    Inverses that are nowhere used alone are no arguments any more.
    """
    graph = copy.deepcopy(apply.graph)
    alone = {node.name for node in graph.nodes if node.op == "placeholder"} & {*inverses}
    first = next(iter(graph.nodes))
    stacks: dict[Stack, fx.Node] = {}
    for node in list(graph.nodes):
        parts = node.args[0] if node.target is torch.stack else ()
        names = tuple(part.name for part in parts)
        if not names or not alone.issuperset(names):
            continue
        if names not in stacks:
            with graph.inserting_before(first):
                stacks[names] = graph.placeholder(f"all_{names[0]}")
        node.replace_all_uses_with(stacks[names])
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.name in alone and not node.users:
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(nn.Module(), graph, "ApplyOfStacks"), list(stacks)


class ApplyOfStacks:
    """Runs the program of ``apply`` on inverses by name, whose stacks it keeps.

    Args:
        apply: inverses, by the names given and in their order, and gradients -> updates.
        compile: see ``compiled``.
    """

    def __init__(self, apply: fx.GraphModule, inverses: Sequence[str], compile: bool | str) -> None:
        module, self._names = given_stacks(apply, inverses)
        arguments = {node.name for node in module.graph.nodes if node.op == "placeholder"}
        self._alone = [name for name in inverses if name in arguments]
        self._run = compiled(module, compile)
        self._parts: list[list[Tensor]] = [[] for _ in self._names]
        self._stacks: list[Tensor] = [torch.empty(0) for _ in self._names]

    def __call__(self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> Any:
        """Updates by parameter name."""
        for place, names in enumerate(self._names):
            parts = [inverses[name] for name in names]
            known = self._parts[place]
            if not known or any(a is not b for a, b in zip(parts, known, strict=True)):
                self._parts[place], self._stacks[place] = parts, joined(parts)
        return self._run(*self._stacks, *(inverses[name] for name in self._alone), *gradients)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """[k, ...] of k tensors; without a copy where they are the pieces of such a tensor."""
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
