"""Training processes that are killed at any moment go on where they were, bitwise."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from support import killed_run
from torch.utils import _pytree as pytree

KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_killed_twenty_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
    context = multiprocessing.get_context("forkserver")  # imports torch once for all processes
    context.set_forkserver_preload(["support.killed_run"])
    rng = random.Random(0)
    mixed, whole = tmp_path / "killed.pt", tmp_path / "whole.pt"
    for _ in range(KILLS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=killed_run.train, args=(mixed, theirs))
        process.start()
        theirs.close()
        for _ in range(rng.randint(1, 5)):
            ours.recv()
        time.sleep(rng.uniform(0, 0.03))  # in the midst of a step, or of saving
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for file in (mixed, whole):
        process = context.Process(target=killed_run.train, args=(file,))
        process.start()
        process.join()
        assert process.exitcode == 0
    one, other = (torch.load(file, weights_only=True) for file in (mixed, whole))
    assert one["step"] == killed_run.STEPS
    different = [
        pytree.keystr(path)
        for (path, a), b in zip(
            pytree.tree_flatten_with_path(one)[0], pytree.tree_leaves(other), strict=True
        )
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
    ]
    assert not different
