"""Cases that a model keeps elsewhere than first: statistics are those of cases all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.oracles import close
from torch import Tensor, nn

import kfac_fx

N, T, D = 6, 3, 4
Value = Any
"""A model, or what one is built of."""


class Norm(nn.Module):
    """A layer and a norm over [positions, cases, features], made in a given way.

    Args:
        turn: puts the cases second.
        back: puts them first again.
    """

    def __init__(
        self, turn: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.turn, self.back = turn, back
        self.a, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.a(self.turn(x))))
        if self.back is None:
            return self.head(h.mean(0))  # type: ignore[no-any-return]
        return self.head(self.back(h).mean(1))  # type: ignore[no-any-return]


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]] = {
    "transpose": (lambda x: x.transpose(0, 1), None),
    "swapaxes and back": (lambda x: torch.swapaxes(x, 1, 0), lambda x: x.transpose(1, 0)),
    "permute": (lambda x: x.permute(1, 0, 2), lambda x: x.permute(1, 0, -1)),
    "a dimension more": (lambda x: x.unsqueeze(0).transpose(1, 2)[0], None),
    "movedim": (lambda x: torch.movedim(x, 1, 0), lambda x: x.movedim(0, 1)),
    "einsum": (lambda x: torch.einsum("ntd->tnd", x), None),
    "a chunk": (lambda x: torch.cat([x, 2 * x], -1).transpose(0, 1).chunk(2, -1)[0], None),
    "a sort": (lambda x: x.transpose(0, 1).sort(0)[0], None),
    "the own shape": (lambda x: (y := x.transpose(0, 1)).reshape(y.shape[0], y.shape[1], D), None),
    "an index": (lambda x: torch.stack([x, 2 * x]).transpose(1, 2)[1], None),
}


def on_route(kind: type[nn.Module], capture: Value) -> tuple[Value, Tensor, Value]:
    """Return a model in float64, cases of it, and the net that a route makes of it."""
    torch.manual_seed(0)
    model = kind().double()
    x = torch.randn(N, T, D, dtype=torch.float64)
    return model, x, kfac_fx.transform(model, x, capture=capture, structure="block_diagonal")


def recorded(net: Value, x: Tensor, **options: Value) -> kfac_fx.Preconditioner:
    found = kfac_fx.Preconditioner(net, "categorical", fisher="exact", ema_decay=0.0, **options)
    outputs = net(x)
    found.observe(outputs)
    outputs.square().sum().backward()
    found.step()
    return found


def covariance(model: nn.Module, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The Fisher of some parameters, from the definition: case by case, class by class."""
    total = torch.zeros((), dtype=torch.float64)
    for case in range(len(x)):
        logits = model(x[case : case + 1])[0]
        probabilities = logits.softmax(-1).detach()
        for index, probability in enumerate(probabilities):
            loss = -logits.log_softmax(-1)[index]
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            u = torch.cat([g.flatten() for g in found])
            total = total + probability * torch.outer(u, u) / len(x)
    return total


def built(way: str) -> tuple[Norm, Norm, Tensor]:
    """A model that turns, one that does not with the same parameters, and a batch."""
    torch.manual_seed(0)
    model, plain = Norm(*WAYS[way]), Norm(lambda x: x, lambda x: x)
    plain.load_state_dict(model.state_dict())
    scale = 2.0 if way == "an index" else 1.0
    plain.turn = (lambda x: x.sort(1)[0]) if way == "a sort" else lambda x: scale * x
    return model.double(), plain.double(), torch.randn(N, T, D, dtype=torch.float64)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_covariances_are_of_cases(way: str, capture: str) -> None:
    model, plain, x = built(way)
    net = kfac_fx.transform(model, x, capture=capture, structure="block_diagonal")
    wanted = covariance(plain, x, [plain.norm.weight, plain.norm.bias])
    close((recorded(net, x).factors["norm"][0],), (wanted,))
    close((net(x),), (model(x),))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_are_those_of_cases_first(way: str, sharing: Value, capture: Value) -> None:
    model, plain, x = built(way)
    options: Value = {"structure": "block_diagonal", "weight_sharing": sharing}
    got = recorded(kfac_fx.transform(model, x, capture=capture, **options), x)
    want = recorded(kfac_fx.transform(plain, **options), x)
    close(got.factors["a"], want.factors["a"])


def test_moments_are_those_of_cases_first() -> None:
    model, plain, x = built("transpose")
    preconditioned = []
    for one in (model, plain):
        one.zero_grad()
        net = kfac_fx.transform(one, structure="block_diagonal", ekfac=True)
        for _ in range(2):
            recorded(net, x, tikhonov="ekfac", damping=1e-2)
        preconditioned.append([p.grad for p in one.parameters() if p.grad is not None])
    close(*preconditioned)


