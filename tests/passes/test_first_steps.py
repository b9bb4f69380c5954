"""The first step of a cell counts, also where its input depends on no data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_fx

ROUTES = ("symbolic_trace", "export", "eager")


class Decoder(nn.Module):
    """Begins with a learned vector, or with zeros, and reads the data from then on."""

    def __init__(self, cell: type, begin: str) -> None:
        super().__init__()
        self.cell, self.head, self.begin = cell(3, 5), nn.Linear(5, 2), begin
        self.encoder, self.start = nn.Linear(4, 5), nn.Parameter(torch.randn(1, 3))

    def forward(self, code: Tensor, x: Tensor) -> Tensor:
        state = self.encoder(code)
        given = x[:, 0] * 0 + self.start
        if self.begin == "start":
            given = self.start.expand(code.shape[0], -1)
        elif self.begin == "zeros":
            given = code.new_zeros(code.shape[0], 3)
        lstm = isinstance(self.cell, nn.LSTMCell)
        hidden = (state, state) if lstm else state
        for step in range(3):
            hidden = self.cell(given, hidden)
            given = x[:, step]
        return self.head(hidden[0] if lstm else hidden)


def factors(begin: str, cell: type, route: kfac_fx.config.Capture) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    model, inputs = Decoder(cell, begin), (torch.randn(6, 4), torch.randn(6, 3, 3))
    if begin == "as zeros":
        model.start.data.zero_()
    net = kfac_fx.transform(model, inputs, capture=route, structure="block_diagonal")
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", damping=0.1)
    outputs = net(*inputs)
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    blocks = net.curvature.blocks
    assert all(b.kind == "recurrent" for n, b in blocks.items() if n.startswith("cell"))
    estimate = preconditioner.inverse.estimate.blocks
    return {name: [*estimate[name].read()] for name in blocks if name.startswith("cell")}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize(("begin", "like"), [("start", "data"), ("zeros", "as zeros")])
def test_the_first_step_is_in_the_block(
    begin: str, like: str, cell: type, route: kfac_fx.config.Capture
) -> None:
    got, want = factors(begin, cell, route), factors(like, cell, route)
    assert got.keys() == want.keys() and got
    for name, ones in got.items():
        for one, other in zip(ones, want[name], strict=True):
            torch.testing.assert_close(one, other)
