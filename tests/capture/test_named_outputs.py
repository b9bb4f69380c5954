"""Outputs that are a dictionary and a data class at once, as many model libraries return them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx


@dataclass
class Outputs(OrderedDict[str, Any]):
    logits: Tensor
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(logits=self.fc(x))


def test_symbolic_tracing_keeps_their_class() -> None:
    model, x = Model(), torch.randn(2, 4)
    found = kfac_fx.transform(model)(x)
    assert type(found) is Outputs and list(found) == ["logits"]
    assert torch.equal(found.logits, model(x).logits) and found["logits"] is found.logits


class Remembers(nn.Module):
    """Returns more in evaluation than in training (XLNet's memories)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.fc(x))
        found: dict[str, Any] = {"logits": self.head(hidden)}
        return found if self.training else found | {"memory": [hidden, hidden + 1]}


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
@pytest.mark.parametrize("copied", [False, True])
def test_evaluation_may_return_another_structure(capture: str, copied: bool) -> None:
    model, x = Remembers(), torch.randn(2, 4)
    net = kfac_fx.transform(model, x, capture=capture)
    net = copy.deepcopy(net) if copied else net
    for training in (True, False, True):
        torch.testing.assert_close(net.train(training)(x), model.train(training)(x))


def test_evaluation_of_another_structure_compiles() -> None:
    model, x = Remembers(), torch.randn(2, 4)
    net = kfac_fx.transform(model, x, capture="export").eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model.eval()(x))
