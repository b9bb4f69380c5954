"""Checkpoints of all processes together, which any number of processes can go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from kfac_fx.distributed.workers import DataParallel
from kfac_fx.errors import CheckpointError
from kfac_fx.optim.kfac import KFAC
from kfac_fx.optim.preconditioner import Preconditioner
from kfac_fx.parallel import ALONE, Workers

PLAIN = "plain.json"
"""File of the plain values; it is written last, so that it says that a checkpoint is complete."""

OPEN = "__tensors__"
"""In place of a mapping of tensors, of which every process may have others."""

HERE = "__tensor__"
"""In place of a tensor; its value is the tensor's key."""


Part = Any
"""A network, an optimizer, or anything with ``state_dict`` and ``load_state_dict``."""

Parts = Mapping[str, Part]
"""Parts by the names that the user gave."""

State = Any
"""A tree of mappings and lists with tensors and plain values as leaves."""


class Checkpoints:
    """Checkpoints in a folder that all processes see, the newest last.

    A checkpoint appears under its name when it is complete, so that a process that ends while one
    is written leaves those before as they are. Tensors are written by torch.distributed.checkpoint:
    what several processes have is written once, and by turns; shards of FSDP2 by their owners.

    Args:
        folder: seen by all processes; it is made when the first checkpoint is saved.
        workers: the processes; None for one.
        keep: how many checkpoints stay; older ones are deleted after a new one is complete.
    """

    def __init__(
        self, folder: str | Path, workers: DataParallel | None = None, *, keep: int = 2
    ) -> None:
        self._folder = Path(folder)
        self._keep = keep
        self._workers: Workers = workers or ALONE
        self._group = None if workers is None else workers.group
        self._one = workers is None

    def steps(self) -> list[int]:
        """Return the steps that there are complete checkpoints of, the newest last."""
        return sorted(
            int(p.parent.name.split("-")[1]) for p in self._folder.glob(f"step-*/{PLAIN}")
        )

    def save(self, step: int, **parts: Part) -> None:
        """Write a checkpoint; all processes call it.

        Args:
            step: number of the step; a checkpoint of the same step is replaced.
            parts: the parts by name: a network (wrapped or not), its optimizer, a
                ``Preconditioner`` or ``KFAC``, and anything else with ``state_dict`` and
                ``load_state_dict``, whose state is tensors and plain values.

        Raises:
            CheckpointError: it could not be written.
            WorkerLostError, DesynchronisedError: a process has ended, or makes another call.
        """
        target = self._folder / f"step-{step:09d}"
        unfinished = self._folder / f".{target.name}"
        # All is written beside the place where checkpoints are looked for, and moved there in one
        # go: a process that ends half way leaves no half checkpoint.
        self._workers.agree(f"save {step}")
        if self._workers.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._workers.agree("folder")
        # torch.distributed.checkpoint takes a flat mapping of tensors; all else is kept as JSON.
        tensors: dict[str, Tensor] = {}
        plain = {}
        for name, state in _states(parts).items():
            plain[name] = _split(state, name, tensors)
        with _typed("written"):
            save(tensors, checkpoint_id=unfinished, process_group=self._group, no_dist=self._one)
        if self._workers.rank == 0:
            (unfinished / PLAIN).write_text(json.dumps(plain), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(self._folder / f"step-{old:09d}")
        self._workers.agree("saved")

    def load(self, **parts: Part) -> int | None:
        """Restore the parts of the newest checkpoint; return its step, None if there is none.

        Args:
            parts: the parts as they were saved, in as many processes as there are now.

        Raises:
            CheckpointError: it could not be read, or has other parts.
            ParameterChangedError: it belongs to another network.
            WorkerLostError, DesynchronisedError: a process has ended, or sees another checkpoint.
        """
        found = self.steps()
        self._workers.agree(f"load {found[-1:]}")
        if not found:
            return None
        source = self._folder / f"step-{found[-1]:09d}"
        plain = json.loads((source / PLAIN).read_text(encoding="utf-8"))
        if set(plain) != set(parts):
            raise CheckpointError(f"{source} has the parts {sorted(plain)}, not {sorted(parts)}")
        reader = FileSystemReader(source)
        shapes = reader.read_metadata().state_dict_metadata
        given = _states(parts)
        tensors: dict[str, Tensor] = {}
        for name, part in parts.items():
            unwanted = _unwanted(part, plain[name], name)
            if isinstance(part, (nn.Module, Optimizer)) and not isinstance(part, KFAC):
                _split(given[name], name, tensors)  # to be read in place, shard by shard
                continue
            # Inverses of a Preconditioner may have other shapes by now (data couplings): tensors
            # are made as the checkpoint has them, not as the part has them.
            for key, stored in shapes.items():
                if key.startswith(f"{name}/") and key not in unwanted:
                    assert isinstance(stored, TensorStorageMetadata)
                    tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        with _typed("read"):
            load(tensors, storage_reader=reader, process_group=self._group, no_dist=self._one)
        model = _model(parts)
        for name, part in parts.items():
            state = _joined(plain[name], name, tensors)
            if isinstance(part, nn.Module):
                set_model_state_dict(part, state)
            elif isinstance(part, Optimizer) and not isinstance(part, KFAC):
                set_optimizer_state_dict(model, part, state)
            else:
                part.load_state_dict(state)
        self._workers.agree("loaded")
        return found[-1]


@contextmanager
def _typed(what: str) -> Iterator[None]:
    """Turn errors of files and of torch's checkpoints inside into CheckpointError."""
    try:
        yield
    except (CheckpointException, RuntimeError, OSError) as error:
        raise CheckpointError(f"the checkpoint could not be {what}: {error}") from error


def _model(parts: Parts) -> nn.Module:
    """Return the network, by which torch names an optimizer's state."""
    for part in parts.values():
        if isinstance(part, nn.Module):
            return part
    raise CheckpointError("an optimizer is saved and loaded together with its network")


def _states(parts: Parts) -> dict[str, State]:
    """Return the state of every part; sharded tensors stay sharded."""
    found: dict[str, State] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            found[name] = get_model_state_dict(part)
        elif isinstance(part, Optimizer) and not isinstance(part, KFAC):
            found[name] = get_optimizer_state_dict(_model(parts), part)
        else:
            found[name] = part.state_dict()
    return found


def _split(value: State, key: str, tensors: dict[str, Tensor]) -> State:
    """Return the plain values; tensors go to ``tensors`` under keys that begin with ``key``."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {HERE: key}
    if isinstance(value, Mapping):
        named = {name: _split(entry, f"{key}/{name}", tensors) for name, entry in value.items()}
        # Of a mapping of tensors alone (inverses) each process may have others, so that JSON of one
        # process cannot list them; _joined takes those that it finds.
        whole = all(isinstance(entry, Tensor) for entry in value.values())
        return {OPEN: key} if whole else {str(name): entry for name, entry in named.items()}
    if isinstance(value, (list, tuple)):
        return [_split(entry, f"{key}/{place}", tensors) for place, entry in enumerate(value)]
    return value


def _joined(plain: State, key: str, tensors: Mapping[str, Tensor]) -> State:
    """Return what ``_split`` was given, with the tensors that there are."""
    if isinstance(plain, list):
        return [_joined(entry, f"{key}/{place}", tensors) for place, entry in enumerate(plain)]
    if not isinstance(plain, dict):
        return plain
    if HERE in plain:
        return tensors[key]
    if OPEN in plain:
        return {
            name.removeprefix(f"{key}/"): value
            for name, value in tensors.items()
            if name.startswith(f"{key}/")
        }
    return {name: _joined(entry, f"{key}/{name}", tensors) for name, entry in plain.items()}


def _unwanted(part: Part, plain: State, name: str) -> Collection[str]:
    """Return keys of inverses that other processes keep, which need not be read here."""
    if not isinstance(part, (KFAC, Preconditioner)):
        return ()
    inverse, prefix = part.inverse, name
    if isinstance(part, KFAC):
        plain, prefix = plain["kfac"], f"{name}/kfac"
    if plain["inverse"]["couplings"] != [[c.child, c.parent] for c in inverse.program.couplings]:
        return ()  # the program is another by then, and takes what it needs
    return {f"{prefix}/inverse/inverses/{key.name}" for key in inverse.kept_elsewhere()}
