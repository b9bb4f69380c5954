"""Weights that are computed from a parameter before their use: scaled, standardised, masked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import Bernoulli, Categorical, Measure, Normal, close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])

GAIN = torch.tensor([0.5, -2.0, 1.5, -0.25, 3.0], dtype=torch.float64)


class Derived(nn.Module):
    """A linear layer or convolution with `change` between parameter and use, then a head."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, 3)
        self.change = change
        self.register_buffer("gain", GAIN.clone())

    def computed(self) -> Tensor:
        return self.change(self.layer.weight)

    def use(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.computed()
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, layer.bias, groups=layer.groups).flatten(2).mean(2)
        return F.linear(x, weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(x)))

    def reference(self) -> nn.Module:
        """The same function with the computed weight as the parameter of the layer."""
        twin = Derived(copy.deepcopy(self.layer), lambda weight: weight)
        twin.layer.weight.data = self.computed().detach().clone()
        twin.layer.bias = None
        twin.head = self.head
        shift = self.layer.bias
        twin.use = lambda x: _with_shift(twin.layer(x), shift)  # type: ignore[method-assign]
        return twin


def _with_shift(s: Tensor, shift: Tensor | None) -> Tensor:
    if shift is not None:
        s = s + shift.detach().reshape(-1, *[1] * (s.dim() - 2))
    return s.flatten(2).mean(2) if s.dim() == 4 else s


def rows(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def expected(model: Derived, x: Tensor, y: Tensor, fisher: str, s: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the computed weight, G with s_i s_j."""
    A, G = oracles.kronecker(model.reference(), ["layer"], x, y, Categorical(), fisher)
    s = s.detach().reshape(G.shape[:-1])
    return A, G * s.unsqueeze(-1) * s.unsqueeze(-2)


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(8, 5), torch.randn(6, 8)


def convolution() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(2, 5, 3), torch.randn(4, 2, 4, 4)


def depthwise() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(5, 5, 2, groups=5), torch.randn(4, 5, 3, 3)


every_layer = pytest.mark.parametrize("build", [linear, convolution, depthwise])


# ------------------------------------------------------------------- exact: s_o W_o, s free of W
def row(weight: Tensor) -> Tensor:
    return GAIN.reshape(-1, 1) if weight.dim() == 2 else GAIN.reshape(-1, 1, 1, 1)


EXACT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "constant": (lambda w: w * 0.3, lambda w: torch.full((5,), 0.3)),
    "division": (lambda w: w / 4, lambda w: torch.full((5,), 0.25)),
    "gain": (lambda w: row(w) * w, lambda w: GAIN),
    "shifted": (lambda w: row(w) * (w + 1.0) - 2.0, lambda w: GAIN),
}


@both_fishers
@every_layer
@pytest.mark.parametrize("change", EXACT)
def test_row_factors_are_exact(measure: Measure, change: str, build: object, fisher: str) -> None:
    layer, x = build()
    function, factors_of = EXACT[change]
    model = Derived(layer, function)
    y = Categorical().draw(model(x))
    net = kfac_fx.transform(model)
    block = net.curvature.blocks["layer"]
    assert (block.approximation, block.reason) == ("kronecker", None)
    factors = measure(net, x, y, Categorical(), fisher).factors
    close(factors["layer"], expected(model, x, y, fisher, factors_of(layer.weight)))


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@both_fishers
@every_layer
def test_nothing_is_read_that_was_not_written(measure: Measure, build: object, fisher: str) -> None:
    test_row_factors_are_exact(measure, "gain", build, fisher)


@pytest.mark.parametrize("change", EXACT)
def test_one_case_is_the_true_fisher(measure: Measure, change: str) -> None:
    """With one case and one position A (x) G has nothing to approximate."""
    layer, x = nn.Linear(4, 5), torch.randn(1, 4)
    model = Derived(layer, EXACT[change][0])
    A, G = measure(kfac_fx.transform(model), x, None, Normal()).factors["layer"]
    dense = oracles.covariance(model, ["layer.weight"], x, None, Normal())
    torch.testing.assert_close(torch.kron(G, A), dense, rtol=1e-9, atol=1e-12)


def test_a_bias_beside_such_a_weight_is_apart(measure: Measure) -> None:
    layer, x = linear()
    model = Derived(layer, lambda w: w * 0.3)
    y = Categorical().draw(model(x))
    found = measure(kfac_fx.transform(model), x, y, Categorical()).factors
    want = oracles.covariance(model, ["layer.bias"], x, y, Categorical())
    close(found["layer.bias"], (want,))


class Product(Derived):
    """The weight's rows are the second dimension of the parameter."""

    def use(self, x: Tensor) -> Tensor:
        return x @ (self.layer.weight.t() * GAIN) + self.layer.bias

    def computed(self) -> Tensor:
        return self.layer.weight * GAIN.unsqueeze(1)


def test_behind_a_transposition(measure: Measure) -> None:
    layer, x = linear()
    model = Product(layer, lambda w: w)
    y = Categorical().draw(model(x))
    found = measure(kfac_fx.transform(model), x, y, Categorical()).factors
    close(found["layer"], expected(model, x, y, "exact", GAIN))


def test_a_wide_side_is_scaled_too(measure: Measure) -> None:
    layer, x = linear()
    model = Derived(layer, EXACT["gain"][0])
    y = Categorical().draw(model(x))
    net = kfac_fx.transform(model, max_factor_dim=4)
    _, G = measure(net, x, y, Categorical()).factors["layer"]
    want = expected(model, x, y, "exact", GAIN)[1]
    close([G], [want.diagonal()])
    net = kfac_fx.transform(model, max_factor_dim=4, large_factors="blocks")
    _, G = measure(net, x, y, Categorical()).factors["layer"]
    close([G[0], G[1, :2, :2]], [want[:3, :3], want[3:, 3:]])


# --------------------------------------------- approximate: the rest of the Jacobian is left out
def standardised(w: Tensor) -> Tensor:
    flat = w.reshape(1, w.shape[0], -1)
    return F.batch_norm(flat, None, None, GAIN, training=True, eps=1e-6).reshape_as(w)


def standardised_by_hand(w: Tensor) -> Tensor:
    var, mean = torch.var_mean(rows(w), dim=1, unbiased=False, keepdim=True)
    return (GAIN.reshape(-1, 1) * (rows(w) - mean) / (var + 1e-6).sqrt()).view(w.shape)


def deviation(w: Tensor) -> Tensor:
    return (rows(w).var(1, unbiased=False) + 1e-6).sqrt()


APPROXIMATE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "batch_norm": (standardised, lambda w: GAIN / deviation(w)),
    "by hand": (standardised_by_hand, lambda w: GAIN / deviation(w)),
    "weight_norm": (
        lambda w: torch._weight_norm(
            w, torch.ones(5, 1) if w.dim() == 2 else torch.ones(5, 1, 1, 1), 0
        ),
        lambda w: 1 / rows(w).norm(dim=1),
    ),
    "unit rows": (
        lambda w: w / w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.dim() - 1)),
        lambda w: 1 / rows(w).norm(dim=1),
    ),
}


