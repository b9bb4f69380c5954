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
from kfac_fx.optim import KFAC, Preconditioner
from kfac_fx.parallel import ALONE, Workers

PLAIN = "plain.json"
OPEN = "__tensors__"
"""In place of a mapping of tensors, of which every process may have others."""

HERE = "__tensor__"
"""In place of a tensor; its value is the tensor's key."""


class Checkpoints:
    """Checkpoints in a folder that all processes see, the newest last.

    A checkpoint appears under its name when it is complete, so that a process that ends while one
    is written leaves those before as they are. Tensors are written by torch.distributed.checkpoint:
    what several processes have is written once, and by turns; shards of FSDP2 by their owners.

    Args:
        workers: the processes; None for one.
        keep: how many checkpoints stay.
    """

    def __init__(
        self, folder: str | Path, workers: DataParallel | None = None, *, keep: int = 2
    ) -> None:
        self._folder, self._keep = Path(folder), keep
        self._workers: Workers = workers or ALONE
        self._group, self._one = (None, True) if workers is None else (workers.group, False)

    def steps(self) -> list[int]:
        """The steps that there are complete checkpoints of."""
        return sorted(
            int(p.parent.name.split("-")[1]) for p in self._folder.glob(f"step-*/{PLAIN}")
        )

    def save(self, step: int, **parts: Any) -> None:
        """Writes a checkpoint; all processes call it.

        Args:
            parts: by name: a network (wrapped or not), its optimizer, a ``Preconditioner`` or
                ``KFAC``, and anything else with ``state_dict`` and ``load_state_dict``, whose state
                is tensors and plain values.

        Raises:
            CheckpointError: it could not be written.
            WorkerLostError, DesynchronisedError: a process has ended, or makes another call.
        """
        target = self._folder / f"step-{step:09d}"
        unfinished = self._folder / f".{target.name}"
        self._workers.agree(f"save {step}")
        if self._workers.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._workers.agree("folder")
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

    def load(self, **parts: Any) -> int | None:
        """Restores the parts of the newest checkpoint; returns its step, None if there is none.

        Args:
            parts: as they were saved, in as many processes as there are now.

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
    try:
        yield
    except (CheckpointException, RuntimeError, OSError) as error:
        raise CheckpointError(f"the checkpoint could not be {what}: {error}") from error


def _model(parts: Mapping[str, Any]) -> nn.Module:
    for part in parts.values():
        if isinstance(part, nn.Module):
            return part
    raise CheckpointError("an optimizer is saved and loaded together with its network")


def _states(parts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            found[name] = get_model_state_dict(part)
        elif isinstance(part, Optimizer) and not isinstance(part, KFAC):
            found[name] = get_optimizer_state_dict(_model(parts), part)
        else:
            found[name] = part.state_dict()
    return found


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The plain values; tensors go to ``tensors`` under keys that begin with ``key``."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {HERE: key}
    if isinstance(value, Mapping):
        named = {name: _split(entry, f"{key}/{name}", tensors) for name, entry in value.items()}
        whole = all(isinstance(entry, Tensor) for entry in value.values())
        return {OPEN: key} if whole else {str(name): entry for name, entry in named.items()}
    if isinstance(value, (list, tuple)):
        return [_split(entry, f"{key}/{place}", tensors) for place, entry in enumerate(value)]
    return value


def _joined(plain: Any, key: str, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of ``_split``, with the tensors that there are."""
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


def _unwanted(part: Any, plain: Any, name: str) -> Collection[str]:
    """Keys of inverses that other processes keep."""
    if not isinstance(part, (KFAC, Preconditioner)):
        return ()
    inverse, prefix = part._inverse, name
    if isinstance(part, KFAC):
        plain, prefix = plain["kfac"], f"{name}/kfac"
    if plain["inverse"]["couplings"] != [[c.child, c.parent] for c in inverse.program.couplings]:
        return ()  # the program is another by then, and takes what it needs
    return {f"{prefix}/inverse/inverses/{key.name}" for key in inverse.kept_elsewhere()}
