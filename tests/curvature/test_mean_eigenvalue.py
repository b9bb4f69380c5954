"""The mean eigenvalue of the estimated Fisher against the traces of dense blocks."""

from __future__ import annotations

import pytest
import torch
from support.dense_blocks import dense_blocks
from support.dense_updates import MODELS
from support.inside import estimate_of
from support.networks import mlp
from support.oracles import Categorical, Measure, Normal
from support.shared_weights import Packed, Tied
from support.sub_blocks import LIMITS, head, joined
from torch import Tensor, nn

import kfac_fx
from kfac_fx.curvature.estimate import Averages, Came
from kfac_fx.curvature.mean_eigenvalue import Newest

pytestmark = pytest.mark.usefixtures("float64")


def assert_mean(pre: object, traces: list[Tensor], size: int) -> None:
    want = float(torch.stack(traces).sum()) / size
    assert pre.inverse.mean_eigenvalue() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"wide norms", "diagonal norm"}))
def test_every_kind_of_block(measure: Measure, kind: str) -> None:
    build, shape, _ = MODELS[kind]
    model = build()
    net = kfac_fx.transform(model, structure="block_diagonal")
    x = torch.randn(8, *(4,) if kind == "large elementwise" else shape)
    pre = measure(net, x, None, Normal()).preconditioner
    placed = dense_blocks(pre, model, 0.0, "exact")
    size = sum(p.numel() for p in model.parameters())
    assert_mean(pre, [block.trace() for _, block in placed], size)


@pytest.mark.parametrize("divisor", [1.0, 9.0])
def test_the_damping_that_follows(measure: Measure, divisor: float) -> None:
    """A fifth, and less where the rule for lengths says so (``AdaptiveLength.damping_divisor``)."""
    net = kfac_fx.transform(mlp(4, 5, 3), structure="block_diagonal")
    pre = measure(net, torch.randn(8, 4), None, Categorical()).preconditioner
    want = 0.2 * pre.inverse.mean_eigenvalue() / divisor
    assert pre.inverse.follow(divisor) == pytest.approx(want)
    pre.inverse.refresh(None, divisor)
    assert pre.inverse.damping(None) == pytest.approx(want)


def test_couplings_change_no_trace(measure: Measure) -> None:
    model = mlp(4, 5, 3)
    pre = measure(kfac_fx.transform(model), torch.randn(8, 4), None, Categorical()).preconditioner
    assert pre.couplings
    traces = [A.trace() * G.trace() for A, G in pre.factors.values()]
    assert_mean(pre, traces, 25 + 18)


@pytest.mark.parametrize("limit", LIMITS)
def test_sub_blocks(measure: Measure, limit: int) -> None:
    """Zeros that fill up the last one count for nothing."""
    net = kfac_fx.transform(
        head(), max_factor_dim=limit, large_factors="blocks", structure="block_diagonal"
    )
    pre = measure(net, torch.randn(9, 4), None, Normal()).preconditioner
    traces = []
    for name, sides in {"0": (5, 6), "2": (7, 9)}.items():
        A, G = (joined(f, n) for f, n in zip(pre.factors[name], sides, strict=True))
        traces.append(A.trace() * G.trace())
    assert_mean(pre, traces, 30 + 63)


def test_sums_of_two_products(measure: Measure) -> None:
    """A vector of token frequencies in one, two matrices in the other."""
    model, ids = Tied(bias=False), torch.randint(7, (5, 3))
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = kfac_fx.Preconditioner(net, fisher="exact", damping=1e-2)
    outputs = net(ids)
    pre.observe(outputs)
    outputs.square().sum().backward()
    pre.step()
    counts, G, A_2, G_2 = pre.factors["embedding"]
    A, G_mid = pre.factors["mid"]
    tied = counts.sum() * G.trace() + A_2.trace() * G_2.trace()
    assert_mean(pre, [tied, A.trace() * G_mid.trace()], 28 + 20)


def test_slices_of_one_parameter(measure: Measure) -> None:
    pre = measure(kfac_fx.transform(Packed("chunk")), torch.randn(6, 4), None, Normal())
    factors = pre.preconditioner.factors.values()
    assert_mean(pre.preconditioner, [A.trace() * G.trace() for A, G in factors], 60)


