"""Layers on which kfac-jax fails (silent diagonals, wrong factors, crashes), against the oracle.

Each model has a twin of plain modules with the same weights, whose factors the oracle computes by
loops over cases. ``layers`` says which modules of the twin a parameter's uses are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.derivative_oracle import Wrapped, measured, oracle
from support.oracles import Categorical, Measure, close
from support.recurrent_oracle import Tagger, expected
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_fx

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


class Model(nn.Module):
    """A layer written in some way, a nonlinearity, and a head."""

    def __init__(self, use: Callable[..., Tensor], head: int, **parameters: tuple[int, ...]):
        super().__init__()
        self.use = use
        for name, shape in parameters.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 2))
        self.head = nn.Linear(head, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(self, x)).flatten(1))


class Twin(nn.Module):
    """The same of a plain layer, with the head of the model."""

    def __init__(self, model: Model, layer: nn.Module, before: Callable = lambda x: x) -> None:
        super().__init__()
        self.layer, self.head, self.before = layer, model.head, before

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.before(x))).flatten(1))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """nn.Linear of given values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight.detach().clone()
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


def convolution(layer: nn.Module, model: Model) -> nn.Module:
    layer.weight.data = model.weight.detach().clone()
    layer.bias.data = model.bias.detach().clone()
    return layer


@dataclass(frozen=True)
class Failure:
    """A way to write a layer, its inputs, and its twin."""

    build: Callable[[], Model]
    inputs: Callable[[], Tensor]
    twin: Callable[[Model], nn.Module]
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"weight": ("layer",)})


def vectors() -> Tensor:
    return torch.randn(4, 5)


def tokens() -> Tensor:
    return torch.randint(7, (4, 3))


def dense(use: Callable[..., Tensor], **options: Any) -> Failure:
    """A use of a weight [6, 5] and a bias [6] on vectors."""
    return Failure(
        lambda: Model(use, 6, weight=(6, 5), bias=(6,)),
        vectors,
        lambda m: Twin(m, linear(m.weight, m.bias)),
        **options,
    )


def conv(
    use: Callable[..., Tensor], weight: tuple[int, ...], size: tuple[int, ...], make: Callable
) -> Failure:
    """A functional convolution and the module of the same geometry."""
    head = make()(torch.zeros(1, *size)).numel()
    return Failure(
        lambda: Model(use, head, weight=weight, bias=weight[:1]),
        lambda: torch.randn(3, *size),
        lambda m: Twin(m, convolution(make(), m)),
    )


class Checkpointed(nn.Module):
    """The middle of an MLP under activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = checkpoint(lambda h: torch.tanh(self.layer(h)), x, use_reentrant=self.reentrant)
        return self.head(x)


class Plain(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.first(x)))))


def plain(model: nn.Module) -> nn.Module:
    twin = Plain(False)
    twin.load_state_dict(model.state_dict())
    return twin


class Twice(Twin):
    """Two layers with the weights of a model that uses one of them twice."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, linear(model.weight))
        self.other = linear(model.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.other(torch.tanh(self.layer(x)))))


def one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids, 7).to(torch.get_default_dtype())


