"""The refresh divided over processes: who computes, who keeps, what is sent, how old it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.inside import fold, refreshed
from support.processes import run_in_world
from support.steps import numbered_batch
from torch import Tensor, nn

import kfac_fx
from kfac_fx import errors
from kfac_fx.codegen.program import Program
from kfac_fx.codegen.refresh_module import Refreshed
from kfac_fx.distributed import Compute, DataParallel, Network, Plan, measured_costs, simulate
from kfac_fx.distributed.costs import apply_operations, refresh_costs
from kfac_fx.distributed.division import divide
from kfac_fx.ir.coupling import Coupling
from kfac_fx.parallel import ALONE

STRUCTURES = ("block_diagonal", "block_tridiagonal")
FRACTIONS = (1.0, 0.4, 0.0)
WIDTHS = (10, 9, 8, 9, 7, 3)


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in pairwise(WIDTHS)]
    return nn.Sequential(*layers, nn.LayerNorm(3)).double()


def train(
    net: nn.Module, preconditioner: Any, steps: int, share: slice, at_step: Any = None
) -> None:
    """Plain gradient descent; every process has the whole batch's gradient."""
    for step in range(steps):
        x, y = numbered_batch(step, 8, WIDTHS[0])
        outputs = net(x[share])
        preconditioner.observe(outputs)
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        if at_step is not None:
            at_step(step)
        preconditioner.step()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad


def trained(
    structure: str, workers: Any, share: slice, cut: bool = False, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    sides = {"max_factor_dim": 6, "large_factors": "blocks"} if cut else {}
    net = kfac_fx.transform(build(), structure=structure, **sides)
    periods = {"statistics_every": 1, "refresh_every": 2}
    given = {"fisher": "exact", "damping": 1e-2} | periods | options
    preconditioner = kfac_fx.Preconditioner(net, workers=workers, **given)
    train(net, preconditioner, 9, share)
    return preconditioner, {n: p.detach().clone() for n, p in net.named_parameters()}


def entries(refreshed: Refreshed) -> int:
    """Of all inverses."""
    return sum(value.numel() for value in refreshed.inverses.values())


def cases() -> dict[Any, Any]:
    """All fractions and structures, in one process of several."""
    torch.set_default_dtype(torch.float64)
    found: dict[Any, Any] = {}
    for structure in STRUCTURES:
        for fraction in FRACTIONS:
            workers = DataParallel(memory_fraction=fraction)
            share = slice(workers.rank, None, workers.size)
            preconditioner, parameters = trained(structure, workers, share)
            inverses = refreshed(preconditioner)
            found[structure, fraction] = {
                "parameters": parameters,
                "entries": entries(inverses),
                "traffic": dict(workers.traffic),
                "owner": dict(preconditioner.inverse._engine.division.owner),
                "everywhere": set(preconditioner.inverse._engine.division.everywhere),
            }
    found["cut"] = {}
    for fraction in FRACTIONS:
        workers = DataParallel(memory_fraction=fraction)
        share = slice(workers.rank, None, workers.size)
        found["cut"][fraction] = trained("block_diagonal", workers, share, cut=True)[1]
    found["stale"] = {s: stale(s) for s in (1, 2)}
    found["mistakes"] = mistakes()
    return found


def stale(staleness: int) -> dict[str, Tensor]:
    workers = DataParallel(memory_fraction=0.5, staleness=staleness)
    share = slice(workers.rank, None, workers.size)
    return trained("block_tridiagonal", workers, share)[1]


def mistakes() -> list[str]:
    said = []
    for options, make in (
        ({"memory_fraction": 1.5}, None),
        ({"staleness": 1}, lambda net, w: kfac_fx.KFAC(net, workers=w)),
        (
            {"memory_fraction": 0.0},
            lambda net, w: kfac_fx.Preconditioner(net, tikhonov="ekfac", workers=w),
        ),
    ):
        try:
            net = kfac_fx.transform(build(), structure="block_diagonal", ekfac=True)
            workers = DataParallel(**options)
            make(net, workers)
        except errors.UnknownOptionError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    found = run_in_world(request.param, cases)
    assert all(isinstance(one, dict) for one in found), found
    return found


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_parameters(world: Any, structure: str, fraction: float, float64: None) -> None:
    """Who computes and who keeps inverses makes no difference to the parameters."""
    _, alone = trained(structure, ALONE, slice(None))
    for one in world:
        for name, value in one[structure, fraction]["parameters"].items():
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-8)
            assert torch.equal(value, world[0][structure, fraction]["parameters"][name])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_sides_that_are_cut(world: Any, fraction: float, float64: None) -> None:
    """Sub-blocks, which long sides are by default, travel and are divided like whole matrices."""
    preconditioner, alone = trained("block_diagonal", ALONE, slice(None), cut=True)
    assert any(
        len(side) == 3 for b in preconditioner.curvature.blocks.values() for side in b.dimensions
    )
    for one in world:
        for name, value in one["cut"][fraction].items():
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_memory_falls(world: Any, structure: str, float64: None) -> None:
    """Of all entries each process holds what fraction says, and its part of the rest."""
    preconditioner, _ = trained(structure, ALONE, slice(None))
    whole = entries(refreshed(preconditioner))
    held = {f: [one[structure, f]["entries"] for one in world] for f in FRACTIONS}
    assert held[1.0] == [whole] * len(world)
    assert sum(held[0.0]) == whole
    assert max(held[0.0]) <= 1.5 * whole / len(world)
    keys = preconditioner.program.inverses_of(world[0][structure, 0.4]["everywhere"])
    inverses = refreshed(preconditioner).inverses
    everywhere = sum(inverses[key].numel() for key in keys)
    assert 0 < everywhere <= 0.4 * whole
    assert sum(held[0.4]) == whole + (len(world) - 1) * everywhere