@pytest.mark.parametrize("tikhonov", ["exact", "ekfac"])
def test_other_damping(measure: Measure, tikhonov: str) -> None:
    net = kfac_fx.transform(mlp(4, 5, 3), structure="block_diagonal", ekfac=tikhonov == "ekfac")
    pre = measure(net, torch.randn(8, 4), None, Categorical(), tikhonov=tikhonov).preconditioner
    assert_mean(pre, [A.trace() * G.trace() for A, G in pre.factors.values()], 25 + 18)


def test_averages_in_bfloat16(measure: Measure) -> None:
    net = kfac_fx.transform(mlp(4, 5, 3).float(), structure="block_diagonal")
    x = torch.randn(8, 4, dtype=torch.float32)
    options = {"factor_storage": "bfloat16"}
    pre = measure(net, x, None, Categorical(), **options).preconditioner
    traces = [A.double().trace() * G.double().trace() for A, G in pre.factors.values()]
    assert_mean(pre, traces, 25 + 18)


def test_a_block_that_never_ran_counts_for_nothing(measure: Measure) -> None:
    net = kfac_fx.transform(mlp(4, 5, 3), structure="block_diagonal")
    pre = measure(net, torch.randn(8, 4), None, Categorical()).preconditioner
    estimate_of(pre).blocks["0"].recorded = 0
    A, G = pre.factors["2"]
    assert_mean(pre, [A.trace() * G.trace()], 18)


def test_no_scale_is_one(measure: Measure) -> None:
    """Outputs that depend on nothing: a damping of zero would have no inverse."""
    model = mlp(4, 5, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    net = kfac_fx.transform(nn.Sequential(model, nn.ReLU()), structure="block_diagonal")
    pre = measure(net, torch.randn(8, 4), None, Normal()).preconditioner
    assert pre.inverse.mean_eigenvalue() == 1.0


def test_lag_is_the_average_over_the_newest_statistics(measure: Measure) -> None:
    """Traces fade by a fifth; a block without new statistics keeps its own; at least 1."""
    model = mlp(4, 5, 3)
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = measure(net, torch.randn(8, 4), None, Categorical()).preconditioner
    blocks = estimate_of(pre).blocks
    newest = Newest(pre.curvature)
    assert newest.lag(2.0) == 1.0  # nothing is known yet
    sizes, traces = {"0": 25, "2": 18}, {}
    for step in range(4):
        new = {
            name: [torch.rand(n, n), torch.rand(m, m)] for name, n, m in (("0", 5, 5), ("2", 6, 3))
        }
        if step == 2:
            del new["2"]
        came = [Came(blocks[n], values, blocks[n].sizes(values)) for n, values in new.items()]
        newest.add(came)
        for name, (A, G) in new.items():
            value = float(A.trace() * G.trace())
            traces[name] = 0.2 * traces[name] + 0.8 * value if name in traces else value
        mean = sum(traces.values()) / sum(sizes.values())
        assert newest.lag(3 * mean) == pytest.approx(3.0, rel=1e-12)
        assert newest.lag(mean / 3) == 1.0
    assert Newest(pre.curvature, newest.state()).lag(3 * mean) == pytest.approx(3.0)


def came_to(averages: Averages, size: float) -> Came:
    """Statistics with a trace of 15 sizes."""
    new = [torch.eye(5), size * torch.eye(3)]
    return Came(averages, new, averages.sizes(new))


def test_what_is_left_is_of_the_largest_level(measure: Measure) -> None:
    """Levels are geometric means, count from the fifth statistic on, and fade by a thousandth."""
    model = mlp(4, 3)
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = measure(net, torch.randn(8, 4), None, Categorical()).preconditioner
    averages = estimate_of(pre).blocks["0"]
    newest, level, largest, value = Newest(pre.curvature), 0.0, 0.0, 0.0
    assert newest.left() == 1.0
    for came in range(1, 31):
        size = 1e6 if came < 3 else 100.0 if came == 20 else 10.0 ** (-came)
        newest.add([came_to(averages, size)])
        value = 15 * size if came == 1 else 0.2 * value + 0.8 * 15 * size
        mean = value / 15
        level = mean if came <= 5 else level**0.9 * mean**0.1
        largest = level if came <= 5 else max(0.999 * largest, level)
        newest.lag(1.0)
        newest.lag(1.0)  # asked again, nothing has come
        assert newest.left() == pytest.approx(mean / largest)
    again = Newest(pre.curvature, newest.state())
    for each in (newest, again):
        each.add([came_to(averages, 1.0)])
        each.lag(1.0)
    assert again.left() == newest.left() and again.largest == newest.largest