FAILURES = {
    "x @ W.T + b": dense(lambda m, x: x @ m.weight.T + m.bias),
    "W @ x + b": dense(lambda m, x: (m.weight @ x.mT).mT + m.bias),
    "tied weight": Failure(
        lambda: Model(
            lambda m, x: F.linear(torch.tanh(x @ m.weight.T), m.weight), 5, weight=(5, 5)
        ),
        vectors,
        Twice,
        {"weight": ("layer", "other"), "head.weight": ("head",)},
    ),
    "checkpoint": Failure(
        lambda: Checkpointed(False), vectors, plain, {"layer.weight": ("layer",)}
    ),
    "dilated conv2d": conv(
        lambda m, x: F.conv2d(x, m.weight, m.bias, dilation=2, padding=2),
        (4, 2, 3, 3),
        (2, 5, 6),
        lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2),
    ),
    "grouped conv2d": conv(
        lambda m, x: F.conv2d(x, m.weight, m.bias, groups=2),
        (4, 1, 2, 2),
        (2, 3, 4),
        lambda: nn.Conv2d(2, 4, 2, groups=2),
    ),
    "conv1d": conv(
        lambda m, x: F.conv1d(x, m.weight, m.bias, stride=2, padding=1),
        (3, 2, 3),
        (2, 7),
        lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1),
    ),
    "conv3d": conv(
        lambda m, x: F.conv3d(x, m.weight, m.bias),
        (3, 2, 2, 2, 2),
        (2, 3, 2, 3),
        lambda: nn.Conv3d(2, 3, 2),
    ),
    "embedding lookup": Failure(
        lambda: Model(lambda m, ids: m.weight[ids], 12, weight=(7, 4)),
        tokens,
        lambda m: Twin(m, linear(m.weight.T), one_hot),
    ),
    "dense with three extra axes": Failure(
        lambda: Model(lambda m, x: F.linear(x, m.weight, m.bias), 36, weight=(6, 5), bias=(6,)),
        lambda: torch.randn(3, 2, 1, 3, 5),
        lambda m: Twin(m, linear(m.weight, m.bias)),
    ),
    "multi-head projection": Failure(
        lambda: Model(
            lambda m, x: torch.einsum("nti,ihd->nthd", x, m.weight), 18, weight=(5, 2, 3)
        ),
        lambda: torch.randn(4, 3, 5),
        lambda m: Twin(m, linear(m.weight.flatten(1).T)),
    ),
    "heads merged": Failure(
        lambda: Model(
            lambda m, x: torch.einsum("nthd,hdo->nto", x, m.weight), 18, weight=(2, 3, 6)
        ),
        lambda: torch.randn(4, 3, 2, 3),
        lambda m: Twin(m, linear(m.weight.flatten(0, 1).T), lambda x: x.flatten(2)),
    ),
}


def scaled(m: Model, x: Tensor) -> Tensor:
    return F.linear(x, 3.0 * m.weight / 2.0, m.bias)


def normalised(m: Model, x: Tensor) -> Tensor:
    return F.linear(x, m.scale * m.weight / m.weight.norm(dim=1, keepdim=True), m.bias)


def block_of(net: nn.Module, parameter: str) -> Any:
    (block,) = (b for b in net.curvature.blocks.values() if parameter in b.parameters)
    return block


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("examples", [False, True], ids=["alone", "with inputs"])
@pytest.mark.parametrize("name", FAILURES)
def test_factors(measure: Measure, name: str, examples: bool, fisher: str) -> None:
    """The factors of the twin, by whatever route the model is captured."""
    failure, likelihood = FAILURES[name], Categorical()
    model, x = failure.build(), failure.inputs()
    y, twin = likelihood.draw(model(x)), failure.twin(model)
    close((model(x),), (twin(x),))
    net = kfac_fx.transform(model, x if examples else None)
    factors = measure(net, x, y, likelihood, fisher).factors
    for parameter, layers in failure.layers.items():
        block = block_of(net, parameter)
        assert block.approximation == "kronecker" and block.reason is None
        A, G = oracles.kronecker(twin, layers, x, y, likelihood, fisher)
        if block.factors[0].diagonal:  # a table: the input is one-hot
            close((torch.diag(A.diag()),), (A,))
            A = A.diag()
        elif len(block.parameters) == 1 and twin.get_submodule(layers[0]).bias is not None:
            A = A[..., :-1, :-1]  # the bias has a block of its own
        close(factors[block.name], (A, G))


@pytest.mark.parametrize("name", ["x @ W.T + b", "W @ x + b"])
def test_a_bias_apart_has_its_full_covariance(measure: Measure, name: str) -> None:
    failure, likelihood = FAILURES[name], Categorical()
    model, x = failure.build(), failure.inputs()
    net = kfac_fx.transform(model)
    found = measure(net, x, None, likelihood).factors["bias"]
    close(found, (oracles.covariance(model, ["bias"], x, None, likelihood),))