@pytest.mark.parametrize("structure", STRUCTURES)
def test_bytes_on_paper(world: Any, structure: str, float64: None) -> None:
    """9 steps with statistics, 5 refreshes, float64."""
    net = kfac_fx.transform(build(), structure=structure)
    statistics = inverses = 0
    parent = dict(net.curvature.parent)
    flags = 0
    for block in net.curvature.blocks.values():
        statistics += sum(n * (n + 1) // 2 for n, _ in block.dimensions)
        flags += len(block.factors)
    for pair in net.curvature.pairs:
        statistics += sum(prod(factor.shape) for factor in pair.factors)
        flags += 2
    for rank, one in enumerate(world):
        assert one[structure, 1.0]["traffic"]["statistics"] == 9 * 8 * (statistics + flags), rank
    sizes = {b.name: [side[0] for side in b.dimensions] for b in net.curvature.blocks.values()}
    complete = {}  # child -> which of the pair has both sides the smaller
    for child, above in parent.items():
        pairs = list(zip(sizes[child], sizes[above], strict=True))
        if all(one <= two for one, two in pairs):
            complete[child] = child
        elif all(one >= two for one, two in pairs):
            complete[child] = above
    for name, own in sizes.items():
        if name not in parent or name not in complete.values():
            inverses += sum(n * (n + 1) // 2 for n in own)
    for child, above in parent.items():
        (A, G), (A_p, G_p) = sizes[child], sizes[above]
        k_A, k_G = min(A, A_p), min(G, G_p)
        inverses += k_A * (A + A_p) + k_G * (G + G_p) + k_A * k_G  # L and R of both sides, scale
        if child not in complete:
            inverses += k_A + k_G
    assert world[0][structure, 1.0]["traffic"]["inverses"] == 5 * 8 * inverses
    updates = 0
    owner = world[0][structure, 0.0]["owner"]
    for rank in range(len(world)):
        own = {name for name, by in owner.items() if by == rank}
        touched = own | {parent[name] for name in own if name in parent}
        updates += sum(net.curvature.blocks[name].parameter_count for name in touched)
    assert world[0][structure, 0.0]["traffic"]["updates"] == 9 * 8 * updates
    assert "updates" not in world[0][structure, 1.0]["traffic"]
    assert world[0][structure, 0.0]["traffic"].get("inverses", 0) == 0


@pytest.mark.parametrize("staleness", [1, 2])
def test_stale_inverses(world: Any, staleness: int, float64: None) -> None:
    """Those of refresh k are used from refresh k + staleness on, the first at once."""
    net = kfac_fx.transform(build(), structure="block_tridiagonal")
    periods = {"statistics_every": 1, "refresh_every": 1000}
    preconditioner = kfac_fx.Preconditioner(net, fisher="exact", damping=1e-2, **periods)
    made: list[Refreshed] = []

    def refresh(step: int) -> None:
        fold(preconditioner)  # as step() does before it refreshes
        preconditioner.recorder.switch(False)
        if step % 2 == 0:
            preconditioner.refresh()
            made.append(refreshed(preconditioner))
        used = max(0, len(made) - 1 - staleness)
        preconditioner.inverse.use(made[used])

    train(net, preconditioner, 9, slice(None), refresh)
    for one in world:
        for name, value in net.named_parameters():
            torch.testing.assert_close(one["stale"][staleness][name], value, rtol=0, atol=1e-8)


def test_mistakes(world: Any) -> None:
    """Fractions out of range, and options that a division cannot serve, are errors."""
    for one in world:
        fraction, stale, ekfac = one["mistakes"]
        assert "memory_fraction lie in [0, 1]" in fraction
        assert "stale inverses need an lr" in stale
        assert "needs all inverses" in ekfac


# The division itself.


def test_longest_processing_time_first() -> None:
    costs = {"a": 7.0, "b": 5.0, "c": 4.0, "d": 3.0, "e": 3.0, "f": 2.0}
    ones = dict.fromkeys(costs, 1)
    found = divide(2, (), costs, ones, ones, 1.0)
    assert found.everywhere == set(costs)
    loads = [sum(costs[name] for name in found.computed_by(rank)) for rank in (0, 1)]
    assert loads == [12.0, 12.0]


def test_trees_stay_together_up_to_their_share() -> None:
    costs = dict.fromkeys("abcdef", 1.0)
    ones = dict.fromkeys(costs, 1)
    pairs = [Coupling("a", "b"), Coupling("b", "c"), Coupling("d", "e"), Coupling("e", "f")]
    found = divide(2, pairs, costs, ones, ones, 0.0)
    assert {frozenset(found.computed_by(rank)) for rank in (0, 1)} == {
        frozenset("abc"),
        frozenset("def"),
    }
    chain = [Coupling(one, other) for one, other in zip("abcde", "bcdef", strict=True)]
    found = divide(3, chain, costs, ones, ones, 0.0)
    assert sorted(map(len, map(found.computed_by, range(3)))) == [2, 2, 2]
    assert all("".join(found.computed_by(rank)) in "abcdef" for rank in range(3))


def test_memory_goes_to_what_saves_communication() -> None:
    """Large gradients with small inverses are kept everywhere first."""
    costs = {"wide": 1.0, "deep": 1.0, "tiny": 1.0}
    found = divide(
        2,
        (),
        costs,
        {"wide": 100, "deep": 100, "tiny": 10},
        {"wide": 200, "deep": 20, "tiny": 5},
        0.55,
    )
    assert found.everywhere == {"wide", "tiny"}


def test_a_coupled_layer_costs_more() -> None:
    diagonal = kfac_fx.transform(build(), structure="block_diagonal").curvature
    coupled = kfac_fx.transform(build()).curvature
    before = refresh_costs(Program(diagonal))
    after = refresh_costs(Program(coupled, coupled.couplings))
    assert all(after[child] > before[child] for child in coupled.parent)
    assert sum(after.values()) > 2 * sum(before.values())
    assert refresh_costs(Program(diagonal, tikhonov="exact"))["0.0"] > 4 * before["0.0"]


def test_operations_of_an_apply() -> None:
    """G V A of each layer; a pair adds what its code multiplies."""
    curvature = kfac_fx.transform(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)))
    curvature = curvature.curvature
    alone = 2 * (5 * 8 * (5 + 8) + 3 * 6 * (3 + 6))
    assert apply_operations(Program(curvature)) == alone
    assert alone < apply_operations(Program(curvature, curvature.couplings)) < 4 * alone


