"""The exact Fisher by blocks of columns gives what one backward for each column gives."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from support.asserts import assert_same
from support.networks import BY_NAME, NETWORKS, Network, token_ids, vectors
from support.steps import step_on_fixed_data
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import kfac_fx
from kfac_fx.likelihoods import Categorical, Sum
from kfac_fx.statistics import sampled

pytestmark = pytest.mark.usefixtures("float64")

BY_COLUMN = "one backward pass for each column"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few columns, the last one of fewer."""
    monkeypatch.setattr(sampled, "AT_ONCE", {"cpu": 700, "cuda": 700})


def refuse(*_: object) -> None:
    raise RuntimeError("blocks are switched off")


def both(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: Callable[[], dict]
) -> tuple[dict, dict]:
    """What a step gives by blocks, which must have been used, and by columns."""
    caplog.set_level(logging.INFO, logger="kfac_fx")
    by_blocks = step()
    assert BY_COLUMN not in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(sampled, "_by_blocks", refuse)
        by_columns = step()
    assert BY_COLUMN in caplog.text
    return by_blocks, by_columns


def instance(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, 5),)


class Attention(nn.Module):
    """Projections of a packed weight, with the cases first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(ids)))


def normed_rows() -> nn.Module:
    """A weight that is computed row by row: its statistics pass through one more operator."""
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


def segmentation() -> nn.Module:
    """A convolution gives the outputs."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 1))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2), nn.Flatten()
    )


def instance_norm() -> nn.Module:
    return nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.Flatten(), nn.Linear(15, 3))


