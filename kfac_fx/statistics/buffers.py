"""The tensors that statistics are gradients of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kfac_fx.ir import CurvatureBlock, Moment, Pair
from kfac_fx.ir.use import StatisticKey
from kfac_fx.ops import STORE, Statistic, multiplied, passes
from kfac_fx.parallel import StatisticSlot

Gradients = dict[int, Tensor]
"""id of a factor buffer or parameter -> what a backward pass returned for it."""

Statistics = dict[int, Statistic]
"""The same; some may not be multiplied yet."""

Shared = tuple[tuple[int, tuple[int, ...]], ...]
"""(place of a G, places of the A whose calls it is divided by) among the gradients and inputs."""


@dataclass
class Sources:
    """The tensors that statistics are gradients of.

    Attributes:
        inputs: factor buffers that do not depend on the derivative (A, counts).
        gradients: factor buffers that are quadratic in it (G, C).
        parameters: those without a tap, whose summed gradient is squared.
        symmetric: ids of the factor buffers that hold symmetric matrices.
        shared: the G that several calls of a layer share.
        keys: names of the factor buffers' statistics, by their ids.
        untapped: blocks without a tap: the name of their statistic, and their parameters.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    parameters: list[Tensor]
    symmetric: set[int]
    shared: Shared
    keys: dict[int, StatisticKey] = field(default_factory=dict)
    untapped: list[tuple[StatisticKey, tuple[nn.Parameter, ...]]] = field(default_factory=list)

    @property
    def places(self) -> list[StatisticSlot]:
        """Where all statistics go."""
        return [
            StatisticSlot(t, id(t) in self.symmetric) for t in (*self.factors, *self.parameters)
        ]

    @property
    def factors(self) -> list[Tensor]:
        """All factor buffers."""
        return self.inputs + self.gradients

    def keyed(self, found: Statistics) -> dict[StatisticKey, Statistic]:
        """Return statistics by name; those of a block without a tap as one flat vector."""
        result = {self.keys[key]: value for key, value in found.items() if key in self.keys}
        for name, parameters in self.untapped:
            squares = [found.get(id(p)) for p in parameters]
            if any(square is None for square in squares):
                continue
            flat = torch.cat([multiplied(s).reshape(-1) for s in squares if s is not None])
            dtype = torch.promote_types(parameters[0].dtype, torch.float32).to_real()
            result[name] = flat.to(dtype)
        return result


Holder = CurvatureBlock | Pair | Moment
"""What has statistics of its own."""


def sources_of(net: nn.Module, holders: Sequence[Holder]) -> Sources:
    """Return the sources of blocks, pairs and moments; a pair comes after its blocks."""
    sources = Sources([], [], [], set(), _shared_uses(holders))
    store = getattr(net, STORE)
    for holder in holders:
        keys = [StatisticKey(holder.slot, spec.name) for spec in holder.factors]
        if isinstance(holder, CurvatureBlock) and not holder.tapped:
            modules = dict(net.named_modules(remove_duplicate=False))
            owners = (name.rpartition(".") for name in holder.parameters)
            parameters = tuple(modules[owner].get_parameter(leaf) for owner, _, leaf in owners)
            sources.parameters.extend(parameters)
            sources.untapped.append((keys[0], parameters))
            continue
        for spec, key in zip(holder.factors, keys, strict=True):
            buffer = getattr(getattr(store, key.slot), key.factor)
            sources.keys[id(buffer)] = key
            (sources.gradients if spec.role == "gradient" else sources.inputs).append(buffer)
            if isinstance(holder, CurvatureBlock) and spec.role != "count":
                sources.symmetric |= set() if spec.diagonal else {id(buffer)}
    return sources


def _shared_uses(holders: Sequence[Holder]) -> Shared:
    """The G that are divided by the number of calls that were recorded; of pairs, its mean.

    As for shared positions A (x) G then stands for a sum of uncorrelated terms, one a call
    (Martens, Ba & Johnson 2018); a derivative in forward mode is a call of its own. Blocks that
    count positions at run time need none of this.
    """
    inputs: dict[str, int] = {}
    found: list[tuple[int, tuple[int, ...]]] = []
    place = {"input": 0, "gradient": 0}
    for block in holders:
        roles = [spec.role for spec in block.factors] if block.tapped else []
        if roles == ["input", "gradient"]:
            ends = (block.earlier, block.later) if isinstance(block, Pair) else (block.name,)
            inputs.setdefault(block.name, place["input"])
            if all(end in inputs for end in ends):
                found.append((place["gradient"], tuple(inputs[end] for end in ends)))
        for role in roles:
            place["gradient" if role == "gradient" else "input"] += 1
    return tuple(found)


def by_calls(sources: Sources, found: Mapping[int, Statistic]) -> Statistics:
    """Statistics of one recorded pass, with those G divided that several calls share."""
    result = dict(found)
    for gradient, inputs in sources.shared:
        calls = [passes(sources.inputs[place]) for place in inputs]
        key = id(sources.gradients[gradient])
        if key in result and any(count > 1 for count in calls):
            result[key] = result[key] * math.prod(calls) ** (-1 / len(calls))
    return result