# The simulator.


def unit_costs(program: Any) -> Compute:
    costs = refresh_costs(program)
    return Compute(1.0, 0.5, 0.2, {name: 1e-3 * cost for name, cost in costs.items()})


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_simulated_bytes_and_memory(
    world: Any, structure: str, fraction: float, float64: None
) -> None:
    """Equal to what was counted."""
    program = trained(structure, ALONE, slice(None))[0].program
    plan = Plan(len(world), memory_fraction=fraction, itemsize=8)
    found = simulate(program, unit_costs(program), Network(1e-5, 1e9), plan)
    traffic = world[0][structure, fraction]["traffic"]
    assert 9 * found.messages["statistics"] == traffic["statistics"]
    assert 5 * found.messages["inverses"] == traffic.get("inverses", 0)
    assert 9 * found.messages["updates"] == traffic.get("updates", 0)
    assert found.memory["inverses"] == 8 * max(one[structure, fraction]["entries"] for one in world)


def test_simulated_seconds() -> None:
    """By hand, for one block everywhere: 2 (W - 1) / W of the bytes, 2 log2 W messages."""
    net = kfac_fx.transform(nn.Linear(3, 2, bias=False), structure="block_diagonal")
    program = Program(net.curvature)
    name = next(iter(net.curvature.blocks))
    compute = Compute(1.0, 0.5, 0.2, {name: 10.0})
    links = Network(latency=0.1, bandwidth=100.0, handshake=0.01, packing=0.001)
    plan = Plan(4, statistics_every=2, refresh_every=10)
    found = simulate(program, compute, links, plan)
    halves = 4 * (6 + 3)  # A and G, 3 x 3 and 2 x 2, in float32; two flags come with them
    assert found.messages == {
        "gradients": 24,
        "statistics": halves + 8,
        "inverses": halves,
        "updates": 0,
    }
    sums = 2 * (0.75 * 24 / 100 + 0.2) + 2 * (0.75 * (halves + 8) / 100 + 0.2) / 2
    expected = {
        "training": 1.0,
        "statistics": 0.25,
        "apply": 0.2,
        "refresh": 1.0,
        "sums": sums,
        "inverses": (halves / 100 + 0.01 + 0.2) / 10,
        "updates": 0.0,
        "handshakes": 0.01 * 1.6,
        "packing": 0.001 * (halves / 2 + halves / 10),
    }
    assert found.seconds == pytest.approx(expected)
    hidden = simulate(program, compute, links, replace(plan, overlap=1.0))
    assert hidden.seconds["sums"] == pytest.approx(max(0.0, sums - 2 / 3))
    stale = simulate(program, compute, links, replace(plan, staleness=1))
    assert stale.seconds["refresh"] == 0.0
    assert set(simulate(program, compute, links, Plan(1)).seconds) == {
        "training",
        "statistics",
        "apply",
        "refresh",
    }
    modelled = Compute.modelled(program, {name: 5}, products=1e3, factorisations=1e3, launch=0.1)
    assert modelled.training == pytest.approx(3 * 2 * 5 * 6 / 1e3 + 0.1)
    assert modelled.statistics == pytest.approx((2 * 5 * 6 + 2 * 5 * (9 + 4)) / 1e3 + 0.1)
    assert modelled.apply == pytest.approx(2 * 6 * (3 + 2) / 1e3 + 0.1)
    assert modelled.refresh[name] == pytest.approx((27 + 8 + 6) / 1e3 + 0.1)


def test_measured_costs() -> None:
    """A time for every block, once there are statistics."""
    net = kfac_fx.transform(build().float())
    preconditioner = kfac_fx.Preconditioner(net)
    with pytest.raises(errors.StatisticsError, match="no statistics yet"):
        measured_costs(preconditioner)
    outputs = net(torch.randn(4, WIDTHS[0]))
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    found = measured_costs(preconditioner, repeats=1)
    assert list(found) == list(net.curvature.blocks)
    assert all(0 < seconds < 5 for seconds in found.values())
