"""Checkpoints of several processes: any number of them goes on, and none waits for a dead one."""

from __future__ import annotations

import multiprocessing
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.asserts import assert_same
from support.processes import PRELOADED, free_port, run_in_world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfac_fx
from kfac_fx import errors
from kfac_fx.distributed import Checkpoints, DataParallel
from kfac_fx.parallel import ALONE

KINDS = ("ddp", "fsdp", "kfac", "stale")
STEPS = 12
HALF = 7


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


class Run:
    """A network in training, alone or in several processes."""

    def __init__(self, kind: str, fisher: str = "exact", timeout: float = 30.0) -> None:
        several = dist.is_initialized()
        self.size = dist.get_world_size() if several else 1
        stale = 2 if kind == "stale" and several else 0
        options: dict[str, Any] = {"memory_fraction": 0.0, "staleness": stale, "timeout": timeout}
        self.workers = DataParallel(**options) if several else None
        self.net = kfac_fx.transform(build().double())
        run: Any = self.net
        if several and kind == "fsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (self.size,)))
        elif several and kind in ("ddp", "stale"):
            run = DistributedDataParallel(self.net)
        self.run, self.kind = run, kind
        given: dict[str, Any] = {"fisher": fisher, "workers": self.workers or ALONE}
        if kind == "kfac":
            self.kfac: Any = kfac_fx.KFAC(run, damping=1.0, refresh_every=3, **given)
            self.parts = {"net": run, "kfac": self.kfac}
            return
        self.kfac = kfac_fx.Preconditioner(run, damping=1e-2, refresh_every=3, **given)
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.parts = {"net": run, "kfac": self.kfac, "sgd": self.sgd}

    def step(self, step: int) -> None:
        x, y = (
            values[self.workers.rank if self.workers else 0 :: self.size] for values in batch(step)
        )
        if self.kind == "kfac":
            self.kfac.step(x, y)
            return
        self.sgd.zero_grad()
        outputs = self.run(x)
        self.kfac.observe(outputs)
        F.cross_entropy(outputs, y).backward()
        self.kfac.step()
        self.sgd.step()

    def parameters(self) -> dict[str, Tensor]:
        whole = {
            n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in self.net.named_parameters()
        }
        return {name: value.detach().clone() for name, value in whole.items()}


def begin(folder: str) -> dict[str, Any]:
    """Trains, saves half-way, and goes on."""
    found = {}
    for kind in KINDS:
        run = Run(kind)
        checkpoints = Checkpoints(Path(folder) / kind, run.workers)
        for step in range(STEPS):
            if step == HALF:
                checkpoints.save(step, **run.parts)
            run.step(step)
        found[kind] = run.parameters()
    return found


