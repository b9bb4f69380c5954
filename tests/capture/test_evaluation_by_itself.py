"""Models that have a graph of the training, and whose evaluation no graph repeats."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError


class Cached(nn.Module):
    """LeViT's and EfficientFormer's attention: evaluation keeps its table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.biases = nn.Parameter(torch.randn(2, 5))
        self.register_buffer("places", torch.randint(0, 5, (3, 3)))
        self.cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def table(self) -> Tensor:
        if self.training:
            return self.biases[:, self.places]
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.biases[:, self.places]
        return self.cache["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.query(x)
        scores = (h @ h.transpose(1, 2)).unsqueeze(1) + self.table()
        return self.drop((scores.softmax(-1) @ h.unsqueeze(1)).sum(1))


class Untraceable(Cached):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(range(x.shape[1])):  # symbolic tracing stops here
            raise ValueError
        return super().forward(x)


KINDS = [(Cached, "symbolic_trace"), (Untraceable, "export")]


@pytest.mark.parametrize(("kind", "route"), KINDS)
def test_a_cache_of_the_evaluation_leaves_the_graph_of_the_training(
    kind: type[nn.Module], route: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = kind()
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        net = kfac_fx.transform(model, (torch.randn(2, 3, 4),))
    assert net.curvature.route == route
    said = [r.getMessage() for r in caplog.records if "in evaluation" in r.getMessage()]
    assert len(said) == 1
    assert (
        f"writes {kind.__name__}.cache" in said[0]
        and "Its graph is that of the training" in said[0]
    )
    assert model.cache == {}
    caplog.clear()
    for training in (True, False, False, True, False):
        x = torch.randn(5, 3, 4)
        found = []
        for one in (net, twin):
            one.train(training)
            torch.manual_seed(1)
            found.append(one(x))
        assert torch.equal(*found)
        assert net.stands() is training
        assert list(model.cache) == list(twin.cache)
        # The table that is kept is of the old biases, which is what the model does.
        for one in (model, twin):
            one.biases.data.mul_(1.5)
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [one for one in told if "in evaluation" in one]


def test_statistics_of_an_evaluation_are_recorded_by_the_model_itself() -> None:
    torch.manual_seed(0)
    model, x = Cached(), torch.randn(5, 3, 4)
    model.drop.p = 0.0
    net = kfac_fx.transform(model, structure="block_diagonal")
    factors = []
    for training in (True, False):
        net.train(training)
        pre = kfac_fx.Preconditioner(net, "normal", damping=1e-2, fisher="exact")
        out = net(x)
        pre.observe(out)
        out.sum().backward()
        pre.step()
        factors.append(pre.factors["query"])
    for one, other in zip(*factors, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copy_made_in_evaluation_has_its_graph_in_training() -> None:
    model, x = Cached(), torch.randn(5, 3, 4)
    net = kfac_fx.transform(model)
    net.eval()
    with torch.no_grad():
        net(x)  # fills the cache
    copied = copy.deepcopy(net)
    twin = copy.deepcopy(copied.source)
    for training in (False, True):
        copied.train(training), twin.train(training)
        torch.manual_seed(1)
        out = copied(x)
        torch.manual_seed(1)
        assert torch.equal(out, twin(x))
        assert copied.stands() is training


@pytest.mark.usefixtures("fresh")
def test_tracers_and_compilers_do_not_get_the_graph_of_the_training() -> None:
    model, x = Cached(), torch.randn(5, 3, 4)
    net = kfac_fx.transform(model)
    net.eval()
    with pytest.raises(CaptureError, match="it is in evaluation, of which there is no graph"):
        torch.fx.symbolic_trace(net)
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), model(x))
    net.train()
    torch.manual_seed(1)
    out = torch.compile(net, backend="eager", fullgraph=True)(x)
    torch.manual_seed(1)
    assert torch.equal(out, model(x))


class Writing(nn.Module):
    """Writes in training: there is nothing to make a graph of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.fc(x)


def test_what_the_training_writes_is_refused_as_before() -> None:
    with pytest.raises(CaptureError, match=r"Writing\.calls"):
        kfac_fx.transform(Writing())


class Flagged(nn.Module):
    """A child's flag is a constant of the one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Untraceable()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_a_child_in_evaluation_is_run_as_it_is() -> None:
    model, x = Flagged(), torch.randn(5, 3, 4)
    net = kfac_fx.transform(model, (x,))
    assert net.curvature.route == "export"
    model.part.eval()
    twin = copy.deepcopy(model)
    assert torch.equal(net(x), twin(x))
    assert torch.equal(net(x), twin(x))
    assert list(model.part.cache) == ["cpu"]
