"""Blocks of equal shapes, served by one call of every operation: a stack in front of each factor.

So a compiled program of a deep network of equal layers has as many kernels as one of a few, and a
GPU as few launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.form import Damping, Form, Invert
from kfac_fx.ir import CurvatureBlock

Group = list[CurvatureBlock]


def equal_blocks(blocks: Iterable[CurvatureBlock], batched: bool) -> list[Group]:
    """Groups of blocks of equal shapes; each block alone unless ``batched``.

    Sums of products and blocks that are cut into sub-blocks stay alone.
    """
    found: dict[Any, Group] = {}
    for block in blocks:
        specs = [spec for spec in block.factors if spec.role != "count"]
        alone = block.approximation == "kronecker_sum" or any(spec.cut for spec in specs)
        shapes = tuple((spec.name, spec.shape, spec.diagonal) for spec in specs)
        key = (block.approximation, shapes) if batched and not alone else block.name
        found.setdefault(key, []).append(block)
    return list(found.values())


def refresh(
    build: ProgramBuilder,
    form: Form,
    group: Group,
    factors: Mapping[str, Sequence[Any]],
    damping: Damping,
    invert: Invert,
) -> dict[str, Any]:
    """The inverses and flags of all blocks of a group."""
    first = group[0]
    if len(group) == 1:
        return dict(form.refresh(build, first, factors[first.name], damping, invert))
    stacks = [torch.stack(same) for same in zip(*(factors[b.name] for b in group), strict=True)]
    found = form.refresh(build, first, stacks, damping, invert)
    for name, value in found.items():
        build.name(value, f"{name}_of_all")
    own = [dict(zip(form.inverses(first), form.inverses(block), strict=True)) for block in group]
    return {
        (names[key] if key in names else key.removesuffix(first.slot) + block.slot): value[place]
        for key, value in found.items()
        for place, (names, block) in enumerate(zip(own, group, strict=True))
    }


def apply(
    build: ProgramBuilder,
    form: Form,
    group: Group,
    inverses: Mapping[str, Sequence[Any]],
    V: Mapping[str, Any],
) -> dict[str, Any]:
    """The inverses of a group's blocks times what each has in V, by block."""
    first = group[0]
    if len(group) == 1:
        return {first.name: form.apply(build, first, inverses[first.name], V[first.name])}
    stacks = [torch.stack(same) for same in zip(*(inverses[b.name] for b in group), strict=True)]
    U = form.apply(build, first, stacks, torch.stack([V[block.name] for block in group]))
    return {block.name: U[place] for place, block in enumerate(group)}
