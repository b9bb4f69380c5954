"""The programs of both structures.

Without couplings Fbreve^-1 = blockdiag(F_ii^-1) (docs/explanation/mathematics.md, section 6).
With a forest of them Fhat^-1 = Xi^T Lambda Xi (docs/explanation/mathematics.md, section 7),
where all layers are independent of each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from kfac_fx.codegen import batch, conditional
from kfac_fx.codegen.batch import equal_blocks
from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.calls import CHOLESKY
from kfac_fx.codegen.conditional import Pairs
from kfac_fx.codegen.form import Damping
from kfac_fx.codegen.forms import FORMS, Forms
from kfac_fx.ir import Coupling, CurvatureBlock, CurvatureGraph, parents
from kfac_fx.linalg.positive import Factorise


def _title(block: CurvatureBlock) -> str:
    sides = " and ".join("x".join(map(str, shape)) or "1" for shape in block.dimensions)
    return f"{block.name}: {block.kind}, {block.approximation} {sides}"


def _titles(group: Sequence[CurvatureBlock]) -> str:
    first, *others = group
    return f"{_title(first)}" + (f", and {len(others)} like it" if others else "")


def _factor_names(block: CurvatureBlock) -> list[str]:
    return [f"{factor.name}_{block.slot}" for factor in block.factors if factor.role != "count"]


def emit_refresh(
    curvature: CurvatureGraph,
    couplings: Collection[Coupling] = (),
    factorise: Factorise = CHOLESKY,
    forms: Forms = FORMS,
    batched: bool = False,
) -> fx.GraphModule:
    """factors, cross factors and damping (0-dimensional) -> inverses, as a dict by name.

    Arguments: damping, the factors in the order of the blocks, A and G of every coupling (child by
    parent). Besides the inverses there are flags: ``failed_X`` where a factorisation failed,
    ``clamped_X`` and ``indefinite_X`` of every child X.

    Args:
        batched: serve blocks of equal shapes together.
    """
    build = ProgramBuilder()
    damping = build.input("damping")
    blocks = curvature.blocks
    factors = {b.name: [build.input(n) for n in _factor_names(b)] for b in blocks.values()}
    crosses = {c: [build.input(n) for n in conditional.cross_names(blocks, c)] for c in couplings}
    amounts = Damping(damping, build.name(torch.sqrt(damping), "gamma"))
    pairs, parent = Pairs(blocks, couplings), parents(couplings)
    coupled = {*parent, *parent.values()}
    whiteners: dict[str, list[Any]] = {}
    outputs: dict[str, Any] = {}
    groups = equal_blocks((b for b in blocks.values() if b.name not in coupled), batched)
    for group in groups:
        with build.section(group[0].slot, _titles(group)):
            form = forms[group[0].approximation]
            outputs |= batch.refresh(build, form, group, factors, amounts, factorise.inverse)
    for name in (name for name in blocks if name in coupled):
        block = blocks[name]
        with build.section(block.slot, _title(block)):
            whiteners[name], flags = conditional.whiten(
                build, block, factors[name], amounts, factorise
            )
            outputs |= flags
            if name not in pairs.within:
                outputs |= conditional.own(build, block, whiteners[name])
    for coupling, cross in crosses.items():
        child, above = pair = pairs.of[coupling.child]
        given = f"{child.name} given {above.name}"
        with build.section(f"{child.slot}_given_{above.slot}", given):
            sides = whiteners[child.name], whiteners[above.name]
            outputs |= conditional.refresh(build, pair, *sides, cross)
    if not amounts.gamma.node.users:
        build.graph.erase_node(amounts.gamma.node)
    return build.finish(outputs, "Refresh")


def inverse_names(
    curvature: CurvatureGraph, couplings: Collection[Coupling], forms: Forms
) -> dict[str, tuple[str, ...]]:
    """Block -> names of the inverses that belong to it."""
    pairs = Pairs(curvature.blocks, couplings)
    return {
        name: pairs.inverses(name)
        if name in pairs.of
        else forms[block.approximation].inverses(block)
        for name, block in curvature.blocks.items()
    }


def emit_apply(
    curvature: CurvatureGraph,
    couplings: Collection[Coupling] = (),
    cast: Collection[str] = (),
    forms: Forms = FORMS,
    batched: bool = False,
) -> fx.GraphModule:
    """inverses and gradients -> preconditioned gradients, as a dict by parameter name.

    Args:
        cast: parameters whose dtype is not the factors'; products are formed in the latter.
        batched: serve blocks of equal shapes together.
    """
    build = ProgramBuilder()
    names = inverse_names(curvature, couplings, forms)
    inverses = {block: [build.input(name) for name in names[block]] for block in names}
    gradients = {name: build.input(f"gradient_{name}") for name in curvature.covered}
    outputs: dict[str, Any] = dict(gradients)
    for name, U in terms(build, curvature, couplings, cast, forms, inverses, gradients, batched):
        scatter(build, curvature.blocks[name], U, outputs, cast)
    return build.finish(outputs, "Apply")


def terms(
    build: ProgramBuilder,
    curvature: CurvatureGraph,
    couplings: Collection[Coupling],
    cast: Collection[str],
    forms: Forms,
    inverses: Mapping[str, Sequence[Any]],
    gradients: Mapping[str, Any],
    batched: bool = False,
) -> Iterator[tuple[str, Any]]:
    """What the blocks with inverses contribute to the updates of blocks; see ``emit_terms``.

    Each comes in a section of its own, which is open until the next is asked for.
    """
    blocks, every = curvature.blocks, Pairs(curvature.blocks, couplings)
    pairs = {child: pair for child, pair in every.of.items() if child in inverses}
    coupled = {block.name for pair in every.of.values() for block in pair}
    like = {pair.parent.name: inverses[child][0] for child, pair in pairs.items()}
    like |= {name: own[0] for name, own in inverses.items()}
    V: dict[str, Any] = {}
    U: dict[str, Any] = {}

    def gathered(block: CurvatureBlock) -> Any:
        return _gather(build, block, gradients, like[block.name], cast)

    alone = (block for name, block in blocks.items() if name in like and name not in coupled)
    for group in equal_blocks(alone, batched):
        form = forms[group[0].approximation]
        with build.section(group[0].slot, _titles(group)):
            own_V = {block.name: gathered(block) for block in group}
            found = batch.apply(build, form, group, inverses, own_V)
            if len(group) == 1:
                yield from found.items()
        for block in group if len(group) > 1 else ():
            with build.section(block.slot, f"{block.name}: the update"):
                yield block.name, found[block.name]
    for name in (name for name in blocks if name in like and name in coupled):
        block = blocks[name]
        with build.section(block.slot, _title(block)):
            V[name] = gathered(block)
            if name in inverses and name not in every.within:
                own = inverses[name][len(pairs[name].values) if name in pairs else 0 :]
                U[name] = forms[block.approximation].apply(build, block, own, V[name])
    parts: dict[str, list[conditional.Part]] = {}
    for child, pair in pairs.items():
        above = pair.parent.name
        with build.section(pair.child.slot, f"{child} given {above}"):
            within = [name for name in (child, above) if every.within.get(name) == child]
            for part in conditional.apply(pair, inverses[child], V[child], V[above], within):
                parts.setdefault(part.block, []).append(part)
    for name in V:
        with build.section(blocks[name].slot, f"{name}: the sum"):
            yield name, _sum(U.get(name), parts.get(name, []))


def _sum(own: Any, parts: Sequence[conditional.Part]) -> Any:
    """What a block has by itself, if that is not in one of the pairs, and what pairs add."""
    total = own
    for part in sorted(parts, key=lambda part: -part.sign):
        if total is None:
            total = torch.mm(*part.factors) if part.sign > 0 else -torch.mm(*part.factors)
        elif part.sign > 0:
            total = torch.addmm(total, *part.factors)
        else:
            total = torch.addmm(total, *part.factors, alpha=-1)
    return total


def _gather(
    build: ProgramBuilder,
    block: CurvatureBlock,
    gradients: Mapping[str, Any],
    like: Any,
    cast: Collection[str],
) -> Any:
    """The block's gradients as the one array that its inverse acts on."""
    given = [
        layout.apply(gradients[name].to(like.dtype) if name in cast else gradients[name])
        for name, layout in zip(block.parameters, block.layouts, strict=True)
    ]
    return build.name(FORMS[block.approximation].gather(build, block, given), f"V_{block.slot}")


def scatter(
    build: ProgramBuilder,
    block: CurvatureBlock,
    U: Any,
    outputs: dict[str, Any],
    cast: Collection[str],
) -> None:
    """Puts the block's update into the outputs, in the parameters' own shapes."""
    parts = FORMS[block.approximation].scatter(build, block, build.name(U, f"U_{block.slot}"))
    for name, part, layout in zip(block.parameters, parts, block.layouts, strict=True):
        part = part.to(outputs[name].dtype) if name in cast else part
        outputs[name] = layout.embed(part, outputs[name])
