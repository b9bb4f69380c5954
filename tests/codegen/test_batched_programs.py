"""Programs that serve blocks of equal shapes together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from support.inside import covered, estimate_of, random_gradients
from support.steps import one_step
from torch import Tensor, nn

import kfac_fx
from kfac_fx.codegen.approximations.base import InverseKey
from kfac_fx.codegen.program import Program
from kfac_fx.codegen.stacks import joined
from kfac_fx.ir.use import StatisticKey


class Repeated(nn.Module):
    """Equal linear, convolution, normalisation and grouped layers, a scale, and odd ones out."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        layers = (
            (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=2))
            for _ in range(depth)
        )
        norms = (nn.GroupNorm(2, 4) for _ in range(depth))
        rows = zip(layers, norms, strict=True)
        self.body = nn.Sequential(*[layer for (a, b), n in rows for layer in (a, nn.Tanh(), b, n)])
        self.wide = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)).mean((2, 3))
        for layer in self.wide:
            x = x + layer(x).tanh()
        return self.head(x)


def recorded(depth: int, **options: object) -> kfac_fx.Preconditioner:
    torch.manual_seed(0)
    ekfac = options.get("tikhonov") == "ekfac"
    net = kfac_fx.transform(Repeated(depth).double(), structure="block_diagonal", ekfac=ekfac)
    pre = kfac_fx.Preconditioner(
        net,
        "categorical",
        fisher="exact",
        damping=1e-2,
        **options,  # type: ignore[arg-type]
    )
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    one_step(pre, net, x, lambda outputs: outputs.square().mean())
    return pre


@pytest.mark.parametrize("tikhonov", ["factored", "exact"])
def test_as_block_by_block(tikhonov: str) -> None:
    pre = recorded(3, tikhonov=tikhonov)
    factors = [factor for group in pre.factors.values() for factor in group]
    gradients = [*random_gradients(pre).values()]
    damping = torch.tensor(1e-2, dtype=torch.float64)

    def run(batched: bool) -> tuple[Mapping[InverseKey, Tensor], dict[str, Tensor], Program]:
        program = Program(pre.curvature, tikhonov=tikhonov, batched=batched)
        inverses = program.refresh(damping, factors).inverses
        return inverses, dict(program.apply(inverses, gradients)), program

    (inverses, updates, _), (stacked, together, program) = run(False), run(True)
    assert list(stacked) and set(stacked) == set(inverses)
    for name, value in inverses.items():
        torch.testing.assert_close(stacked[name], value, rtol=1e-9, atol=1e-12)
    for name, value in updates.items():
        torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-12)
    space: dict[str, Callable[..., dict[str, Tensor]]] = {}
    exec(program.code, space)  # the code runs by itself
    names = list(pre.curvature.covered)
    again = space["refresh"](damping, *factors)
    alone = space["precondition"](again, dict(zip(names, gradients, strict=True)))
    for name, value in updates.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-9, atol=1e-12)


def test_a_block_that_fails_is_named() -> None:
    """Flags belong to single blocks, though one call factorises all."""
    program = Program((pre := recorded(3)).curvature, batched=True)
    A, _ = pre.factors["wide.1"]
    factors = [
        torch.full_like(factor, float("nan")) if factor is A else factor
        for group in pre.factors.values()
        for factor in group
    ]
    found = program.refresh_module(torch.tensor(1e-2, dtype=torch.float64), *factors)
    failed = {name for name, flag in found.items() if name.startswith("failed_") and flag.any()}
    assert failed == {"failed_A_wide_1"}


def products(module: torch.fx.GraphModule) -> int:
    """Calls that compute, without those that take a stack apart or put it together."""
    cheap = ("getitem", "stack", "cat", "getattr", "select")
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return sum(getattr(node.target, "__name__", "") not in cheap for node in calls)


def test_depth_adds_no_calls() -> None:
    programs = [Program(recorded(d).curvature, batched=True) for d in (2, 8)]
    assert products(programs[0].refresh_module) == products(programs[1].refresh_module)
    alone = [Program(recorded(d).curvature) for d in (2, 8)]
    assert products(alone[0].refresh_module) < products(alone[1].refresh_module)

    def inverted(program: Program) -> int:
        nodes = program.apply_module.graph.nodes
        return sum(node.op == "call_function" and "product" in node.name for node in nodes)

    assert inverted(programs[0]) == inverted(programs[1])


def test_compiling_batches() -> None:
    """Only a compiled program stacks blocks of equal shapes; both give the same updates."""
    pre = recorded(2, compile="eager")
    plain = recorded(2)
    assert "stack" in pre.program.apply_module.code
    assert "stack" not in plain.program.apply_module.code
    gradients = random_gradients(pre)
    ours, theirs = pre.apply(copy.copy(gradients)), plain.apply(gradients)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tikhonov", ["factored", "exact", "ekfac"])
def test_stacks_follow_the_inverses(tikhonov: str) -> None:
    """Made once for a set of inverses, and anew when some or all of them change."""
    runs = []
    for compile in (False, "eager"):
        pre = recorded(3, tikhonov=tikhonov, compile=compile)
        generator = torch.Generator().manual_seed(1)
        found = []
        for change in ("none", "fold", "refresh", "load"):
            if change == "fold":
                twice = {
                    StatisticKey(of.holder.slot, spec.name): 2 * average.read()
                    for of in estimate_of(pre).all
                    for spec, average in zip(of.holder.factors, of.all, strict=True)
                }
                assert pre.inverse.fold(twice, 0.5)
            elif change == "refresh":
                pre.refresh()
            elif change == "load":
                pre.load_state_dict(pre.state_dict())
            parameters = covered(pre).items()
            gradients = {
                n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters
            }
            found.append(pre.apply(gradients))
        runs.append(found)
    for plain, stacked in zip(*runs, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(stacked[name], value, rtol=1e-9, atol=1e-12)


def test_stacks_of_a_refresh_take_no_memory() -> None:
    pre = recorded(3, compile="eager")
    pre.apply(random_gradients(pre))
    kept = pre.program._stacks
    assert (
        kept is not None
        and kept._stacks
        and all(
            stack.data_ptr() == parts[0].data_ptr()
            for stack, parts in zip(kept._stacks, kept._parts, strict=True)
        )
    )


def test_joined() -> None:
    """Slices of one tensor are joined without a copy, everything else is stacked."""
    whole = torch.randn(4, 2, 3)
    pieces = list(whole.unbind())
    assert joined(pieces).data_ptr() == whole.data_ptr() and torch.equal(joined(pieces), whole)
    for parts in (
        pieces[::-1],
        [pieces[0], pieces[2]],
        [p.clone() for p in pieces],
        [pieces[0], pieces[1].mT.clone().mT, pieces[2]],
        [whole.as_strided((2, 2), (2, 1)), whole.as_strided((2, 2), (1, 2), 4)],
    ):
        assert torch.equal(joined(parts), torch.stack(parts))
        assert joined(parts).data_ptr() != parts[0].data_ptr()
    flipped = list(torch.randn(3, 5, 5).mT.unbind())  # as cholesky_inverse returns them
    assert joined(flipped).data_ptr() == flipped[0].data_ptr()
    assert torch.equal(joined(flipped), torch.stack(flipped))
