"""Factors of further kinds against a definition that needs no formula of the layer.

The input of a weight's row is the derivative of one output entry in that row, so A is the sum of
its outer products over cases and positions, and G that of the derivatives in the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from support.derivative_oracle import Wrapped, WrappedPair, measured, oracle
from support.shared_weights import Packed, Tied, Unpacked
from torch import Tensor, nn

import kfac_fx


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.usefixtures("float64")
def test_transposed_convolution(
    stride: int, padding: int, dilation: int, output_padding: int
) -> None:
    """Every geometry that torch allows."""
    if output_padding >= max(stride, dilation):
        pytest.skip("torch refuses it")
    layer = nn.ConvTranspose1d(2, 3, 3, stride, padding, output_padding, dilation=dilation)
    x = torch.randn(4, 2, 5)
    model = Wrapped(layer, layer(x).flatten(1).shape[1])
    want = oracle(model, (x,), lambda w: w.transpose(0, 1).flatten(1), 1)
    for found, expected in zip(measured(model, (x,), "layer"), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_transposed_convolution_2d() -> None:
    layer, x = nn.ConvTranspose2d(2, 3, (2, 3), (2, 1), (0, 1), bias=False), torch.randn(3, 2, 3, 4)
    model = Wrapped(layer, layer(x).flatten(1).shape[1])
    want = oracle(model, (x,), lambda w: w.transpose(0, 1).flatten(1), 1)
    for found, expected in zip(measured(model, (x,), "layer"), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_grouped_transposed_convolution_is_one_block_a_group() -> None:
    layer, x = nn.ConvTranspose1d(4, 6, 3, 2, groups=2), torch.randn(3, 4, 5)
    whole = measured(Wrapped(layer, layer(x).flatten(1).shape[1]), (x,), "layer")
    A, G = whole
    assert A.shape == (2, 7, 7) and G.shape == (2, 3, 3)
    part = nn.ConvTranspose1d(2, 3, 3, 2)
    with torch.no_grad():
        part.weight.copy_(layer.weight[2:])
        part.bias.copy_(layer.bias[3:])
    model = Wrapped(part, part(x[:, 2:]).flatten(1).shape[1])
    (expected, _) = oracle(model, (x[:, 2:],), lambda w: w.transpose(0, 1).flatten(1), 1)
    torch.testing.assert_close(A[1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_bilinear() -> None:
    """The input is the outer product of both inputs."""
    layer, inputs = nn.Bilinear(2, 4, 3), (torch.randn(5, 2), torch.randn(5, 4))
    model = WrappedPair(layer, 3)
    want = oracle(model, inputs, lambda w: w.flatten(1), 1)
    for found, expected in zip(measured(model, inputs, "layer"), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Experts(nn.Module):
    """Each group of features has a matrix of its own."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:  # [groups, N, 4] -> [groups, N, 3]
        if self.call == "bmm":
            return torch.bmm(x, self.weight)
        return torch.einsum("gni,gio->gno", x, self.weight)


@pytest.mark.parametrize("call", ["bmm", "einsum"])
@pytest.mark.usefixtures("float64")
def test_batched_matrices_are_one_block_a_matrix(call: str) -> None:
    model, x = Experts(call), torch.randn(2, 5, 4)
    net = kfac_fx.transform(model)
    preconditioner = kfac_fx.Preconditioner(
        net,
        lambda f: torch.distributions.Normal(f, 1.0),
        fisher="exact",
        damping=1e-2,
        trust_region=None,
    )
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.square().sum().backward()
    gradient = model.weight.grad.clone()
    preconditioner.step()
    A, G = preconditioner.factors["weight"]
    for group in range(2):
        torch.testing.assert_close(A[group], x[group].T @ x[group] / 5)
        torch.testing.assert_close(G[group], torch.eye(3) * 5 / (2 * 5 * 3))
        a, g = A[group].trace() / 4, G[group].trace() / 3
        pi, gamma = (a / g).sqrt(), 0.1
        left = torch.linalg.inv(A[group] + pi * gamma * torch.eye(4))
        right = torch.linalg.inv(G[group] + gamma / pi * torch.eye(3))
        torch.testing.assert_close(model.weight.grad[group], left @ gradient[group] @ right)


class Product(nn.Module):
    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.randn(shape)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight)


