"""The code of docs/guides/add_a_layer_kind.md, as the two files that it stands for."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.capture import dialect
from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.passes import rules

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "add_a_layer_kind.md"
FILES = ("kfac_fx.ops.scaled_linear", "kfac_fx.passes.rules.scaled_linear")


def module_of(name: str, code: str) -> ModuleType:
    """Return a module as if the file were in its folder."""
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = f"<{PAGE.name}: {name}>"
    exec(compile(code, module.__file__, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def rule_file() -> Iterator[ModuleType]:
    """The second file, with the first beside it; both are gone afterwards."""
    before, functions = list(rules.BUILT_IN), dict(dialect.FUNCTIONS)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    modules = [module_of(name, code) for name, code in zip(FILES, blocks, strict=False)]
    yield modules[1]
    rules.BUILT_IN[:] = before
    dialect.FUNCTIONS.clear()
    dialect.FUNCTIONS.update(functions)
    for name in FILES:
        del sys.modules[name]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return sys.modules[FILES[1]].scaled_linear(x, self.weight, 2.5)


def recorded(net: CapturedModule, x: Tensor) -> tuple[Tensor, ...]:
    """A and G of the only block, of one batch."""
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact")
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    (factors,) = preconditioner.factors.values()
    return factors


def test_the_kind_of_the_page(rule_file: ModuleType) -> None:
    """Its A is that of a linear layer, and its G that of one whose derivative is 2.5 times it."""
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    net = kfac_fx.transform(Scaled())
    (block,) = net.curvature.blocks.values()
    assert (block.kind, block.approximation, block.reason) == ("scaled_linear", "kronecker", None)
    A, G = recorded(net, x)
    plain_A, plain_G = recorded(kfac_fx.transform(nn.Linear(4, 3, bias=False).double()), x)
    torch.testing.assert_close(A, plain_A)
    torch.testing.assert_close(G, 2.5**2 * plain_G)


def test_the_page_names_rules_that_exist() -> None:
    """The last block is one of the user's own."""
    assert "default_rules().before" in PAGE.read_text(encoding="utf-8")
    assert rules.default_rules().before(rules.BUILT_IN[0]).table[1:] == rules.default_rules().table
