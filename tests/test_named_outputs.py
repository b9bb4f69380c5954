"""Outputs that are a dictionary and a data class at once, as many model libraries return them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

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
