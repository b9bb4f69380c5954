"""Rows that are not one case each: folded, in another order, of several batches, or mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.oracles import close
from torch import Tensor, nn

import kfac_fx

N, T, D, FRAMES = 6, 3, 4, 5
Value = Any
"""A model, or what one is built of."""

ROUTES = pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])


class Rows(nn.Module):
    """A layer, something with parameters of its own, and what is done between input and output.

    Args:
        way: from the model and [cases, positions, features] to [cases, features].
        own: what has the parameters; a parameter, or a module.
    """

    def __init__(self, way: Callable[[Value, Tensor], Tensor], own: Value) -> None:
        super().__init__()
        self.a, self.head, self.own, self.way = nn.Linear(D, D), nn.Linear(D, 3), own, way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.way(self, x)))  # type: ignore[no-any-return]


def built(way: Callable[[Value, Tensor], Tensor], own: Value) -> tuple[Rows, Tensor]:
    torch.manual_seed(0)
    model = Rows(way, own()).double()
    return model, torch.randn(N, T, D, dtype=torch.float64)


def recorded(model: nn.Module, x: Tensor, capture: Value, **options: Value) -> Value:
    """Return a net and the factors that it has recorded of cases."""
    net = kfac_fx.transform(model, x, capture=capture, structure="block_diagonal", **options)
    found = kfac_fx.Preconditioner(net, "categorical", fisher="exact", ema_decay=0.0)
    outputs = net(x)
    close((outputs,), (model(x),))
    found.observe(outputs)
    outputs.square().sum().backward()
    found.step()
    return net, found.factors


def derivatives(model: nn.Module, x: Tensor, wrt: Value) -> list[tuple[Tensor, list[Tensor]]]:
    """Return probabilities, and derivatives of all tensors, of each class of each case."""
    found = []
    for row in model(x):
        for probability, log in zip(row.softmax(-1).detach(), row.log_softmax(-1), strict=True):
            grads = torch.autograd.grad(-log, wrt() if callable(wrt) else wrt, retain_graph=True)
            found.append((probability / len(x), list(grads)))
    return found


def covariance(model: Rows, x: Tensor) -> Tensor:
    """The Fisher of what has parameters of its own, from the definition."""
    own = model.own
    parameters = [own] if isinstance(own, nn.Parameter) else list(own.parameters())
    total = torch.zeros((), dtype=torch.float64)
    for weight, grads in derivatives(model, x, parameters):
        u = torch.cat([g.flatten() for g in grads])
        total = total + weight * torch.outer(u, u)
    return total


def product(model: Rows, x: Tensor) -> Tensor:
    """A (x) G of the layer, from all rows of all of its uses."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(args[0].detach().reshape(-1, D))
        outputs.append(out)

    handle = model.a.register_forward_hook(hook)
    found = derivatives(model, x, lambda: outputs)
    handle.remove()
    rows = torch.cat(inputs)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    G = torch.zeros(D, D, dtype=torch.float64)
    for weight, grads in found:
        g = torch.cat([one.reshape(-1, D) for one in grads])
        G += weight * g.T @ g
    return torch.kron(rows.T @ rows, G) / len(rows)


def parameter(*sizes: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*sizes))


def unfolded(model: Value, x: Tensor, rows: Tensor) -> Tensor:
    return rows.view(x.shape[0], -1, D).mean(1)


BROADCAST: dict[str, tuple[Callable[[Value, Tensor], Tensor], Value]] = {
    "a shift of rows": (
        lambda m, x: unfolded(m, x, torch.tanh(m.a(x.view(-1, D)) + m.own)),
        parameter(D),
    ),
    "a scale of rows": (
        lambda m, x: unfolded(m, x, torch.tanh(m.a(x.flatten(0, 1)) * m.own)),
        parameter(1, D),
    ),
    "a computed scale": (
        lambda m, x: unfolded(m, x, m.a(x.reshape(x.shape[0] * x.shape[1], D)) * m.own.square()),
        parameter(D),
    ),
    "positions of windows": (
        lambda m, x: unfolded(
            m, x, torch.tanh(torch.stack([m.a(x), x], 2).view(-1, 2, D) + m.own).reshape(-1, D)
        ),
        parameter(2, D),
    ),
    "positions of cases": (
        lambda m, x: torch.tanh(m.a(x.flatten(1).view(-1, T, D)) + m.own).mean(1),
        parameter(T, D),
    ),
}


@ROUTES
@pytest.mark.parametrize("way", BROADCAST)
def test_broadcast_parameters_of_folded_rows(way: str, capture: Value) -> None:
    model, x = built(*BROADCAST[way])
    net, factors = recorded(model, x, capture)
    if (way, capture) == ("a computed scale", "eager"):  # has no tap there
        assert [block.name for block in net.curvature.fallbacks] == ["own"]
        return
    close((factors["own"][0],), (covariance(model, x),))
    assert not net.curvature.fallbacks
    again = kfac_fx.transform(net, x, structure="block_diagonal")  # all that was inserted goes
    assert again.curvature.blocks["own"].factors == net.curvature.blocks["own"].factors