MORE = [
    Network("attention", Attention, vectors(3, 4)),
    Network("lstm", Memory, vectors(3, 4), needs_examples=True),
    Network("bags", Bags, token_ids),
    Network("weight_norm", normed_rows, vectors(6), needs_examples=True),
    Network("segmentation", segmentation, vectors(3, 5, 5)),
    Network("grouped", grouped, vectors(4, 6)),
    Network("instance_norm", instance_norm, instance),
    Network("bilinear", lambda: Pairs(), lambda n: (torch.randn(n, 3), torch.randn(n, 4))),
    Network("bias", lambda: OwnBias(), vectors(6)),
]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(3, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pair(x, y)


class OwnBias(nn.Module):
    """Parameters that are no layer's: a bias, a gain, and rows of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.gain = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.gain + self.bias))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("network", NETWORKS + MORE, ids=str)
def test_every_kind_of_use(
    network: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Factors, cross factors and updates, of couplings as the transform makes them."""
    net = kfac_fx.transform(network.build(), **network.captured_with())

    def step() -> dict:
        torch.manual_seed(1)  # blocks without a tap are sampled
        return step_on_fixed_data(net, network)

    assert_same(*both(monkeypatch, caplog, step), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["mlp", "mlp_tokens", "conv2d", "matmul", "recurrent"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_moments_and_reduced_positions(
    name: str, sharing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = BY_NAME[name]
    net = kfac_fx.transform(
        network.build(), structure="block_diagonal", ekfac=True, weight_sharing=sharing
    )

    def step() -> dict:
        torch.manual_seed(3)
        pre = kfac_fx.Preconditioner(net, "normal", fisher="exact", tikhonov="ekfac", damping=0.1)
        for _ in range(2):
            net.zero_grad()
            outputs = net(*network.inputs(4))
            pre.observe(outputs)
            outputs.sin().sum().backward()
            pre.step()
        return {n: p.grad.clone() for n, p in net.named_parameters()}

    assert_same(*both(monkeypatch, caplog, step), rtol=1e-9, atol=1e-12)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(1))


IGNORED = torch.tensor([[0, -100], [2, 1], [-100, -100], [1, 0]])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0])
TWO = Sum([("categorical", 1.0), ("normal", 0.3)])

LIKELIHOODS = {
    "classes": ((5,), "categorical", None),
    "tokens": ((2, 5), "categorical", None),
    "ignored": ((2, 5), "categorical", IGNORED),
    "weights": ((5,), Categorical(weight=WEIGHTS), classes(4)),
    "first": ((2, 5), Categorical(dim=1), None),
    "bits": ((5,), "bernoulli", None),
    "bits of tokens": ((2, 5), "bernoulli", None),
    "variance": ((5,), kfac_fx.likelihoods.Normal(0.3), None),
    "custom": ((5,), lambda f: torch.distributions.Categorical(logits=f / 3), None),
    "sum": ((5,), TWO, None),
}


LARGE = {
    "whole": {},
    "cut": {"max_factor_dim": 2, "large_factors": "blocks"},
    "diagonal": {"max_factor_dim": 2, "large_factors": "diagonal"},
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("large", LARGE)
def test_every_likelihood(
    name: str,
    sharing: str,
    large: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last layer's G is the closed form of the output Fisher, where there is one.

    Of three outputs, a side of 2 leaves parts of two and one, and a zero that fills up the last.
    """
    shape, likelihood, targets = LIKELIHOODS[name]
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    options = {"structure": "block_diagonal", "weight_sharing": sharing}
    net = kfac_fx.transform(model, **options, **LARGE[large])
    x = torch.randn(4, *shape)

    def step() -> dict:
        pre = kfac_fx.Preconditioner(net, likelihood, fisher="exact")
        outputs = net(x)
        pre.observe((outputs, outputs.sin()) if name == "sum" else outputs, targets)
        outputs.sin().sum().backward()
        pre.step()
        return dict(pre.factors)

    assert_same(*both(monkeypatch, caplog, step), rtol=1e-9, atol=1e-12, nonzero=True)


class Warmer(Categorical):
    """Has a Fisher of its own, whose closed form it does not know."""

    def distribution(self, outputs: Tensor) -> torch.distributions.Distribution:
        return super().distribution(outputs / 3)


def test_a_subclass_does_not_inherit_the_fisher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(4, 3)))
    x = torch.randn(6, 4)

    def step() -> dict:
        pre = kfac_fx.Preconditioner(net, Warmer(), fisher="exact")
        outputs = net(x)
        pre.observe(outputs)
        outputs.sin().sum().backward()
        pre.step()
        return dict(pre.factors)

    assert_same(*both(monkeypatch, caplog, step), rtol=1e-9, atol=1e-12)


class Part(nn.Module):
    def __init__(self, saves: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head, self.saves = nn.Linear(4, 3), saves

    def forward(self, x: Tensor) -> Tensor:
        if self.saves:
            return self.head(checkpoint(self.body, x, use_reentrant=False))
        return self.head(self.body(x))


def test_a_checkpoint_has_the_same_factors() -> None:
    """It computes its part again in every pass, which may not be batched."""
    plain = Part(False)
    found = []
    for saves in (False, True):
        model = Part(saves)
        model.load_state_dict(plain.state_dict())
        net = kfac_fx.transform(model, torch.ones(5, 4))
        pre = kfac_fx.Preconditioner(net, "categorical", fisher="exact")
        outputs = net(torch.linspace(-1, 1, 20).reshape(5, 4))
        pre.observe(outputs)
        outputs.sum().backward()
        pre.step()
        found.append(dict(pre.factors))
    assert_same(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_many_classes_take_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 classes: blocks of columns, and no product of all columns for the last layer."""
    counted, batched = Counter(sampled.derivatives), Counter(sampled.batched_derivatives)
    monkeypatch.setattr(sampled, "derivatives", counted)
    monkeypatch.setattr(sampled, "batched_derivatives", batched)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1000))
    pre = kfac_fx.Preconditioner(kfac_fx.transform(model), fisher="exact")
    pre.observe(inputs=torch.randn(8, 4))
    assert counted.calls == 1  # the inputs
    assert batched.calls <= 20


@pytest.mark.parametrize("large", ["blocks", "diagonal"])
def test_a_large_last_layer_needs_no_columns(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a factor are formed of the output Fisher too: columns took minutes of 3,072."""
    counted = Counter(sampled.batched_derivatives)
    monkeypatch.setattr(sampled, "batched_derivatives", counted)
    options = {"max_factor_dim": 16, "large_factors": large}
    net = kfac_fx.transform(nn.Sequential(nn.Linear(4, 100)), **options)
    pre = kfac_fx.Preconditioner(net, fisher="exact")
    pre.observe(inputs=torch.randn(8, 4))
    assert counted.calls == 0


class Counter:
    def __init__(self, function: Callable) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: object) -> object:
        self.calls += 1
        return self.function(*args)


class OneVector(nn.Module):
    """Gives its last layer one vector (the root of a tree)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).sum(0))


def test_the_last_layer_of_one_vector() -> None:
    """Its closed form looked for a dimension of cases, and failed in torch's words."""
    torch.manual_seed(0)
    model, x = OneVector(), torch.randn(6, 4)
    net = kfac_fx.transform(model, structure="block_diagonal")
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", damping=0.1)
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    A, G = preconditioner.inverse.estimate.blocks["head"].read()
    rows = [
        torch.autograd.grad(y, model.head.weight)[0].flatten()
        for y in (model(x)[i] for i in range(3))
    ]
    fisher = sum(torch.outer(row, row) for row in rows) / len(rows)
    torch.testing.assert_close(torch.kron(G, A), fisher)
