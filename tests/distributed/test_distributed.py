"""Several processes with shares of a batch equal one process with the whole batch."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.asserts import assert_same
from support.processes import run_in_world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfac_fx
from kfac_fx import errors
from kfac_fx.distributed import DataParallel
from kfac_fx.linalg.packing import packed, packed_size, unpacked
from kfac_fx.optim import KFACOptions
from kfac_fx.parallel import ALONE

STRUCTURES = ("block_diagonal", "block_tridiagonal")
BATCHES = (12, 12, 7, 3)  # of four processes one has no case of the last
STEPS = 50

Parameters = dict[str, Tensor]


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        *(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(12, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh()),
        nn.Linear(7, 3),
    )
    return nn.Sequential(*layers).double()


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = []
    for size in BATCHES:
        x = torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64)
        data.append((x, x.flatten(1)[:, :3].cumsum(1).argmax(1)))
    return [data[step % len(data)] for step in range(steps)]


def share(values: Tensor, size: int) -> Tensor:
    """Case i is with process i modulo the number of processes."""
    return values if size == 1 else values[dist.get_rank() :: size]


def with_preconditioner(kind: str, structure: str, fisher: str, size: int) -> Parameters:
    """SGD after a Preconditioner, "alone" or in several processes.

    "loop" is a plain all-reduce, "inputs" too, with statistics from passes of their own.
    """
    model = build()
    net = kfac_fx.transform(model, structure=structure)
    run: Any = net
    if kind == "ddp":
        run = DistributedDataParallel(net)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(net.get_submodule("4"), mesh=mesh)
        fully_shard(net, mesh=mesh)
    workers = ALONE if kind == "alone" else DataParallel(bucket_bytes=600, memory_fraction=0.5)
    options = {"fisher": fisher, "refresh_every": 4, "statistics_every": 2, "trust_region": 0.05}
    preconditioner = kfac_fx.Preconditioner(run, damping=1e-2, workers=workers, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5)
    for x, y in batches():
        optimizer.zero_grad()
        targets = share(y, size)
        outputs = run(share(x, size))
        # The average over processes, of any numbers of cases, is to be the mean over the batch.
        scale = len(y) if kind in ("alone", "loop", "inputs") else len(y) / size
        loss = F.cross_entropy(outputs, targets, reduction="sum") / scale
        preconditioner.observe(
            outputs, targets, inputs=share(x, size) if kind == "inputs" else None
        )
        loss.backward()
        if kind in ("loop", "inputs"):
            for p in net.parameters():
                dist.all_reduce(p.grad)
        preconditioner.step()
        optimizer.step()
    assert preconditioner.skipped_gradients == preconditioner.skipped_statistics == 0
    return whole(net)


def whole(net: nn.Module) -> Parameters:
    full = (getattr(p, "full_tensor", lambda p=p: p)() for p in net.parameters())
    names = (name for name, _ in net.named_parameters())
    return {name: p.detach().clone() for name, p in zip(names, full, strict=True)}


def with_kfac(kind: str, structure: str, lr: float | None, size: int) -> dict[str, Any]:
    """The whole optimizer: "alone", "ddp" or "fsdp"; its parameters and its decisions."""
    net = kfac_fx.transform(build(), structure=structure)
    run: Any = DistributedDataParallel(net) if kind == "ddp" else net
    if kind == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    workers = ALONE if kind == "alone" else DataParallel(memory_fraction=0.5)
    optimizer = kfac_fx.KFAC(
        run,
        workers=workers,
        lr=lr,
        momentum=0.5,
        fisher="exact",
        damping=1.0,
        refresh_every=3,
        options=KFACOptions(gamma_every=4, outlier=1.5),
    )
    decisions = []
    for step, (x, y) in enumerate(batches()):
        x = x.index_fill(0, torch.tensor([1]), float("nan")) if step == 20 else x
        y = (y + 1) % 3 if step in (29, 32) else y  # outliers
        optimizer.step(share(x, size), share(y, size))
        found = optimizer.diagnostics
        decisions.append([found.get(name, 0.0) for name in DECIDED])
    counts = (optimizer.skipped_batches, optimizer.rejected_steps, optimizer.skipped_statistics)
    return {"parameters": whole(net), "decisions": torch.tensor(decisions), "counts": counts}


DECIDED = ("loss", "damping", "gamma", "rho", "alpha", "mu", "model", "share")


def draws() -> dict[str, Any]:
    """Of sampled statistics in two processes that see the same cases."""
    net = kfac_fx.transform(build())
    preconditioner = kfac_fx.Preconditioner(net, fisher="sampled", workers=DataParallel())
    seeds = []
    for x, y in batches(3):
        outputs = net(x)
        preconditioner.observe(outputs)
        F.cross_entropy(outputs, y).backward()
        preconditioner.step()
        seeds.append(preconditioner.generator.get_state())
    G = preconditioner.factors["9"][1].clone()
    return {"G": G, "stream": torch.stack(seeds), "gradients": [p.grad for p in net.parameters()]}


def mistakes() -> dict[str, str]:
    """What is said of processes that do not do the same, or that were not told of each other."""
    said: dict[str, str] = {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except errors.KFACError as error:
            said[name] = f"{type(error).__name__}: {error}"

    rank, net = dist.get_rank(), kfac_fx.transform(build())
    attempt("no workers", lambda: kfac_fx.Preconditioner(DistributedDataParallel(net)))
    sharded = kfac_fx.transform(build())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    attempt("shards, no workers", lambda: kfac_fx.Preconditioner(sharded))
    other = kfac_fx.transform(nn.Linear(2, 2 + rank))
    attempt("other networks", lambda: kfac_fx.Preconditioner(other, workers=DataParallel()))
    torch.manual_seed(rank)
    drawn = kfac_fx.transform(nn.Linear(2, 2))
    attempt("other values", lambda: kfac_fx.Preconditioner(drawn, workers=DataParallel()))
    preconditioner = kfac_fx.Preconditioner(net, workers=DataParallel())
    x, y = batches(1)[0]
    outputs = net(x)
    loss = F.cross_entropy(outputs, y)
    if rank == 0:
        attempt("other calls", lambda: preconditioner.observe(outputs))
    else:
        loss.backward()
        attempt("other calls", preconditioner.step)
    late = DataParallel(timeout=1.0)
    if rank == 0:
        attempt("late", lambda: late.agree("a call"))
    else:
        time.sleep(2.5)
    return said


PRECONDITIONED = [
    *(("ddp", structure, "exact") for structure in STRUCTURES),
    *(("fsdp", structure, "exact") for structure in STRUCTURES),
    ("loop", "block_tridiagonal", "empirical"),
    ("inputs", "block_tridiagonal", "exact"),
]
OPTIMIZED = [
    ("ddp", "block_tridiagonal", None),
    ("fsdp", "block_diagonal", None),
    ("ddp", "block_diagonal", 0.1),
]


FEW = {
    ("ddp", "block_tridiagonal", "exact"),
    ("fsdp", "block_diagonal", "exact"),
    ("loop", "block_tridiagonal", "empirical"),
    ("ddp", "block_tridiagonal", None),
}
"""What the quick tests run."""


def runs(size: int, all_of_them: bool) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for kind, structure, fisher in PRECONDITIONED:
        if all_of_them or (kind, structure, fisher) in FEW:
            found[kind, structure, fisher] = with_preconditioner(kind, structure, fisher, size)
    found["draws"], found["mistakes"] = draws(), mistakes()
    for kind, structure, lr in OPTIMIZED:
        if all_of_them or (kind, structure, lr) in FEW:
            found[kind, structure, lr] = with_kfac(kind, structure, lr, size)
    return found


SLOW = [pytest.param((size, True), marks=pytest.mark.slow) for size in (2, 4)]


@pytest.fixture(scope="module", params=[(2, False), *SLOW], ids=["2, few", "2", "4"])
def world(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    """What each of two or four processes found."""
    found = run_in_world(request.param[0], runs, *request.param)
    assert all(isinstance(one, dict) for one in found), found
    return found


@pytest.mark.parametrize(("kind", "structure", "fisher"), PRECONDITIONED)
def test_preconditioner(world: Any, kind: str, structure: str, fisher: str) -> None:
    """Parameters are those of one process with the whole batch, and equal everywhere."""
    if (kind, structure, fisher) not in world[0]:
        pytest.skip("in the slow tests")
    alone = with_preconditioner("alone", structure, fisher, 1)
    before = whole(build())
    assert max(float((alone[n] - before[n]).abs().max()) for n in alone) > 0.1
    for found in world:
        assert_same(found[kind, structure, fisher], alone, rtol=0, atol=1e-8)
        assert_same(
            found[kind, structure, fisher], world[0][kind, structure, fisher], rtol=0, atol=0.0
        )


@pytest.mark.parametrize(("kind", "structure", "lr"), OPTIMIZED)
def test_kfac(world: Any, kind: str, structure: str, lr: float | None) -> None:
    """Skipped batches and the change of form: what one process decides, all decide."""
    if (kind, structure, lr) not in world[0]:
        pytest.skip("in the slow tests")
    alone = with_kfac("alone", structure, lr, 1)
    assert alone["counts"][0] >= 1
    # Without a rate the first steps are those of the model, and batches this small disagree.
    modelled = alone["decisions"][:, DECIDED.index("model")] != 0
    assert lr is not None or (modelled[:4].all() and not modelled[-4:].any())
    for found in world:
        one = found[kind, structure, lr]
        assert_same(one["parameters"], alone["parameters"], rtol=0, atol=1e-6)
        assert_same(
            one["parameters"], world[0][kind, structure, lr]["parameters"], rtol=0, atol=0.0
        )
        assert one["counts"] == alone["counts"]
        torch.testing.assert_close(one["decisions"], alone["decisions"], rtol=1e-5, atol=1e-6)


def test_draws_are_each_process_own(world: Any) -> None:
    """From one stream of seeds; the statistics are the average of the processes' draws."""
    first, second = (found["draws"] for found in world[:2])
    assert torch.equal(first["G"], second["G"])
    assert torch.equal(first["stream"], second["stream"])
    torch.manual_seed(100)  # what the first process made its generator from
    net = kfac_fx.transform(build())
    alone = kfac_fx.Preconditioner(net, fisher="sampled")
    for x, y in batches(3):
        outputs = net(x)
        alone.observe(outputs)
        F.cross_entropy(outputs, y).backward()
        alone.step()
    assert float((alone.factors["9"][1] - first["G"]).norm()) > 1e-2 * float(first["G"].norm())


def test_mistakes_are_named(world: Any) -> None:
    for rank, found in enumerate(world):
        said = found["mistakes"]
        assert "give workers=kfac_fx.distributed.DataParallel()" in said["no workers"]
        assert "sharded (DTensor)" in said["shards, no workers"]
        assert said["other networks"].startswith("DesynchronisedError"), rank
        assert "parameters differ" in said["other values"]
        assert rank > 0 or said["late"].startswith("WorkerLostError: process 0 of"), said
        assert "process 0: call" in said["other calls"] and "'step'" in said["other calls"]


def test_no_process_group() -> None:
    with pytest.raises(errors.UnknownOptionError, match="init_process_group"):
        DataParallel()


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("n", range(1, 10))
def test_symmetric_matrices_travel_as_halves(n: int, lead: tuple[int, ...]) -> None:
    M = torch.randn(*lead, n, n)
    M = M + M.mT
    flat = packed(M)
    assert flat.numel() == packed_size(M.shape) == M[..., 0, 0].numel() * n * (n + 1) // 2
    assert torch.equal(unpacked(flat, M.shape), M)