def frames(fold: Callable[[Tensor], Tensor]) -> Callable[[Value, Tensor], Tensor]:
    """A norm that looks at whole frames [features, entries], several of each case."""

    def way(model: Value, x: Tensor) -> Tensor:
        h = fold(model.a(x).unsqueeze(-1) * torch.arange(1.0, 1 + FRAMES).to(x))
        return model.own(h).square().mean(-1).view(x.shape[0], -1, D).mean(1)  # type: ignore[no-any-return]

    return way


FRAME_FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda h: h.view(-1, D, FRAMES),
    "flatten": lambda h: h.flatten(0, 1),
    "no fold": lambda h: h.mean(1).view(-1, D, FRAMES),
}


@ROUTES
@pytest.mark.parametrize("fold", FRAME_FOLDS)
@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, D), lambda: nn.InstanceNorm1d(D, affine=True)]
)
def test_norms_of_frames_have_gradients_of_cases(norm: Value, fold: str, capture: Value) -> None:
    model, x = built(frames(FRAME_FOLDS[fold]), norm)
    net, factors = recorded(model, x, capture)
    close((factors["own"][0],), (covariance(model, x),))
    assert not net.curvature.fallbacks


UNEVEN: dict[str, Callable[[Value, Tensor], Tensor]] = {
    "two batches": lambda m, x: (
        torch.tanh(m.a(torch.cat([torch.tanh(m.a(x[:, 0])), x[:, 1]]))).view(2, -1, D).sum(0)
    ),
    "some rows": lambda m, x: torch.cat([m.a(torch.tanh(m.a(x[:, 0]))[:4]), x[4:, 1]]),
    "a row more": lambda m, x: m.a(torch.cat([m.a(x[:, 0]), x[:1, 1]]))[1:],
    "positions": lambda m, x: m.a(x[:, 0]) + m.a(x.flatten(0, 1)).view(x.shape[0], -1, D).sum(1),
    "positions first": lambda m, x: m.a(m.a(x.transpose(0, 1)).sum(0)),
    "chosen rows": lambda m, x: m.a(x[:, 0]) + m.a(x[:, 1][[0, 2, 4, 0, 2, 4, 1, 3]])[:N],
}


@ROUTES
@pytest.mark.parametrize("way", UNEVEN)
def test_rows_of_uses_of_different_numbers_weigh_alike(way: str, capture: Value) -> None:
    model, x = built(UNEVEN[way], nn.Identity)
    _, factors = recorded(model, x, capture)
    A, G = factors["a"][:2]
    close((torch.kron(A, G),), (product(model, x),))


