"""Sides above ``max_factor_dim``, and long ones by default: a diagonal, or sub-blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracles
from support.oracles import Categorical, Measure, Normal, close
from support.recurrent_oracle import IN, H, N, T, Tagger
from support.shared_weights import Tied
from support.sub_blocks import LIMITS, head, joined, kept
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("limit", LIMITS)
def test_sub_blocks(measure: Measure, limit: int, bias: bool, sharing: str) -> None:
    """Factors are the diagonal blocks of the whole ones, and updates those of their inverses."""
    model, x, likelihood = head(bias), torch.randn(5, 2, 4), Categorical()
    net = kfac_fx.transform(
        model, max_factor_dim=limit, large_factors="blocks", weight_sharing=sharing
    )
    y = likelihood.draw(model(x))
    found = measure(net, x, y, likelihood)
    whole = oracles.kronecker(model, ["2"], x, y, likelihood, "exact", sharing)
    shapes = net.curvature.blocks["2"].dimensions
    if bias:
        assert shapes == LIMITS[limit]
    sides = [len(factor) for factor in whole]
    want = [kept(factor, shape) for factor, shape in zip(whole, shapes, strict=True)]
    close([joined(f, d) for f, d in zip(found.factors["2"], sides, strict=True)], want)

    names = ["2.weight", "2.bias"][: 1 + bias]
    gradients = torch.autograd.grad(
        likelihood.nll(model(x), y), [model.get_parameter(n) for n in names]
    )
    V = torch.cat([gradients[0], *(g[:, None] for g in gradients[1:])], 1)
    update = found.preconditioner.apply(dict(zip(names, gradients, strict=True)))
    U = torch.cat([update["2.weight"], *(update[n][:, None] for n in names[1:])], 1)
    close((U,), (oracles.solve_kronecker(*want, V, 1e-2),))


def test_groups_stay_diagonal_and_say_so() -> None:
    """Independent blocks are not cut; they name what they got."""
    model = nn.Sequential(nn.Conv1d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(12, 3))
    net = kfac_fx.transform(model, max_factor_dim=6, large_factors="blocks")
    assert net.curvature.blocks["0"].dimensions == ((2, 13), (2, 3, 3))
    assert "kept as a diagonal" in str(net.curvature.blocks["0"].reason)
    assert net.curvature.blocks["2"].dimensions == ((3, 5, 5), (3, 3))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 7, 3, padding=1, bias=False),
        nn.Conv2d(3, 7, 3, 2),
        nn.ConvTranspose2d(3, 7, 2, 2),
    ],
    ids=["by correlations", "strided", "transposed"],
)
def test_convolutions(measure: Measure, layer: nn.Module, sharing: str) -> None:
    """Sub-blocks of patches and of output channels; many positions a case, and few."""
    layer = layer.double()
    for size in (4, 7):
        x = torch.randn(5, 3, size, size)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x)[0].numel(), 2))
        net = kfac_fx.transform(
            model, max_factor_dim=5, large_factors="blocks", weight_sharing=sharing
        )
        plain = kfac_fx.transform(model, weight_sharing=sharing)
        whole = measure(plain, x, None, Normal()).factors["0"]
        shapes = net.curvature.blocks["0"].dimensions
        assert [len(shape) for shape in shapes] == [3, 3]
        found = measure(net, x, None, Normal()).factors["0"]
        close(
            [joined(f, len(F)) for f, F in zip(found, whole, strict=True)],
            [kept(F, shape) for F, shape in zip(whole, shapes, strict=True)],
        )


def test_gates_of_a_recurrent_layer(measure: Measure) -> None:
    """G is cut, here to two gates each; A, which may have a bias or not, is as it was."""
    model, x = Tagger("LSTM", batch_first=True), torch.randn(N, T, IN)
    whole = measure(kfac_fx.transform(model), x, None, Normal()).factors
    options = {"max_factor_dim": max(IN, H) + 1, "large_factors": "blocks"}
    found = measure(kfac_fx.transform(model, **options), x, None, Normal()).factors
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        (A, G), (A_cut, G_cut) = whole[name], found[name]
        assert G_cut.dim() == 3
        close((A_cut, joined(G_cut, 4 * H)), (A, kept(G, tuple(G_cut.shape))))


def sides(model: nn.Module, **options: Any) -> tuple[tuple[int, ...], ...]:
    """The sides of the first block."""
    return next(iter(kfac_fx.transform(model, **options).curvature.blocks.values())).dimensions


def test_long_sides_are_cut_by_default() -> None:
    """No refresh costs much more than that of the longest side that is whole."""
    assert sides(nn.Linear(1279, 2)) == ((1280, 1280), (2, 2))
    assert sides(nn.Linear(3136, 2)) == ((5, 628, 628), (2, 2))
    assert sides(nn.Linear(3, 2048)) == ((4, 4), (4, 512, 512))
    assert sides(nn.Linear(8191, 2)) == ((13, 631, 631), (2, 2))
    assert sides(nn.Conv2d(256, 2, 3)) == ((4, 577, 577), (2, 2))
    assert 13 * 631**3 < 1500**3
    # A vocabulary is a diagonal as before, and what cannot be cut is whole as before.
    assert sides(nn.Linear(3, 8193)) == ((4, 4), (8193,))
    assert sides(nn.Linear(3, 8193), large_factors="blocks") == ((4, 4), (13, 631, 631))
    assert sides(nn.Conv1d(2600, 2, 1, groups=2)) == ((2, 1301, 1301), (2, 1, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"max_factor_dim": 8192},
        {"ekfac": True},
        {"strict": True},
        {"structure": "block_tridiagonal"},
        {"couplings": "data"},
    ],
    ids=str,
)
def test_whole_sides_for_who_asks(options: dict[str, Any]) -> None:
    """Cut sides have no couplings and no second moments, and are weaker than their kind allows."""
    assert sides(nn.Linear(1500, 2), **options) == ((1501, 1501), (2, 2))
    assert sides(nn.Linear(1500, 2), structure="block_diagonal")[0] == (3, 501, 501)


class Two(nn.Module):
    """Two layers of the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(1500, 2), nn.Linear(1500, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_cut_by_default_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The report says it of each block, and one warning of all that are cut in the same way."""
    net = kfac_fx.transform(Two())
    said = (
        "A of side 1501 above 1280, cut into 3 sub-blocks of 501; max_factor_dim=8192 keeps it "
        "whole"
    )
    assert str(net.curvature).count(said) == 2
    assert caplog.messages == [
        f"weaker block: one.weight, one.bias, two.weight, two.bias: {said}",
    ]


def test_report_and_memory() -> None:
    net = kfac_fx.transform(head(), max_factor_dim=4, large_factors="blocks")
    report = str(net.curvature)
    assert "A of side 7 above max_factor_dim=4, cut into 2 sub-blocks of 4" in report
    assert "G of side 9 above max_factor_dim=4, cut into 3 sub-blocks of 3" in report
    preconditioner = kfac_fx.Preconditioner(net, "normal")
    factors = [f for fs in preconditioner.factors.values() for f in fs]
    assert sum(f.numel() for f in factors) == net.curvature.factor_elements
    assert net.curvature.factor_elements == (2 * 9 + 2 * 9) + (2 * 16 + 3 * 9)
    with pytest.raises(kfac_fx.errors.CoverageError, match="cut into 3 sub-blocks"):
        kfac_fx.transform(head(), max_factor_dim=4, large_factors="blocks", strict=True)
    with pytest.raises(kfac_fx.errors.UnknownOptionError, match="blocks"):
        kfac_fx.transform(head(), large_factors="block")


def test_diagonal_is_the_default(measure: Measure) -> None:
    model, x = head(), torch.randn(5, 4)
    net = kfac_fx.transform(model, max_factor_dim=4)
    A, G = oracles.kronecker(model, ["2"], x, None, Normal())
    close(measure(net, x, None, Normal()).factors["2"], (A.diag(), G.diag()))


def test_uses_of_a_shared_layer_add_up(measure: Measure) -> None:
    layer = nn.Linear(6, 6)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(5, 6)
    net = kfac_fx.transform(model, max_factor_dim=4, large_factors="blocks")
    A, G = oracles.kronecker(model, ["0"], x, None, Normal())
    found = measure(net, x, None, Normal()).factors["0"]
    close(
        [joined(f, d) for f, d in zip(found, (7, 6), strict=True)],
        [kept(A, (2, 4, 4)), kept(G, (2, 3, 3))],
    )


@pytest.mark.parametrize("limit", [5, 6, 7])
def test_tied_head(limit: int) -> None:
    """Token counts and the head's own sub-blocks meet on the side of the vocabulary."""
    model, ids = Tied(bias=False), torch.randint(7, (5, 3))
    net = kfac_fx.transform(model, max_factor_dim=limit, large_factors="blocks")
    preconditioner = kfac_fx.Preconditioner(net, fisher="exact", damping=1e-2, trust_region=None)
    outputs = net(ids)
    preconditioner.observe(outputs)
    outputs.square().sum().backward()
    V = model.head.weight.grad.clone()
    preconditioner.step()
    counts, G_look, second_A, second_G = preconditioner.factors["embedding"]
    second_A = joined(second_A, 7) if limit < 7 else second_A
    damped = torch.kron(*oracles.tikhonov(second_A, second_G, 1e-2))
    dense = damped + torch.kron(torch.diag(counts), G_look)
    want = torch.linalg.solve(dense, V.flatten()).reshape(V.shape)
    close((model.head.weight.grad,), (want,))


def test_compiled_program_and_eager_capture(measure: Measure) -> None:
    model, x = head(), torch.randn(5, 4)
    options = {"max_factor_dim": 4, "large_factors": "blocks"}
    want = measure(kfac_fx.transform(model, **options), x, None, Normal())
    eager = kfac_fx.transform(model, x, capture="eager", **options)
    close(measure(eager, x, None, Normal()).factors["2"], want.factors["2"])
    program = want.preconditioner.program
    factors = [f for fs in want.factors.values() for f in fs]
    inverses = program.refresh(torch.tensor(1e-2), factors).inverses
    compiled = torch.compile(program.apply_module, backend="eager", fullgraph=True)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    given = [inverses[key] for key in program.inverses]
    expected = program.apply(inverses, gradients)
    for name, value in compiled(*given, *gradients).items():
        close((value,), (expected[name],))