EQUATION = "...ni,...io->...no"
BROADCAST: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "ellipsis": (lambda x, w: torch.einsum(EQUATION, x, w), (2, 5, 4)),
    "ellipsis of the weight": (lambda x, w: torch.einsum("ni,...io->n...o", x, w), (5, 4)),
    "one input": (lambda x, w: torch.einsum(EQUATION, x, w), (5, 4)),
    "one group of inputs": (lambda x, w: torch.einsum(EQUATION, x, w), (1, 5, 4)),
    "a letter of one": (lambda x, w: torch.einsum("gni,gio->gno", x, w), (1, 5, 4)),
    "matmul of one": (lambda x, w: x @ w, (1, 5, 4)),
}


def factors_of(
    model: nn.Module, x: Tensor, route: kfac_fx.config.Capture | None = None
) -> Sequence[Tensor]:
    """Of the model as a route captures it; None captures it without example inputs."""
    net = kfac_fx.transform(model, None if route is None else x, capture=route or "auto")
    preconditioner = kfac_fx.Preconditioner(net, Normal, fisher="exact")
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.square().sum().backward()
    preconditioner.step()
    assert net.curvature.blocks["weight"].approximation == "kronecker"
    return preconditioner.factors["weight"]


def Normal(outputs: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Normal(outputs, 1.0)


@pytest.mark.parametrize("way", BROADCAST)
@pytest.mark.usefixtures("float64")
def test_groups_that_are_broadcast(way: str) -> None:
    """Every matrix has an A of the input that it multiplies, shared or not."""
    call, shape = BROADCAST[way]
    x = torch.randn(shape)
    A, G = factors_of(Product(call, 2, 4, 3), x)
    every = x.reshape(-1, 5, 4).expand(2, 5, 4)
    terms = 2 * 5 * 3
    found = A.reshape(-1, 4, 4)
    if way == "ellipsis of the weight":  # the input has no groups: all outputs are one layer's
        torch.testing.assert_close(A, every[0].T @ every[0] / 5)
        torch.testing.assert_close(G, torch.eye(6) * 5 / terms)
        return
    torch.testing.assert_close(found, every.mT @ every / 5)
    torch.testing.assert_close(G, torch.eye(3).expand(2, 3, 3) * 5 / terms)


@pytest.mark.usefixtures("float64")
def test_groups_of_an_input_with_more_or_fewer_dimensions() -> None:
    """Several letters are the input's features, or the output's."""
    many, few = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 4)

    def several_inputs(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("gnab,gabo->ngo", x, w).flatten(1)

    def several_outputs(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("gni,gioa->ngoa", x, w).flatten(1)

    for rows, (A, G) in (
        (many.flatten(2), factors_of(Product(several_inputs, 2, 3, 4, 6), many)),
        (few, factors_of(Product(several_outputs, 2, 4, 3, 2), few)),
    ):
        torch.testing.assert_close(A, rows.mT @ rows / 5)
        torch.testing.assert_close(G, torch.eye(6).expand(2, 6, 6) / 12)


GROUPS_FIRST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transpose": lambda x, w: (x.transpose(0, 1) @ w).transpose(0, 1),
    "permute": lambda x, w: (x.permute(1, 0, 2) @ w).permute(1, 0, 2),
    "bmm": lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1),
    "baddbmm": lambda x, w: torch.baddbmm(torch.ones(2, 1, 3), x.transpose(0, 1), w).mean(0),
    "stack": lambda x, w: (torch.stack([x[:, 0], x[:, 1]]) @ w).transpose(0, 1),
    "einsum": lambda x, w: torch.einsum("ngi,gio->ngo", x, w),
}


@pytest.mark.parametrize("way", GROUPS_FIRST)
@pytest.mark.parametrize("route", [None, "auto", "export", "eager"])
@pytest.mark.usefixtures("float64")
def test_groups_before_the_cases(way: str, route: kfac_fx.config.Capture | None) -> None:
    """An ensemble's members or experts: [groups, cases, in] multiplies [groups, in, out].

    The tap sees the cases first, and its groups are one place further on then.
    """
    x = torch.randn(5, 2, 4)
    model = Product(lambda x, w: GROUPS_FIRST[way](x * 1.0, w), 2, 4, 3)
    A, G = factors_of(model, x, route)
    for group in range(2):
        torch.testing.assert_close(A[group], x[:, group].T @ x[:, group] / 5)
        share = 1 / (5 * 3 * 4) if way == "baddbmm" else 1 / (5 * 2 * 3)  # there a mean of two
        torch.testing.assert_close(G[group], torch.eye(3) * 5 * share)