@ROUTES
@pytest.mark.parametrize("kind", ["convolution", "embedding"])
def test_other_layers_of_two_batches(kind: str, capture: Value) -> None:
    """Both batches at once give the factors of one after the other."""
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self, layer: nn.Module, both: bool) -> None:
            super().__init__()
            self.layer, self.both, self.head = layer, both, nn.Linear(D, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.layer(x)
            if self.both:
                several = self.layer(torch.cat([y, y]))
                h = h + several[: x.shape[0]] + several[x.shape[0] :]
            else:
                h = h + self.layer(y) + self.layer(y)
            return self.head(torch.tanh(h).flatten(2).mean(2))  # type: ignore[no-any-return]

    x, y = torch.randn(2, N, 2, 7, dtype=torch.float64)
    layer: nn.Module = nn.Conv1d(2, D, 3).double()
    if kind == "embedding":
        layer = nn.Sequential(nn.Embedding(5, D).double(), Turn())
        x, y = (t[:, 0].abs().long().clamp(max=4) for t in (x, y))
    found = []
    for both in (True, False):
        model = Twice(layer, both).double()
        torch.nn.init.ones_(model.head.weight)
        net = kfac_fx.transform(model, (x, y), capture=capture, structure="block_diagonal")
        preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", ema_decay=0.0)
        outputs = net(x, y)
        preconditioner.observe(outputs)
        outputs.mean().backward()
        preconditioner.step()
        factors = preconditioner.factors["layer.0" if kind == "embedding" else "layer"]
        found.append((factors[0], factors[1]))
    (A, G), (A_2, G_2) = found
    close((A * G.trace(),), (A_2 * G_2.trace(),))
    close((G * A.sum(),), (G_2 * A_2.sum(),))


class Turn(nn.Module):
    """Put the features of embeddings before the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


ORDERED: dict[str, tuple[Callable[[Value, Tensor], Tensor], bool]] = {
    "flipped cases": (lambda m, x: m.own(m.a(x[:, 0]).flip(0)), True),
    "rolled cases": (lambda m, x: m.own(m.a(x[:, 0]).roll(2, 0)).roll(-2, 0), True),
    "sorted cases": (lambda m, x: m.own(m.a(x[:, 0]).sort(0)[0]), True),
    "flipped rows": (lambda m, x: unfolded(m, x, m.own(m.a(x.flatten(0, 1)).flip(0))), False),
    "rolled rows": (lambda m, x: unfolded(m, x, m.own(m.a(x.flatten(0, 1)).roll(1, 0))), False),
    "sorted rows": (lambda m, x: unfolded(m, x, m.own(m.a(x.flatten(0, 1)).sort(0)[0])), False),
    "chosen cases": (
        lambda m, x: m.own(m.a(x[:, 0]).index_select(0, torch.tensor([0, 0, 1, 1, 2, 2]))),
        False,
    ),
    "cases in order": (
        lambda m, x: m.own(m.a(x[:, 0]).index_select(0, x[:, 0, 0].argsort())),
        True,
    ),
    "sorted later": (lambda m, x: m.own(m.a(x[:, 0])).sort(0)[0], False),
    "summed later": (lambda m, x: m.own(m.a(x[:, 0])).cumsum(0), False),
    "positions sorted": (lambda m, x: m.own(m.a(x).sort(1)[0]).flip(1).cumsum(1)[:, 1], True),
}


@ROUTES
@pytest.mark.parametrize("way", ORDERED)
def test_another_order_is_right_or_named(way: str, capture: Value) -> None:
    forward, right = ORDERED[way]
    model, x = built(forward, lambda: nn.LayerNorm(D))
    net, factors = recorded(model, x, capture)
    if right:
        close((factors["own"][0],), (covariance(model, x),))
    assert [block.name for block in net.curvature.fallbacks] == ([] if right else ["own"])


@ROUTES
def test_numbers_that_are_sorted_mix_no_cases(capture: Value) -> None:
    """Experts put tokens in order and back; symbolic tracing cannot know that they are numbers."""

    def forward(m: Value, x: Tensor) -> Tensor:
        rows = m.own(m.a(x[:, 0]))
        order = rows.argmax(-1).sort(0)[1]
        back: Tensor = rows[order][order.argsort()]
        return back

    model, x = built(forward, lambda: nn.LayerNorm(D))
    net, factors = recorded(model, x, capture)
    close((factors["own"][0],), (covariance(model, x),))
    named = [block.name for block in net.curvature.fallbacks] == ["own"]
    assert named is (capture == "symbolic_trace")


SHAPES: dict[str, tuple[Callable[[Value, Tensor], Tensor], bool]] = {
    "squeezed": (lambda m, x: m.own(m.a(x[:, 0]).unsqueeze(0)).squeeze(0), True),
    "squeezed before": (lambda m, x: m.own(m.a(x[:, :1].transpose(0, 1).squeeze(0))), True),
    "squeezed whole": (lambda m, x: m.own(m.a(x[:, :1]).squeeze()), True),
    "positions unflattened": (lambda m, x: m.own(m.a(x).unflatten(1, (T, 1))).mean((1, 2)), True),
    "rows unflattened": (
        lambda m, x: m.own(m.a(x.flatten(0, 1)).unflatten(0, (x.shape[0], T))).mean(1),
        True,
    ),
    "cases unflattened": (
        lambda m, x: m.own(m.a(x).unflatten(0, (2, -1))).flatten(0, 1)[:, 0],
        False,
    ),
    "halves of the batch": (lambda m, x: m.own(m.a(x[:, 0]).view(2, -1, D)).reshape(-1, D), False),
}


@ROUTES
@pytest.mark.parametrize("way", SHAPES)
def test_other_shapes_are_right_or_named(way: str, capture: Value) -> None:
    forward, right = SHAPES[way]
    model, x = built(forward, lambda: nn.LayerNorm(D))
    net, factors = recorded(model, x, capture)
    if right:
        close((factors["own"][0],), (covariance(model, x),))
        close((torch.kron(*factors["a"][:2]),), (product(model, x),))
    assert [block.name for block in net.curvature.fallbacks] == ([] if right else ["own"])


@ROUTES
def test_pairs_of_cases_are_named(capture: Value, caplog: pytest.LogCaptureFixture) -> None:
    """Symbolic tracing knows no sizes, so that it is said as the net runs."""
    kfac_fx.ops.case_first._said.clear()
    model, x = built(lambda m, x: m.own(m.a(x[:, 0]).view(-1, 2, D)).reshape(-1, D), nn.Identity)
    model.own = nn.LayerNorm(D).double()
    net, _ = recorded(model, x, capture)
    said = "several cases into each row" in caplog.text
    named = [block.name for block in net.curvature.fallbacks] == ["own"]
    assert said is (capture == "symbolic_trace") and named is not said


@ROUTES
@pytest.mark.parametrize("apart", [True, False])
def test_layers_on_both_sides_of_another_order_are_not_coupled(apart: bool, capture: Value) -> None:
    model, x = built(lambda m, x: torch.relu(m.a(x[:, 0])).flip(0 if apart else 1), nn.Identity)
    net = kfac_fx.transform(model, x, capture=capture)
    pairs = {(pair.earlier, pair.later) for pair in net.curvature.pairs}
    coupled = set() if apart or capture == "eager" else {("a", "head")}
    assert pairs == coupled