@pytest.mark.parametrize("build", [linear, convolution])
@pytest.mark.parametrize("route", ["symbolic_trace", "export"])
@pytest.mark.parametrize("change", APPROXIMATE)
def test_normalised_weights(measure: Measure, change: str, build: object, route: str) -> None:
    """The Jacobian of the change is taken as one factor for each row, and the block says so."""
    check_normalised(measure, change, build, route)


@pytest.mark.parametrize("build", [linear, convolution])
@pytest.mark.parametrize("change", ["weight_norm", "unit rows"])
def test_a_running_model(measure: Measure, change: str, build: object) -> None:
    check_normalised(measure, change, build, "eager")


def check_normalised(measure: Measure, change: str, build: object, route: str) -> None:
    layer, x = build()
    function, factors_of = APPROXIMATE[change]
    model = Derived(layer, function)
    y = Categorical().draw(model(x))
    net = kfac_fx.transform(model, (x,), capture=route)
    block = net.curvature.blocks["layer"]
    assert block.approximation == "kronecker"
    assert block.reason is not None and "of its Jacobian" in block.reason
    found = measure(net, x, y, Categorical()).factors["layer"][:2]
    close(found, expected(model, x, y, "exact", factors_of(layer.weight)))


def test_a_mask_keeps_the_scale_of_what_trains(measure: Measure) -> None:
    layer, x = linear()
    mask = (torch.arange(40).reshape(5, 8) % 3 != 0).to(x)
    model = Derived(layer, lambda w: w * mask)
    y = Categorical().draw(model(x))
    net = kfac_fx.transform(model)
    reason = net.curvature.blocks["layer"].reason
    assert reason is not None and "mul: taken as a factor for each row" in reason
    found = measure(net, x, y, Categorical()).factors["layer"]
    close(found, expected(model, x, y, "exact", torch.ones(5)))