def go_on(folder: str, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Goes on from there, in another number of processes."""
    found = {}
    for kind in kinds:
        run = Run(kind)
        with torch.no_grad():
            for p in run.net.parameters():
                p.zero_()
        loaded = Checkpoints(Path(folder) / kind, run.workers).load(**run.parts)
        assert loaded == HALF
        for step in range(loaded, STEPS):
            run.step(step)
        found[kind] = run.parameters()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    found = run_in_world(2, begin, folder)
    assert all(isinstance(one, dict) for one in found), found
    return folder, found


def test_one_process_goes_on(saved: Any) -> None:
    folder, found = saved
    alone = go_on(folder, ("ddp", "fsdp", "kfac"))
    for kind, parameters in alone.items():
        assert_same(parameters, found[0][kind], rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_so_many_processes_go_on(saved: Any, size: int) -> None:
    """Two, bitwise; and four, of which one has no block: inverses are with their owners."""
    folder, found = saved
    for one in run_in_world(size, go_on, folder):
        assert isinstance(one, dict), one
        for kind, parameters in one.items():
            assert_same(parameters, found[0][kind], rtol=0, atol=0.0 if size == 2 else 1e-9)


def test_every_tensor_is_written_once(saved: Any) -> None:
    folder, _ = saved
    source = Path(folder) / "ddp" / f"step-{HALF:09d}"
    written = sum(file.stat().st_size for file in source.glob("*.distcp"))
    assert len(list(source.glob("*.distcp"))) == 2  # by both processes
    run = Run("ddp")
    for step in range(HALF):
        run.step(step)
    entries = sum(p.numel() for p in run.net.parameters()) * 2  # with momentum
    held = run.kfac.state_dict()["inverse"]
    entries += sum(v.numel() for v in held["inverses"].values())
    entries += sum(v.numel() for group in held["averages"]["factors"].values() for v in group)
    # Of each tensor there is a header; the generator's state has 5,056 bytes.
    assert 8 * entries < written < 8 * entries + 5056 + 2500 * 60


def test_what_does_not_fit(tmp_path: Path) -> None:
    run = Run("ddp")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.load(**run.parts) is None
    run.step(0)
    checkpoints.save(1, **run.parts)
    run.step(1)
    checkpoints.save(2, **run.parts)
    assert checkpoints.steps() == [2]
    with pytest.raises(errors.CheckpointError, match="has the parts"):
        checkpoints.load(net=run.net)
    other = kfac_fx.transform(nn.Sequential(nn.Linear(6, 3)).double())
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(errors.CheckpointError, match="could not be read"):
        checkpoints.load(net=other, kfac=kfac_fx.Preconditioner(other), sgd=sgd)
    (tmp_path / ".step-000000003").mkdir()  # of a process that ended while it wrote
    assert checkpoints.load(**run.parts) == 2
    with pytest.raises(errors.CheckpointError, match="together with its network"):
        checkpoints.save(4, sgd=run.sgd)
    state = run.kfac.state_dict()
    state["inverse"]["inverses"].popitem()
    state["inverse"]["inverses"].pop(next(iter(state["inverse"]["inverses"])))
    with pytest.raises(errors.ParameterChangedError, match="another number of them"):
        run.kfac.load_state_dict(state)


# Processes that end.

LIMIT = 20.0
"""Seconds that a process waits for the others."""


def worker(rank: int, port: int, folder: str, steps: int) -> None:
    """Trains from the last checkpoint on; what it ends with is written to a file."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    path = Path(folder)
    try:
        run = Run("ddp", fisher="sampled", timeout=LIMIT)
        assert run.workers is not None
        checkpoints = Checkpoints(path / "checkpoints", run.workers)
        for step in range(checkpoints.load(**run.parts) or 0, steps):
            if step % 5 == 0:
                checkpoints.save(step, **run.parts)
            (path / f"step-{rank}").write_text(str(step))
            with run.workers.watching():
                run.step(step)
            time.sleep(0.02)
        if rank == 0:
            torch.save(run.parameters(), path / "parameters.pt")
        (path / f"said-{rank}").write_text("finished")
        dist.barrier()
    except errors.KFACError as error:
        (path / f"said-{rank}").write_text(f"{type(error).__name__}: {error}")


def start(folder: Path, steps: int) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    for name in ("step-0", "step-1", "said-0", "said-1"):
        (folder / name).unlink(missing_ok=True)
    processes = [
        context.Process(target=worker, args=(rank, port, str(folder), steps)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a process hangs"


def killed(folder: Path, steps: int, victim: int, at: int) -> str:
    """Kills a process when it is at a step; returns what the other one said."""
    processes = start(folder, steps)
    file, end = folder / f"step-{victim}", time.monotonic() + 60
    while int("0" + (file.read_text() if file.exists() else "")) < at:
        assert time.monotonic() < end and processes[victim].is_alive(), "it never came there"
        time.sleep(0.002)
    processes[victim].kill()
    wait(processes, LIMIT + 10)
    return (folder / f"said-{1 - victim}").read_text()


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_processes(tmp_path: Path, kills: int) -> None:
    """kill -9 of one: the other ends with WorkerLostError, and both go on to the same end."""
    chance = random.Random(kills)
    steps = 10 * (kills + 1)
    plain = tmp_path / "plain"
    plain.mkdir()
    wait(start(plain, steps), 60 + steps)
    run = tmp_path / "killed"
    run.mkdir()
    for kill in range(kills):
        said = killed(run, steps, chance.randrange(2), 10 * kill + chance.randrange(3, 9))
        assert said.startswith("WorkerLostError: process "), said
        assert "start again from a checkpoint" in said
    wait(start(run, steps), 60 + steps)
    assert (run / "said-0").read_text() == "finished"
    one, other = (torch.load(folder / "parameters.pt") for folder in (plain, run))
    assert_same(one, other, rtol=0, atol=0.0)