@pytest.mark.usefixtures("float64")
def test_heads_after_the_cases() -> None:
    """[1, heads, in, out] multiplies [cases, heads, positions, in]."""
    x = torch.randn(5, 2, 3, 4)
    A, G = factors_of(Product(torch.matmul, 1, 2, 4, 3), x)
    for head in range(2):
        rows = x[:, head].flatten(0, 1)
        torch.testing.assert_close(A[head], rows.T @ rows / 5)
        torch.testing.assert_close(G[head], torch.eye(3) * 5 * 3 / (5 * 2 * 3 * 3) / 3)


@pytest.mark.parametrize("call", [lambda x, w: x @ w, BROADCAST["ellipsis"][0]])
@pytest.mark.usefixtures("float64")
def test_a_single_matrix_is_no_group(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, 4)
    found = factors_of(Product(call, 1, 4, 3), x)
    expected = factors_of(Product(lambda x, w: x @ w, 4, 3), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def _embedding_oracle(model: Tied, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and G of the look-up, A and G of the head, for a categorical likelihood."""
    cases, tokens = ids.shape
    looked = F.embedding(ids, model.embedding.weight, 2).detach().requires_grad_()
    hidden = torch.tanh(model.mid(looked))
    logits = model.head(hidden)
    kept = ids != 2
    counts = torch.bincount(ids[kept], minlength=7) / cases
    A = sum(torch.outer(h, h) for h in hidden.flatten(0, 1)) / cases
    G_look, G_head = torch.zeros(4, 4), torch.zeros(7, 7)
    for n in range(cases):
        for t in range(tokens):
            p = logits[n, t].softmax(-1).detach()
            for y in range(7):
                (g,) = torch.autograd.grad(
                    -logits[n, t].log_softmax(-1)[y], looked, retain_graph=True
                )
                rows = g[n][kept[n]]
                G_look += p[y] * rows.T @ rows
                e = p - F.one_hot(torch.tensor(y), 7)
                G_head += p[y] * torch.outer(e, e)
    terms = cases * tokens
    look_positions = kept.sum() / cases
    return counts, G_look / (terms * look_positions), A, G_head / (terms * tokens)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("float64")
def test_tied_embedding_and_head_sum_both_curvatures(bias: bool) -> None:
    model, ids = Tied(bias), torch.randint(7, (3, 5))
    net = kfac_fx.transform(model)
    block = net.curvature.blocks["embedding"]
    assert block.approximation == "kronecker_sum" and block.reason is None
    preconditioner = kfac_fx.Preconditioner(
        net, "categorical", fisher="exact", damping=1e-2, trust_region=None
    )
    logits = net(ids)
    preconditioner.observe(logits)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    V = model.embedding.weight.grad.clone()
    preconditioner.step()
    counts, G_look, A, G_head = _embedding_oracle(model, ids)
    found = dict(
        zip((f.name for f in block.factors), preconditioner.factors["embedding"], strict=False)
    )
    torch.testing.assert_close(found["A"], counts)
    torch.testing.assert_close(found["G"], G_look)
    torch.testing.assert_close(found["A_2"], G_head)
    torch.testing.assert_close(found["G_2"], A)
    pi, gamma = ((G_head.trace() / 7) / (A.trace() / 4)).sqrt(), 0.1
    dense = torch.kron(counts.diag(), G_look) + torch.kron(
        G_head + pi * gamma * torch.eye(7), A + gamma / pi * torch.eye(4)
    )
    # vec of [d, V] stacks columns: the d entries of a word's row lie together.
    want = torch.linalg.solve(dense, V.flatten()).reshape(7, 4)
    torch.testing.assert_close(model.embedding.weight.grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("split", ["chunk", "slices"])
@pytest.mark.usefixtures("float64")
def test_slices_of_a_parameter_are_blocks_of_their_own(split: str) -> None:
    packed = Packed(split)
    apart, x = Unpacked(packed), torch.randn(6, 4)
    preconditioners = []
    for model in (packed, apart):
        net = kfac_fx.transform(model)
        # Without bounds, which are by layer: here one of three parts, or three.
        preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", trust_region=None)
        outputs = net(x)
        preconditioner.observe(outputs)
        outputs.square().sum().backward()
        preconditioner.step()
        preconditioners.append(preconditioner)
    ours, theirs = (p.factors for p in preconditioners)
    assert list(ours) == ["weight[0]", "weight[1]", "weight[2]"]
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)
    weights = torch.cat([part.weight.grad for part in apart.parts])
    torch.testing.assert_close(packed.weight.grad, weights)
    torch.testing.assert_close(packed.bias.grad, torch.cat([p.bias.grad for p in apart.parts]))


@pytest.mark.usefixtures("float64")
def test_wide_sides_become_diagonals_and_say_so() -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 5)
    full = measured(model, (x,), "0")
    net = kfac_fx.transform(model, max_factor_dim=6)
    assert "max_factor_dim=6" in net.curvature.blocks["0"].reason
    preconditioner = kfac_fx.Preconditioner(
        net, "normal", fisher="exact", damping=1e-2, trust_region=None
    )
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.square().sum().backward()
    V = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).clone()
    preconditioner.step()
    A, g = preconditioner.factors["0"]
    torch.testing.assert_close(A, full[0])
    torch.testing.assert_close(g, full[1].diagonal())
    pi = ((A.trace() / 6) / g.mean()).sqrt()
    inverse = torch.linalg.inv(A + pi * 0.1 * torch.eye(6))
    want = (V / (g + 0.1 / pi)[:, None]) @ inverse
    torch.testing.assert_close(model[0].weight.grad, want[:, :-1])
    torch.testing.assert_close(model[0].bias.grad, want[:, -1])


class Positions(nn.Module):
    """Learned positions, looked up once for all cases and cast before they are added."""

    def __init__(self, copies: str = "") -> None:
        super().__init__()
        self.copies = copies
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(8, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(0, ids.shape[1], device=ids.device)
        if self.copies != "rows":
            places = places.unsqueeze(0)
        looked = self.positions(places).to(ids.device)
        if self.copies == "expand":
            looked = looked.expand(ids.shape[0], -1, -1)
        elif self.copies == "repeat":
            looked = looked.repeat(ids.shape[0], 1, 1)
        elif self.copies == "rows":
            looked = looked.repeat(ids.shape[0], 1).view(ids.shape[0], ids.shape[1], -1)
        hidden = self.tokens(ids) + looked
        return self.head(torch.tanh(hidden)).sum(1)


@pytest.mark.parametrize(
    ("copies", "with_inputs"),
    [("", False), ("", True), ("expand", False), ("expand", True), ("repeat", True)],
)
@pytest.mark.usefixtures("float64")
def test_positions_are_recorded_case_by_case(with_inputs: bool, copies: str) -> None:
    model, ids = Positions(copies), torch.randint(9, (3, 5))
    route = "export" if with_inputs else "auto"
    net = kfac_fx.transform(model, ids if with_inputs else None, capture=route)
    block = net.curvature.blocks["positions"]
    assert block.kind == "embedding" and block.reason is None
    A, found = of_positions(net, ids)
    looked = model.positions(torch.arange(5)).detach().expand(3, 5, 4).clone().requires_grad_()
    again = model.head(torch.tanh(model.tokens(ids) + looked)).sum(1)
    G = torch.zeros(4, 4)
    for n in range(3):
        for o in range(3):
            (g,) = torch.autograd.grad(again[n, o], looked, retain_graph=True)
            G += g[n].T @ g[n]
    torch.testing.assert_close(A, torch.tensor([1.0] * 5 + [0.0] * 3))
    torch.testing.assert_close(found, G / (3 * 5))


@pytest.mark.parametrize(
    ("copies", "with_inputs"), [("repeat", False), ("rows", False), ("rows", True)]
)
@pytest.mark.usefixtures("float64")
def test_copies_that_may_be_of_rows_are_named(copies: str, with_inputs: bool) -> None:
    """What sizes tell: whether ``repeat`` makes a dimension of cases, or tiles the positions."""
    model, ids = Positions(copies), torch.randint(9, (3, 5))
    net = kfac_fx.transform(model, ids if with_inputs else None)
    assert "the batch counts as one case" in str(net.curvature.blocks["positions"].reason)
    A, _ = of_positions(net, ids)
    torch.testing.assert_close(A, torch.tensor([1.0] * 5 + [0.0] * 3))


def of_positions(net: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact")
    outputs = net(ids)
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    return preconditioner.factors["positions"]
