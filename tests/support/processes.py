"""Other processes: Python that runs a script or a line, and groups that talk over gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["torch", "kfac_fx", "kfac_fx.distributed", "torch.distributed.fsdp"]


TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def run_python(
    *arguments: str | Path,
    folder: Path = ROOT,
    timeout: float = 300,
    path: tuple[Path, ...] = (ROOT, TESTS),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a process of its own, on one thread, and return its two outputs.

    Args:
        folder: Where it runs: what it writes lies there.
        timeout: Seconds after which it is killed and the test fails.
        path: What it imports from before what is installed.
        environment: Variables beside those of this process.

    A failure shows what the process wrote on its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=timeout,
        check=False,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
        | environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _process(
    function: Callable[..., Any], rank: int, size: int, port: int, folder: str, args: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=60))
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    torch.manual_seed(100 + rank)
    try:
        result = function(*args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    with contextlib.suppress(RuntimeError):
        dist.barrier()  # the store is with the first process
    dist.destroy_process_group()


def run_in_world(
    size: int, function: Callable[..., Any], *args: Any, wait: float = 120
) -> list[Any]:
    """What ``function(*args)`` returns in each process; the text of what it raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        common = (size, port, folder, args)
        started = [
            context.Process(target=_process, args=(function, rank, *common)) for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(wait)
        hung = [rank for rank, process in enumerate(started) if process.is_alive()]
        for process in started:
            process.kill()
        assert not hung, f"processes {hung} of {size} hang"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