def test_strict_refuses_what_is_left_out() -> None:
    model = Derived(linear()[0], standardised)
    with pytest.raises(kfac_fx.errors.CoverageError, match="of its Jacobian"):
        kfac_fx.transform(model, strict=True)


# ------------------------------------------------------------------------ torch's own spellings
HELPERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 5), lambda: nn.Conv1d(2, 5, 3)])
@pytest.mark.parametrize("route", ["auto", "eager"])
@pytest.mark.parametrize("helper", HELPERS)
def test_parametrized_layers(
    measure: Measure, helper: str, build: Callable[[], nn.Module], route: str
) -> None:
    """torch.nn.utils' parametrisations."""
    layer = HELPERS[helper](build())
    x = torch.randn(6, 4) if isinstance(layer, nn.Linear) else torch.randn(6, 2, 4)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).eval()
    model(x)
    net = kfac_fx.transform(model, (x,), capture=route)
    (name,) = [p for p in dict(model.named_parameters()) if p in _directions(model)]
    block = net.curvature.blocks[name]
    assert block.approximation == "kronecker", block.reason
    A, G = measure(net, x, None, Bernoulli()).factors[name][:2]
    direction, weight = model.get_parameter(name), layer.weight.detach()
    plain = type(layer)(*(4, 5) if isinstance(layer, nn.Linear) else (2, 5, 3), bias=False)
    plain.weight.data = weight
    reference = nn.Sequential(plain, Shift(layer.bias), *model[1:])
    want = oracles.kronecker(reference, ["0"], x, None, Bernoulli())
    centred = rows(direction) - rows(direction).mean(1, keepdim=True)
    s = ((rows(weight) * centred).sum(1) / centred.square().sum(1)).detach()
    close((A, G), (want[0], want[1] * torch.outer(s, s)))


class Shift(nn.Module):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift.detach()

    def forward(self, s: Tensor) -> Tensor:
        return s + self.shift.reshape(-1, *[1] * (s.dim() - 2))


def _directions(model: nn.Module) -> set[str]:
    ends = ("original1", "weight_v", "weight_orig", "0.parametrizations.weight.original")
    return {name for name, _ in model.named_parameters() if name.endswith(ends)}


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_parametrization_of_ones_own(measure: Measure) -> None:
    layer = nn.Linear(4, 5)
    parametrize.register_parametrization(layer, "weight", Halved())
    net = kfac_fx.transform(nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)))
    block = net.curvature.blocks["0.parametrizations.weight.original"]
    assert (block.kind, block.reason) == ("linear", None)


# ---------------------------------------------------------------------------- what is not taken
def test_mixed_rows_are_no_factor_a_row() -> None:
    order = torch.tensor([1, 2, 3, 4, 0])
    net = kfac_fx.transform(Derived(linear()[0], lambda w: w.index_select(0, order)))
    block = net.curvature.blocks["layer"]
    assert block.approximation == "diagonal"
    assert block.reason is not None and "more than scale its rows" in block.reason


class Elsewhere(Derived):
    def forward(self, x: Tensor) -> Tensor:
        scaled = self.layer.weight * 0.5
        return self.head(F.linear(x, scaled)) + scaled.square().sum()


def test_a_second_way_out_is_seen() -> None:
    """The scaled weight also enters the outputs as it is: no rule knows that use."""
    net = kfac_fx.transform(Elsewhere(nn.Linear(4, 5, bias=False), lambda w: w))
    assert net.curvature.blocks["layer"].approximation == "diagonal"


def test_uses_with_and_without_a_factor_add_up(measure: Measure) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.layer(x)), self.layer.weight * 0.5)

    model, x = Twice(), torch.randn(6, 4)
    A, G = measure(kfac_fx.transform(model), x, None, Normal()).factors["layer"][:2]
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    first.weight.data = model.layer.weight.detach().clone()
    second.weight.data = model.layer.weight.detach() * 0.5
    reference = nn.Sequential(first, nn.Tanh(), second)
    one, two = (oracles.kronecker(reference, [name], x, None, Normal()) for name in ("0", "2"))
    close((A, G), (one[0] + two[0], (one[1] + 0.25 * two[1]) / 2))


def test_strip_taps_leaves_nothing_behind() -> None:
    net = kfac_fx.transform(Derived(linear()[0], standardised))
    kfac_fx.passes.strip_taps(net.graph)
    assert not [n for n in net.graph.nodes if kfac_fx.passes.is_tap(n) or "_kfac_fx" in str(n)]
