"""A training run that saves after every step and goes on from what it finds; see test_killed."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

import kfac_fx

STEPS = 120


def train(file: Path, progress: Connection | None = None) -> None:
    """Trains until ``STEPS``; ``file`` always holds the last complete checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.2)),
        *(nn.Flatten(), nn.Linear(12, 3)),
    )
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0, refresh_every=5)
    data = torch.Generator().manual_seed(1)
    step = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        data.set_state(state["data"])
        step = state["step"]
    while step < STEPS:
        x = torch.randn(32, 1, 4, 4, generator=data)
        optimizer.step(x, x.flatten(1)[:, :3].argmax(1))
        step += 1
        save(file, model, optimizer, data, step)
        if progress is not None:
            progress.send(step)


def save(
    file: Path, model: nn.Module, optimizer: kfac_fx.KFAC, data: torch.Generator, step: int
) -> None:
    """The old checkpoint stays until the new one is complete."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "data": data.get_state(),
        "step": step,
    }
    torch.save(state, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)
