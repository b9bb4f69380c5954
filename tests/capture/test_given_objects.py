"""Objects among the example inputs are afterwards what they were."""

from __future__ import annotations

import collections
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import kfac_fx


class Cache:
    """Keys and values of the steps so far, in lists of an object within this one."""

    def __init__(self) -> None:
        self.held = types.SimpleNamespace(keys=[], values=[])
        self.steps = 0

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.held.keys.append(key)
        self.held.values.append(value)
        self.steps += 1
        return torch.cat(self.held.keys, 1), torch.cat(self.held.values, 1)


class SlottedCache(Cache):
    __slots__ = ("steps",)


class DictCache(collections.UserDict[str, Tensor]):
    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        self["key"] = torch.cat([self["key"], key], 1) if "key" in self else key
        self["value"] = torch.cat([self["value"], value], 1) if "value" in self else value
        return self["key"], self["value"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        keys, values = cache.update(self.key(x), self.value(x))
        return torch.softmax(self.query(x) @ keys.mT, -1) @ values


@pytest.mark.parametrize("capture", ["auto", "eager"])
@pytest.mark.parametrize("kind", [Cache, SlottedCache, DictCache])
def test_a_cache_is_left_empty(kind: type, capture: kfac_fx.config.Capture) -> None:
    torch.manual_seed(0)
    model, x, cache = Attention(), torch.randn(2, 3, 4), kind()
    net = kfac_fx.transform(model, (x, cache), capture=capture)
    if isinstance(cache, DictCache):
        assert not cache
    else:
        assert cache.steps == 0 and not cache.held.keys
    # One run after the other begins with what was given, so all three layers have matrices.
    assert {block.kind for block in net.curvature.blocks.values()} == {"linear"}
    mine, theirs = kind(), kind()
    for _ in range(2):
        assert torch.allclose(net(x, mine), model(x, theirs))


class Doubling(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.tanh else out


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_a_function_mode_around_the_call(capture: str) -> None:
    model, x = Tanh(), torch.randn(5, 4)
    net = kfac_fx.transform(model, torch.randn(5, 4), capture=capture)
    for _ in range(2):
        assert torch.equal(net(x), model(x))
        with Doubling():
            assert torch.equal(net(x), model(x))
    with torch.device("cpu"):  # a function mode of torch's own
        assert torch.equal(net(x), model(x))