def test_couplings_are_those_of_cases_first() -> None:
    model, plain, x = built("transpose")
    grads = []
    for one in (model, plain):
        one.zero_grad()
        recorded(kfac_fx.transform(one), x, damping=1e-2)
        grads.append([p.grad for p in one.parameters() if p.grad is not None])
    close(*grads)


def test_the_models_own_inputs_may_have_the_cases_second() -> None:
    """The outputs say which open size counts the cases."""
    torch.manual_seed(0)
    first, second = (
        nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=b).double()
        for b in (True, False)
    )
    second.load_state_dict(first.state_dict())

    class Encoder(nn.Module):
        def __init__(self, layer: nn.Module, positions: int) -> None:
            super().__init__()
            self.layer, self.head, self.positions = layer, nn.Linear(D, 3), positions

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(self.positions))  # type: ignore[no-any-return]

    plain, model = Encoder(first, 1).double(), Encoder(second, 0).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(N, T, D, dtype=torch.float64)
    turned = x.transpose(0, 1).contiguous()
    found = recorded(kfac_fx.transform(model, turned, structure="block_diagonal"), turned)
    for name in ("norm1", "norm2"):
        part = getattr(first, name)
        wanted = covariance(plain, x, [part.weight, part.bias])
        close((found.factors[f"layer.{name}"][0],), (wanted,))


class Rows(nn.Module):
    """A norm over positions that are folded into rows.

    Args:
        fold: from [cases, positions, features] to rows.
        norm: the norm.
    """

    def __init__(self, fold: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.fold, self.norm = fold, norm
        self.a, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.a(self.fold(x))))
        return self.head(torch.tanh(h).reshape(x.shape[0], -1, D).mean(1))  # type: ignore[no-any-return]


FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(-1, D),
    "a product": lambda x: x.reshape(x.shape[0] * x.shape[1], D),
    "flatten": lambda x: torch.flatten(x, 0, 1),
    "copies": lambda x: x[:, 0].repeat_interleave(3, 0),
    "windows": lambda x: x.repeat(1, 2, 1).view(x.shape[0], T, 2, D).transpose(1, 2).reshape(-1, D),
}


def covariance_of_cases(model: nn.Module, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The Fisher of some parameters where a norm's moments are those of the whole batch."""
    logits = model(x)
    total = torch.zeros((), dtype=torch.float64)
    for row in logits:
        for probability, log in zip(row.softmax(-1).detach(), row.log_softmax(-1), strict=True):
            found = torch.autograd.grad(-log, parameters, retain_graph=True)
            u = torch.cat([g.flatten() for g in found])
            total = total + probability * torch.outer(u, u) / len(x)
    return total


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("fold", FOLDS)
def test_covariances_of_folded_rows_are_of_cases(fold: str, norm: Value, capture: Value) -> None:
    torch.manual_seed(0)
    model = Rows(FOLDS[fold], norm(D)).double()
    x = torch.randn(N, T, D, dtype=torch.float64)
    net = kfac_fx.transform(model, x, capture=capture, structure="block_diagonal")
    wanted = covariance_of_cases(model, x, [model.norm.weight, model.norm.bias])  # type: ignore[list-item]
    close((recorded(net, x).factors["norm"][0],), (wanted,))


@pytest.mark.parametrize("capture", ["export", "eager"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_of_one_position_after_another(sharing: Value, capture: Value) -> None:
    """Sizes say it; nn.MultiheadAttention does it before its last layer."""
    torch.manual_seed(0)

    class Turned(Rows):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(torch.tanh(self.a(x.transpose(0, 1).flatten(0, 1))))
            return self.head(h.view(x.shape[1], x.shape[0], D)).mean(0)  # type: ignore[no-any-return]

    class Plain(Rows):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.tanh(self.a(x)))).mean(1)  # type: ignore[no-any-return]

    model, plain = (kind(lambda x: x, nn.LayerNorm(D)).double() for kind in (Turned, Plain))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(N, T, D, dtype=torch.float64)
    options: Value = {"structure": "block_diagonal", "weight_sharing": sharing}
    got = recorded(kfac_fx.transform(model, x, capture=capture, **options), x).factors
    want = recorded(kfac_fx.transform(plain, **options), x).factors
    close(got["norm"], want["norm"])
    for name in ("a", "head") if sharing == "reduce" else ():
        close(got[name], want[name])


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_folded_rows_are_reduced_by_case(capture: Value) -> None:
    torch.manual_seed(0)
    model, plain = (Rows(fold, nn.Identity()).double() for fold in (FOLDS["view"], lambda x: x))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(N, T, D, dtype=torch.float64)
    options: Value = {"structure": "block_diagonal", "weight_sharing": "reduce"}
    got = recorded(kfac_fx.transform(model, x, capture=capture, **options), x)
    want = recorded(kfac_fx.transform(plain, **options), x)
    close(got.factors["a"], want.factors["a"])


class Broadcast(nn.Module):
    """A scale of features and a table of positions, with the positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(D, D), nn.Linear(D, 3)
        self.scale, self.table = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(T, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).transpose(0, 1) * self.scale + self.table
        return self.head(torch.tanh(h).mean(0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_broadcast_parameters_have_gradients_of_cases(capture: Value) -> None:
    model, x, net = on_route(Broadcast, capture)
    found = recorded(net, x).factors
    close(found["scale"], (covariance(model, x, [model.scale]),))
    close(found["table"], (covariance(model, x, [model.table]),))
    again = kfac_fx.transform(net, x, structure="block_diagonal")  # all that was inserted goes
    close(recorded(again, x).factors["table"], found["table"])


LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "positions around": lambda x: x.unflatten(1, (2, T)).permute(1, 0, 2, 3).reshape(-1, D),
    "two batches": lambda x: torch.cat([x, x.flip(1)])[:, 0],
    "every other row": lambda x: x.flatten(0, 1)[::2],
}


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
@pytest.mark.parametrize("way", LOST)
def test_rows_of_unknown_cases_are_named(way: str, capture: Value) -> None:
    model = Rows(LOST[way], nn.LayerNorm(D))
    x = torch.randn(N, 2 * T, D)
    net = kfac_fx.transform(model, x, capture=capture, structure="block_diagonal")
    # Rows of the dense layers count alike, whoever's they are.
    assert [block.name for block in net.curvature.fallbacks] == ["norm"]
    assert "where its cases are cannot be told" in str(net.curvature)


class CaseByCase(nn.Module):
    """Each case goes through a layer alone, and all of them meet in a batch again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.stack([torch.tanh(self.a(case[0])) for case in x])))  # type: ignore[no-any-return]


