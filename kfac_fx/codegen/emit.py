"""Emits the programs of both structures as fx graphs.

Without couplings Fbreve^-1 = blockdiag(F_ii^-1) (docs/explanation/mathematics.md, section 6).
With a forest of them Fhat^-1 = Xi^T Lambda Xi (docs/explanation/mathematics.md, section 7), where
all layers are independent of each other.

Blocks of equal shapes can be served by one call of every operation, with a stack in front of each
factor: a compiled program of a deep network of equal layers has as many kernels then as one of a
few, and a GPU as few launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from kfac_fx.codegen import conditional
from kfac_fx.codegen.approximations.base import (
    BlockApproximation,
    Damping,
    Emitted,
    InverseKey,
    matrices_of,
)
from kfac_fx.codegen.approximations.table import SHAPES, Table
from kfac_fx.codegen.builder import ProgramBuilder
from kfac_fx.codegen.leaf import Value, leaf
from kfac_fx.codegen.refresh_module import RefreshModule
from kfac_fx.ir.coupling import Coupling, parents
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.linalg import kronecker, positive
from kfac_fx.linalg.positive import Factorise

CHOLESKY = Factorise(leaf(positive.cholesky_inverse), leaf(positive.cholesky_whitener))
FLOORED = Factorise(leaf(positive.floored_inverse), leaf(positive.floored_whitener))

Group = list[CurvatureBlock]


@dataclass(frozen=True)
class Recipe:
    """The blocks, couplings and options that programs are emitted from.

    Attributes:
        curvature: the blocks.
        couplings: the forest; none for block-diagonal.
        table: what each approximation does.
        cast: parameters whose dtype is not the factors'; products are formed in the latter.
        batched: whether blocks of equal shapes are served together.
    """

    curvature: CurvatureGraph
    couplings: tuple[Coupling, ...] = ()
    table: Table = field(default_factory=lambda: SHAPES)
    cast: frozenset[str] = frozenset()
    batched: bool = False

    def of(self, block: CurvatureBlock) -> BlockApproximation:
        """Return what a block's approximation does."""
        return self.table[block.approximation]

    def inverses(self) -> dict[str, tuple[InverseKey, ...]]:
        """Return for each block the keys of the inverses that belong to it, in their order."""
        pairs = conditional.CoupledPairs(self.curvature.blocks, self.couplings)
        return {
            name: pairs.inverses(name) if name in pairs.of else self.of(block).inverses(block)
            for name, block in self.curvature.blocks.items()
        }

    def groups(self, names: Iterable[str]) -> list[Group]:
        """Return the blocks of these names in groups of equal shapes; each alone unless batched.

        Blocks that are cut into sub-blocks stay alone: those have a dimension in front already.
        """
        found: dict[object, Group] = {}
        for name in names:
            block = self.curvature.blocks[name]
            specs = matrices_of(block)
            alone = self.of(block).alone or any(spec.cut for spec in specs)
            shapes = tuple((spec.name, spec.shape, spec.diagonal) for spec in specs)
            key = (block.approximation, shapes) if self.batched and not alone else name
            found.setdefault(key, []).append(block)
        return list(found.values())


def _title(block: CurvatureBlock) -> str:
    sides = " and ".join("x".join(map(str, shape)) or "1" for shape in block.dimensions)
    return f"{block.name}: {block.kind}, {block.approximation} {sides}"


def _titles(group: Sequence[CurvatureBlock]) -> str:
    first, *others = group
    return f"{_title(first)}" + (f", and {len(others)} like it" if others else "")