@pytest.mark.parametrize("stride, dilation", [(1, 2), (2, 1)])
def test_transposed_convolution(stride: int, dilation: int) -> None:
    """With dilation or a stride."""
    layer, x = nn.ConvTranspose2d(2, 3, 2, stride, dilation=dilation), torch.randn(3, 2, 3, 2)
    model = Wrapped(layer, layer(x).flatten(1).shape[1])
    want = oracle(model, (x,), lambda w: w.transpose(0, 1).flatten(1), 1)
    close(measured(model, (x,), "layer"), want)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH"])
def test_recurrent_layer(measure: Measure, kind: str) -> None:
    """Factors of all gates of fused layers."""
    model, likelihood = Tagger(kind, batch_first=True), Categorical()
    x = model.inputs()
    factors = measure(kfac_fx.transform(model), x, None, likelihood).factors
    want = expected(lambda n: model.case(x, n), len(x), None, likelihood, "exact")
    assert set(want) <= set(factors)
    for name, pair in want.items():
        close(factors[name], pair)


def test_a_reentrant_checkpoint_is_no_graph() -> None:
    """Its derivatives depend on whether its input has any, which no trace can know."""
    with pytest.raises(kfac_fx.errors.CaptureError, match="reentrant checkpoint"):
        kfac_fx.transform(Checkpointed(True))
    assert kfac_fx.transform(Checkpointed(True), vectors()).curvature.route == "eager"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_in_a_model_that_runs_as_it_is_written(
    measure: Measure, reentrant: bool
) -> None:
    """What the backward computes again is not recorded, and the report says so."""
    model, x, likelihood = Checkpointed(reentrant), vectors(), Categorical()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model, x, capture="eager")
    for name in ("layer.weight", "layer.bias"):
        assert "activation_checkpoint" in str(block_of(net, name).reason)
    if reentrant:
        with pytest.raises(kfac_fx.errors.ObservationError, match="use_reentrant=False"):
            measure(net, x, y, likelihood, "sampled")
    factors = measure(net, x, y, likelihood, "empirical").factors
    close(factors["head"], oracles.kronecker(plain(model), ["head"], x, y, likelihood, "empirical"))
    twin = plain(model)
    (gradient,) = torch.autograd.grad(likelihood.nll(twin(x), y), twin.layer.weight)
    close(factors["layer"], (gradient.flatten().square() / len(x),))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_scaled_weight(measure: Measure, capture: str) -> None:
    """W enters as 1.5 W: A is of the inputs, G of 1.5 g, or the block says why it has neither."""
    model, x, likelihood = Model(scaled, 6, weight=(6, 5), bias=(6,)), vectors(), Categorical()
    net = kfac_fx.transform(model, x, capture=capture)
    block, factors = block_of(net, "weight"), measure(net, x, None, likelihood).factors
    if block.approximation != "kronecker":
        assert block.reason
        return
    twin = Twin(model, linear(1.5 * model.weight, model.bias))
    A, G = oracles.kronecker(twin, ["layer"], x, None, likelihood)
    close(factors[block.name], (A[:-1, :-1], 1.5**2 * G))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_weight_norm(measure: Measure, by_hand: bool, capture: str) -> None:
    """A block whose reason is named, or a Kronecker block whose A is of the inputs."""
    if by_hand:
        shapes = {"weight": (6, 5), "scale": (6, 1), "bias": (6,)}
        model: nn.Module = Model(normalised, 6, **shapes)
        name = "weight"
    else:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)))
        name = "0.parametrizations.weight.original1"
    x, likelihood = vectors(), Categorical()
    net = kfac_fx.transform(model, x, capture=capture)
    block, found = block_of(net, name), measure(net, x, None, likelihood)
    assert block.reason or block.approximation == "kronecker"
    if block.approximation == "kronecker":
        close(found.factors[block.name][:1], (x.T @ x / len(x),))
    assert found.preconditioner.skipped_statistics == 0