def test_batches_that_are_stacked_of_cases_have_factors_of_features() -> None:
    torch.manual_seed(0)
    model = CaseByCase().double()
    x = torch.randn(N, T, D, dtype=torch.float64)
    net = kfac_fx.transform(model, x, capture="eager", structure="block_diagonal")
    found = recorded(net, x)
    wanted = covariance(model, x, [model.norm.weight, model.norm.bias])
    close((found.factors["norm"][0],), (wanted,))
    assert [f.shape for f in found.factors["head"]] == [(D + 1, D + 1), (3, 3)]


class States(nn.Module):
    """A norm over the states [layers, cases, features] of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm = nn.LSTM(D, D, batch_first=True), nn.LayerNorm(D)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x)[1][1])[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_states_of_recurrent_layers_have_the_cases_second(capture: Value) -> None:
    model, x, net = on_route(States, capture)
    wanted = covariance(model, x, [model.norm.weight, model.norm.bias])
    close((recorded(net, x).factors["norm"][0],), (wanted,))


class Folded(nn.Module):
    """One layer on [cases, features] and on positions that are folded into rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(D, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        n, t, d = y.shape
        h = torch.tanh(self.a(torch.relu(y.reshape(n * t, d)))).view(n, t, 5)
        return self.head(torch.tanh(self.a(x)) + h.sum(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", [False, True])
def test_rows_of_all_uses_weigh_alike(example: bool) -> None:
    torch.manual_seed(0)
    model = Folded().double()
    x, y = torch.randn(8, D, dtype=torch.float64), torch.randn(8, 6, D, dtype=torch.float64)
    inputs = ((x, y),) if example else ()
    net = kfac_fx.transform(model, *inputs, structure="block_diagonal")
    found = kfac_fx.Preconditioner(net, "normal", fisher="exact", ema_decay=0.0)
    outputs = net(x, y)
    found.observe(outputs)
    outputs.mean().backward()
    found.step()
    A, G = found.factors["a"][:2]
    rows = torch.cat([x, torch.relu(y).flatten(0, 1)])
    close((A,), (rows.T @ rows / 8,))
    # G from the definition: a normal likelihood has a Jacobian for each output.
    hidden: list[Tensor] = []
    handle = model.a.register_forward_hook(lambda m, a, out: hidden.append(out))
    outputs = model(x, y)
    handle.remove()
    wanted = torch.zeros(5, 5, dtype=torch.float64)
    for output in range(2):
        for case in range(8):
            wrt = torch.autograd.grad(outputs[case, output], hidden, retain_graph=True)
            wanted += sum(g.T @ g for g in wrt) / (8 * 7)
    close((G / G.trace(),), (wanted / wanted.trace(),))
    close((A.trace() * G.trace() * torch.ones(()),), (A.trace() * wanted.trace(),))