def emit_refresh(recipe: Recipe, factorise: Factorise = CHOLESKY) -> RefreshModule:
    """Emit the program from factors, cross factors and damping to inverses and flags.

    Args:
        recipe: the recipe of all blocks.
        factorise: how positive matrices are inverted.
    """
    build = ProgramBuilder()
    # The damping is an argument, not a constant: it changes from refresh to refresh, and a compiled
    # program would be compiled for each.
    damping = build.input("damping")
    blocks, couplings = recipe.curvature.blocks, recipe.couplings
    factors = {
        name: [build.input(f"{spec.name}_{block.slot}") for spec in matrices_of(block)]
        for name, block in blocks.items()
    }
    crosses = {
        c.child: [build.input(name) for name in conditional.cross_names(blocks, c)]
        for c in couplings
    }
    amounts = Damping(damping, build.name(torch.sqrt(damping), "gamma"))
    pairs, parent = conditional.CoupledPairs(blocks, couplings), parents(couplings)
    coupled = {*parent, *parent.values()}
    whiteners: dict[str, Sequence[Value]] = {}
    made = Emitted({}, {})

    # Whoever emits returns values by key; only here they get their names in the program.
    def take(emitted: Emitted) -> None:
        for key, value in emitted.inverses.items():
            made.inverses[key] = build.name(value, key.name)
        for flag, value in emitted.flags.items():
            made.flags[flag] = build.name(value, flag.name)

    for group in recipe.groups(name for name in blocks if name not in coupled):
        with build.section(group[0].slot, _titles(group)):
            take(_refreshed(build, recipe.of(group[0]), group, factors, amounts, factorise))
    for name in (name for name in blocks if name in coupled):
        block = blocks[name]
        with build.section(block.slot, _title(block)):
            whiteners[name], flags = conditional.whiten(
                build, block, factors[name], amounts, factorise
            )
            take(Emitted({}, flags))
            # The product of a pair holds the inverse of the block that is complete in it.
            if name not in pairs.within:
                take(Emitted(conditional.own(block, whiteners[name]), {}))
    for name, cross in crosses.items():
        child, above = pair = pairs.of[name]
        given = f"{child.name} given {above.name}"
        with build.section(f"{child.slot}_given_{above.slot}", given):
            take(conditional.refresh(pair, whiteners[child.name], whiteners[above.name], cross))
    # Exact damping and covariances take lambda alone.
    if not amounts.gamma.node.users:
        build.graph.erase_node(amounts.gamma.node)
    outputs = {key.name: value for key, value in made.inverses.items()}
    outputs |= {flag.name: value for flag, value in made.flags.items()}
    module = build.finish(outputs, "Refresh")
    return RefreshModule(module, tuple(made.inverses), tuple(made.flags))


def _refreshed(
    build: ProgramBuilder,
    approximation: BlockApproximation,
    group: Group,
    factors: Mapping[str, Sequence[Value]],
    damping: Damping,
    factorise: Factorise,
) -> Emitted:
    """Emit the inverses and flags of all blocks of a group."""
    first, invert = group[0], factorise.inverse
    if len(group) == 1:
        return approximation.refresh(build, first, factors[first.name], damping, invert)
    stacks = [torch.stack(same) for same in zip(*(factors[b.name] for b in group), strict=True)]
    found = approximation.refresh(build, first, stacks, damping, invert)
    result = Emitted({}, {})
    # The keys are those of the first block; what they name is a stack of all blocks' values.
    for key, value in found.inverses.items():
        build.name(value, f"{key.name}_of_all")
        for place, block in enumerate(group):
            result.inverses[key._replace(block=block.slot)] = value[place]
    for flag, value in found.flags.items():
        build.name(value, f"{flag.name}_of_all")
        for place, block in enumerate(group):
            result.flags[flag._replace(block=block.slot)] = value[place]
    return result


def emit_apply(recipe: Recipe) -> fx.GraphModule:
    """Emit the program from inverses and gradients to updates, as a dict by parameter name.

    Its arguments are the inverses in the order of ``Recipe.inverses``, then all gradients.
    """
    build = ProgramBuilder()
    inverses = {
        block: [build.input(key.name) for key in keys] for block, keys in recipe.inverses().items()
    }
    gradients = {name: build.input(f"gradient_{name}") for name in recipe.curvature.covered}
    outputs: dict[str, Value] = dict(gradients)
    for name, U in terms(build, recipe, inverses, gradients):
        scatter(build, recipe, recipe.curvature.blocks[name], U, outputs)
    return build.finish(outputs, "Apply")


def terms(
    build: ProgramBuilder,
    recipe: Recipe,
    inverses: Mapping[str, Sequence[Value]],
    gradients: Mapping[str, Value],
) -> Iterator[tuple[str, Value]]:
    """Emit what the blocks with inverses contribute to the updates of blocks.

    Each contribution comes in a section of its own, which is open until the next is asked for.

    Args:
        build: the builder of the program.
        recipe: the recipe of all blocks.
        inverses: block -> its inverses; blocks that are not there belong to other processes.
        gradients: the gradients of all parameters.
    """
    blocks = recipe.curvature.blocks
    every = conditional.CoupledPairs(blocks, recipe.couplings)
    pairs = {child: pair for child, pair in every.of.items() if child in inverses}
    coupled = {block.name for pair in every.of.values() for block in pair}
    # A parent whose own inverses are elsewhere is gathered too, for its children's pairs: any of
    # their inverses says the precision that products are formed in.
    like = {pair.parent.name: inverses[child][0] for child, pair in pairs.items()}
    like |= {name: own[0] for name, own in inverses.items()}
    present = [name for name in blocks if name in like]

    def gathered(block: CurvatureBlock) -> Value:
        return _gather(build, recipe, block, gradients, like[block.name])

    for group in recipe.groups(name for name in present if name not in coupled):
        with build.section(group[0].slot, _titles(group)):
            own_V = {block.name: gathered(block) for block in group}
            found = _applied(recipe.of(group[0]), group, inverses, own_V)
            if len(group) == 1:
                yield from found.items()
        for block in group if len(group) > 1 else ():
            with build.section(block.slot, f"{block.name}: the update"):
                yield block.name, found[block.name]
    yield from _coupled_terms(build, recipe, every, inverses, gathered)


