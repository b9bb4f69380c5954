"""Parameters that FSDP2 has sharded, as a whole for the time of a step.

FSDP2 replaces parameters by DTensors, of which each process has a shard, and gathers them by hooks
in a forward. An optimizer that runs the network with other parameters, too, needs them whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


def whole(value: Tensor) -> Tensor:
    """Return a tensor with all its entries; all processes call it, as entries are sent."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def put(value: Tensor, into: Tensor) -> None:
    """Copy a whole tensor, the same in all processes, to one that may be sharded."""
    if isinstance(into, DTensor):
        # Every process has the value: it is declared replicated, so that each takes its shard from
        # its own copy and nothing is sent.
        everywhere = [Replicate()] * into.device_mesh.ndim
        held = DTensor.from_local(value, into.device_mesh, everywhere, run_check=False)
        value = held.redistribute(placements=into.placements)
    into.copy_(value)


class Gathered:
    """Whole parameters while ``open``, in place of the shards; see ``WholeParameters``.

    Args:
        net: a network that FSDP2 has sharded.
        parameters: the parameters by name, those that the optimizer changes.

    Attributes:
        net: the network without FSDP's hooks, which would put shards back.
    """

    def __init__(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> None:
        self._shards = parameters
        self._others = {n: p for n, p in net.named_parameters() if n not in parameters}
        self._whole: dict[str, Tensor] = {}
        self._rest: dict[str, Tensor] = {}
        bare = _without_hooks(net, {})
        assert isinstance(bare, fx.GraphModule)
        self.net = bare

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[name] if self._whole else self._shards[name]

    @property
    def given(self) -> Mapping[str, Tensor]:
        """Return what the network is run with, the parameters that nobody changes among them."""
        return self._whole | self._rest

    @contextmanager
    def open(self) -> Iterator[None]:
        """Gather the parameters, and give the shards their changes at the end."""
        self._whole = {n: _copied(whole(p)).requires_grad_() for n, p in self._shards.items()}
        self._rest = {n: _copied(whole(p)) for n, p in self._others.items()}
        try:
            yield
            # After an error inside the shards stay as they were: the step has not happened.
            for name, value in self._whole.items():
                put(value.detach(), self._shards[name])
        finally:
            self._whole = {}
            self._rest = {}


def _copied(value: Tensor) -> Tensor:
    """Return a copy: a tensor that is not sharded is whole already, and the optimizer's own."""
    return value.detach().clone()


def _without_hooks(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """Return a module of the same parameters, buffers and submodules that FSDP does not know of.

    fully_shard changes a module's class and adds hooks, and cannot be undone. A deep copy would
    have parameters of its own, so the module is made again around the same tensors.

    Args:
        module: sharded or not.
        seen: id of a module -> the one that was made for it; shared submodules stay shared.
    """
    if id(module) in seen:
        return seen[id(module)]
    kind = type(module)
    # FSDP2 makes a class FSDP<Name>(FSDPModule, Name): the second base is the module's own class.
    kind = kind.__bases__[1] if isinstance(module, FSDPModule) else kind
    seen[id(module)] = bare = object.__new__(kind)
    bare.__dict__.update(module.__dict__)
    # Dictionaries of hooks, parameters and buffers are copied: else a change of one module's would
    # be a change of the other's.
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


def _is_fsdp(hook: object) -> bool:
    """Say whether a hook is torch.distributed's; the user's own hooks stay."""
    return getattr(hook, "__module__", "").startswith("torch.distributed")
