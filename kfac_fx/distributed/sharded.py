"""Parameters that FSDP2 has sharded, as a whole for the time of a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


def whole(value: Tensor) -> Tensor:
    """A tensor with all its entries."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def put(value: Tensor, into: Tensor) -> None:
    """Copies a whole tensor, the same in all processes, to one that may be sharded."""
    if isinstance(into, DTensor):
        everywhere = [Replicate()] * into.device_mesh.ndim
        held = DTensor.from_local(value, into.device_mesh, everywhere, run_check=False)
        value = held.redistribute(placements=into.placements)
    into.copy_(value)


class Gathered:
    """Whole parameters while ``open``, in place of the shards.

    Attributes:
        net: the network without FSDP's hooks, which would put shards back.
    """

    def __init__(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> None:
        self._shards = parameters
        self._others = {n: p for n, p in net.named_parameters() if n not in parameters}
        self._whole: dict[str, Tensor] = {}
        self._rest: dict[str, Tensor] = {}
        self.net: fx.GraphModule = _without_hooks(net, {})

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[name] if self._whole else self._shards[name]

    @property
    def given(self) -> Mapping[str, Tensor]:
        """What the network is run with."""
        return self._whole | self._rest

    @contextmanager
    def open(self) -> Iterator[None]:
        """Gathers the parameters, and gives the shards their changes at the end."""
        self._whole = {n: _copied(whole(p)).requires_grad_() for n, p in self._shards.items()}
        self._rest = {n: _copied(whole(p)) for n, p in self._others.items()}
        try:
            yield
            for name, value in self._whole.items():
                put(value.detach(), self._shards[name])
        finally:
            self._whole, self._rest = {}, {}


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone()


def _without_hooks(module: nn.Module, seen: dict[int, Any]) -> Any:
    """A module of the same parameters, buffers and submodules that FSDP does not know of."""
    if id(module) in seen:
        return seen[id(module)]
    kind = type(module)
    kind = kind.__bases__[1] if isinstance(module, FSDPModule) else kind
    seen[id(module)] = bare = object.__new__(kind)
    bare.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name.startswith("_") and isinstance(value, dict):
            bare.__dict__[name] = copy.copy(value)
        if name in ("_forward_pre_hooks", "_forward_hooks"):
            kept = {key: hook for key, hook in value.items() if not _is_fsdp(hook)}
            bare.__dict__[name] = type(value)(kept)
    children = {
        n: None if m is None else _without_hooks(m, seen) for n, m in module._modules.items()
    }
    bare.__dict__["_modules"] = children
    return bare


def _is_fsdp(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed")