def _coupled_terms(
    build: ProgramBuilder,
    recipe: Recipe,
    every: conditional.CoupledPairs,
    inverses: Mapping[str, Sequence[Value]],
    gathered: conditional.Gathered,
) -> Iterator[tuple[str, Value]]:
    """Emit the contributions of coupled blocks: their own inverses', and those of their pairs."""
    blocks = recipe.curvature.blocks
    pairs = {child: pair for child, pair in every.of.items() if child in inverses}
    here = {block.name for pair in pairs.values() for block in pair}
    here |= {block.name for pair in every.of.values() for block in pair if block.name in inverses}
    V: dict[str, Value] = {}
    U: dict[str, Value] = {}
    # First what blocks have by themselves, then all pairs: each needs gradients alone, so a GPU
    # may run them all at once; a sweep along the forest would go level by level.
    for name in (name for name in blocks if name in here):
        block = blocks[name]
        with build.section(block.slot, _title(block)):
            V[name] = gathered(block)
            if name in inverses and name not in every.within:
                # A child's keys begin with those of its pair.
                own = inverses[name][len(pairs[name].values) if name in pairs else 0 :]
                U[name] = recipe.of(block).apply(block, own, V[name])
    parts: dict[str, list[conditional.Contribution]] = {}
    for child, pair in pairs.items():
        above = pair.parent.name
        with build.section(pair.child.slot, f"{child} given {above}"):
            within = [name for name in (child, above) if every.within.get(name) == child]
            for part in conditional.apply(pair, inverses[child], V[child], V[above], within):
                parts.setdefault(part.block, []).append(part)
    for name in V:
        with build.section(blocks[name].slot, f"{name}: the sum"):
            yield name, conditional.total(U.get(name), parts.get(name, []))


def _applied(
    approximation: BlockApproximation,
    group: Group,
    inverses: Mapping[str, Sequence[Value]],
    V: Mapping[str, Value],
) -> dict[str, Value]:
    """Emit the inverses of a group's blocks times what each has in V, by block."""
    first = group[0]
    if len(group) == 1:
        return {first.name: approximation.apply(first, inverses[first.name], V[first.name])}
    stacks = [torch.stack(same) for same in zip(*(inverses[b.name] for b in group), strict=True)]
    U = approximation.apply(first, stacks, torch.stack([V[block.name] for block in group]))
    return {block.name: U[place] for place, block in enumerate(group)}


def _gather(
    build: ProgramBuilder,
    recipe: Recipe,
    block: CurvatureBlock,
    gradients: Mapping[str, Value],
    like: Value,
) -> Value:
    """Emit the block's gradients as the one array that its inverse acts on."""
    # Parameters of lower precision are widened first: their update is rounded once, at its end.
    given = [
        layout.apply(gradients[name].to(like.dtype) if name in recipe.cast else gradients[name])
        for name, layout in zip(block.parameters, block.layouts, strict=True)
    ]
    return build.name(recipe.of(block).gather(block, given), f"V_{block.slot}")


def scatter(
    build: ProgramBuilder,
    recipe: Recipe,
    block: CurvatureBlock,
    U: Value,
    outputs: dict[str, Value],
) -> None:
    """Put the block's update into the outputs, in the parameters' own shapes and dtypes."""
    parts = recipe.of(block).scatter(block, build.name(U, f"U_{block.slot}"))
    for name, part, layout in zip(block.parameters, parts, block.layouts, strict=True):
        part = part.to(outputs[name].dtype) if name in recipe.cast else part
        outputs[name] = layout.embed(part, outputs[name])


def emit_scales(recipe: Recipe) -> fx.GraphModule:
    """Emit EKFAC's program: damping and moments S -> scales in the place of a refresh's."""
    build = ProgramBuilder()
    damping = build.input("damping")
    moment_scale = leaf(kronecker.moment_scale)
    blocks = [recipe.curvature.blocks[moment.block] for moment in recipe.curvature.moments]
    moments = {block.slot: build.input(f"S_{block.slot}") for block in blocks}
    outputs: dict[str, Value] = {}
    for block in blocks:
        with build.section(block.slot, f"{block.name}: moments"):
            key = InverseKey(block.slot, "scale")
            scale = moment_scale(moments[block.slot], damping)
            outputs[key.name] = build.name(scale, key.name)
    return build.finish(outputs, "Scales")
