"""Lengths of preconditioned gradients, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kfac_fx import likelihoods
from kfac_fx.curvature.mean_eigenvalue import Scale
from kfac_fx.likelihoods.named import is_quadratic, likelihood_of
from kfac_fx.optim.bounds import AdaptiveLength, LayerSteps, NaturalLength
from kfac_fx.optim.layer_bounds import LayerBounds
from kfac_fx.parallel import ALONE

pytestmark = pytest.mark.usefixtures("float64")
NAMES = ("weight", "bias")


# ------------------------------------------------------------------------------ lengths in Fhat
def share_of(rule: NaturalLength, *lists: list[Tensor]) -> float:
    """What a rule takes of a gradient, given it and the update in the parameters' shapes."""
    layers = LayerSteps(lists[0], range(len(lists[0])), ALONE)
    return rule.share(*(layers.pack(tensors) for tensors in lists))


def length_of(gradient: list[Tensor], updates: list[Tensor]) -> float:
    """The squared length of a gradient: 1e-300 of it, to the power of a half, is taken."""
    share = share_of(NaturalLength(1e-300), gradient, updates)
    return 1e-300 / share**2


def test_length_is_the_product_of_gradient_and_update() -> None:
    one = [torch.randn(3, 4), torch.randn(5)]
    other = [2 * one[0].T.contiguous().T, 3 * one[1]]
    want = sum((a * b).sum() for a, b in zip(one, other, strict=True))
    assert length_of(one, other) == pytest.approx(float(want))
    # An indefinite product of rounding errors alone is no length.
    assert NaturalLength(1e-3).share(one, [-other[0], -other[1]]) == 1.0


def test_length_of_other_types() -> None:
    g = torch.randn(4, dtype=torch.complex128)
    assert length_of([g], [2 * g]) == pytest.approx(2 * float(g.abs().square().sum()))
    low = torch.full((10_000,), 0.1, dtype=torch.bfloat16)
    mixed = [low, torch.ones(3)]
    assert length_of(mixed, mixed) == pytest.approx(103.0, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_length_is_no_number_only_where_an_entry_is_none(dtype: torch.dtype) -> None:
    large = torch.full((4,), 1e30, dtype=dtype)
    assert share_of(NaturalLength(1.0), [large], [large]) == pytest.approx(0.5e-30, rel=1e-3)
    assert share_of(AdaptiveLength(), [large], [large]) == pytest.approx(0.05e-30, rel=1e-3)
    for bad in (math.inf, math.nan):
        one = torch.tensor([1.0, bad], dtype=dtype)
        ones, zeros = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)
        assert math.isnan(share_of(NaturalLength(None), [one], [ones]))
        assert math.isnan(share_of(NaturalLength(1e-3), [zeros], [one]))
        assert math.isnan(share_of(AdaptiveLength(), [one], [ones]))
        assert math.isnan(share_of(AdaptiveLength(), [zeros], [one]))


def test_a_trust_region() -> None:
    for squared, want in ((1e-4, 1.0), (1e-3, 1.0), (4e-3, 0.5), (0.0, 1.0)):
        gradient = [torch.tensor([squared])]
        assert NaturalLength(1e-3).share(gradient, [torch.ones(1)]) == pytest.approx(want)
    assert NaturalLength(None).share([torch.ones(1)], [torch.full((1,), 1e9)]) == 1.0


# ------------------------------------------------------------------------- what gradients agree on
class Definition:
    """The rule of docs/explanation/mathematics.md, section 9, by dense vectors."""

    def __init__(self) -> None:
        self.factor, self.bold, self.usual = 1.0, 1.0, 0.0
        self.way, self.squared, self.steps = None, 0.0, 0

    def share(self, g: Tensor, inverse: Tensor, lag: float) -> float:
        u, q = inverse @ g, float(g @ inverse @ g)
        lag = max(1.0, min(lag, 1000 / q))
        if self.way is not None:
            along = float(g @ self.way)
            cosine = along / (q * self.squared) ** 0.5
            cosine *= 0.1 if cosine > 0 else 0.3
            self.factor = min(max(self.factor * math.exp(cosine), 0.05), 10.0)
            trend = float(torch.cosine_similarity(u, self.way, dim=0)) - 0.02
            self.bold = min(max(self.bold * math.exp(0.3 * trend), 1.0), 5.0)
        known = min(lag * q, 1000.0)
        self.usual = 0.9 * self.usual + 0.1 * known if self.usual else known
        measured = max(self.usual, lag * q)
        share = lag * min(1.0, (0.01 / measured) ** 0.5) * self.factor
        self.steps += 1
        if self.way is None:
            self.way, self.squared = share * u, share**2 * q
        else:
            so_far = 0.997**2 * self.squared + 2 * 0.997 * share * along + share**2 * q
            self.squared = max(so_far, share**2 * q)
            self.way = 0.997 * self.way + share * u
        return share

    def divisor(self) -> float:
        grown = min(max((self.steps - 10) / 20, 0.0), 1.0)
        return float((self.bold * max(1.0, self.factor) ** 2) ** grown)


def parts(vector: Tensor) -> list[Tensor]:
    return [vector[:6], vector[6:]]


@pytest.mark.parametrize("noise", [0.0, 0.3, 10.0])
def test_shares_follow_the_definition(noise: float) -> None:
    root = torch.randn(8, 8)
    inverse = root @ root.T + torch.eye(8)
    mean, rule, length = torch.randn(8), Definition(), AdaptiveLength()
    for step in range(60):
        g = 0.1 * (mean + noise * torch.randn(8))
        lag = 1.0 + step % 3
        want = rule.share(g, inverse, lag)
        got = length.share(parts(g), parts(inverse @ g), NAMES, Scale(lag))
        assert got == pytest.approx(want, rel=1e-9)
        assert length.factor == pytest.approx(rule.factor)
        assert length.damping_divisor == pytest.approx(rule.divisor())
        widest = max(0.02, 0.1 / lag**0.5) * max(1.0, rule.factor) ** 0.5
        assert length.widest == pytest.approx(widest)
    # Without noise the factor ends at its ceiling, with little else it wanders near one.
    assert noise == 0.3 or (length.factor == 10.0) == (noise == 0.0)


def test_gradients_that_turn_about_make_it_shorter() -> None:
    """A step that is too long comes back across the valley: down to the floor, and no further."""
    length, g = AdaptiveLength(), torch.ones(8)
    for step in range(400):
        length.share(parts(g * (-1) ** step), parts(g * (-1) ** step), NAMES)
    assert length.factor == 0.05


def test_rounding_is_no_reason_for_long_steps() -> None:
    """Layers' bounds go with the square of the signal, and what gradients agree on is forgotten.

    A gradient that is long in Fhat is of cases that the network is wrong about: it is no rounding.
    """
    length, g = AdaptiveLength(), torch.full((8,), 1e-4)
    for _ in range(10):
        length.share(parts(g), parts(g), NAMES)
    before = length.factor
    length.share(parts(g), parts(g), NAMES, Scale(1.0, 0.25))
    assert length.widest == pytest.approx(0.1 * length.factor**0.5 / 16)
    assert length.factor == pytest.approx(before ** (1 - 0.05 * 0.75) * math.exp(0.1))
    for _ in range(200):
        length.share(parts(g), parts(g), NAMES, Scale(1.0, 1e-6))
    assert length.factor == pytest.approx(math.exp(0.1 / 0.05), rel=1e-2)
    for size, signal in ((1.0, 1.0), (0.25, 0.5)):  # squared lengths of 8 and of one half
        g = torch.full((8,), size)
        length.share(parts(g), parts(g), NAMES, Scale(1.0, 1e-6))
        assert length.widest == pytest.approx(0.1 * length.factor**0.5 * signal**2)


def test_easy_batches_do_not_outvote_hard_ones() -> None:
    """The running mean of squared lengths serves all batches alike, but for longer ones."""
    length, usual = AdaptiveLength(), 0.0
    easy, hard = torch.full((8,), 1e-2), torch.full((8,), -10.0)
    for step in range(80):
        g = hard if step % 4 == 0 else easy
        squared = float(g.square().sum())
        known = min(squared, 1000.0)
        usual = 0.9 * usual + 0.1 * known if usual else known
        share = length.share(parts(g), parts(g), NAMES)
        measured = max(usual, squared)
        assert share == pytest.approx(length.factor * min(1.0, (0.01 / measured) ** 0.5))
    assert length.factor < 1


@pytest.mark.parametrize("squared", [1e-4, 1e-2, 0.25, 1.0, 1e4])
def test_a_quadratic_loss_has_shares_of_a_tenth_at_least(squared: float) -> None:
    """sqrt(0.01 / squared length) up to one nat, and for longer gradients what it is there."""
    g = torch.full((8,), (squared / 8) ** 0.5)
    nats, quadratic = AdaptiveLength(), AdaptiveLength(quadratic=True)
    assert nats.share(parts(g), parts(g), NAMES) == pytest.approx(min(1.0, 0.1 / squared**0.5))
    share = quadratic.share(parts(g), parts(g), NAMES)
    assert share == pytest.approx(max(0.1, min(1.0, 0.1 / squared**0.5)))


class Other(likelihoods.Normal):
    """A likelihood with a distribution of its own."""


def test_which_losses_are_quadratic() -> None:
    """Normal ones of a fixed variance, and sums of nothing else that counts."""
    sums = likelihoods.Sum
    for given, wanted in (
        ("normal", True),
        ("residual", True),
        (likelihoods.Normal(variance=0.25), True),
        (sums([("residual", 1.0), ("normal", 10.0)]), True),
        (sums([("residual", 1.0), ("categorical", 0.0)]), True),
        (sums([("residual", 1.0), ("categorical", 0.1)]), False),
        (sums([(sums([("residual", 1.0)]), 2.0)]), True),
        (Other(), False),
        ("categorical", False),
        ("bernoulli", False),
        (lambda outputs: torch.distributions.Normal(outputs, outputs.exp()), False),
    ):
        assert is_quadratic(likelihood_of(given)) is wanted


def test_steps_that_are_cut_make_the_next_ones_shorter() -> None:
    """By (taken / asked)^0.05, layers' bounds too; a state holds what was noted last."""
    length, g = AdaptiveLength(), torch.ones(8)
    first = length.share(parts(g), parts(g), NAMES)
    for kept in (1.0, 0.25, torch.tensor(0.5), 0.0):
        length.cut(kept)
    state = length.state()
    want = (0.25 * 0.5 * 1e-6) ** 0.05
    assert state["restraint"] == pytest.approx(want)
    again = length.share(parts(-g), parts(-g), NAMES)
    assert again == pytest.approx(first * want * math.exp(-0.3))
    assert length.widest == pytest.approx(0.1 * want)
    other = AdaptiveLength()
    other.load(state, torch.device("cpu"))
    assert other.share(parts(-g), parts(-g), NAMES) == again


def test_a_fisher_that_vanishes_where_the_network_is_wrong_is_not_believed() -> None:
    """Steps of a thousand nats and more are those of the averages, whatever the newest draws say.

    Networks that were sure and wrong once walked at random, as far as layers allow.
    """
    g = torch.ones(8)
    for squared, lag in ((8.0, 125.0), (800.0, 1.25), (8e4, 1.0)):
        length = AdaptiveLength()
        gradient = parts(g * (squared / 8) ** 0.5)
        share = length.share(gradient, gradient, NAMES, Scale(1e8))
        assert share == pytest.approx(lag * (0.01 / (lag * squared)) ** 0.5)
        assert length.widest == pytest.approx(max(0.02, 0.1 / lag**0.5))
    # Nor remembered: the next gradient counts beside a thousand nats, not beside 80 thousand.
    share = length.share(parts(0.01 * g), parts(0.01 * g), NAMES)
    assert share / length.factor == pytest.approx((0.01 / (900 + 1e-1 * 8e-4)) ** 0.5)


def test_other_parameters_start_anew() -> None:
    """What a head of its own says of another one's gradients is nothing."""
    length, g = AdaptiveLength(), torch.ones(8)
    for _ in range(3):
        length.share(parts(g), parts(g), NAMES)
    before = length.factor
    length.share(parts(g)[:1], parts(g)[:1], ("weight",))
    length.share([p.float() for p in parts(g)], [p.float() for p in parts(g)], NAMES)
    assert length.factor == before > 1


def test_a_state_goes_on_bit_by_bit() -> None:
    one, vectors = AdaptiveLength(), torch.randn(9, 8)
    for g in vectors[:5]:
        one.share(parts(g), parts(2 * g), NAMES)
    two = AdaptiveLength()
    two.load(one.state(), torch.device("cpu"))
    for g in vectors[5:]:
        shares = [each.share(parts(g), parts(2 * g), NAMES, Scale(1.5)) for each in (one, two)]
        assert shares[0] == shares[1]
        assert one.damping_divisor == two.damping_divisor
    assert one.state()["factor"] == two.state()["factor"]


def test_lambda_falls_where_flat_directions_agree() -> None:
    """Noise of a steep direction makes steps shorter; lambda goes by flat ones."""
    inverse = torch.tensor([0.01, 1.0])  # of a steep and of a flat direction
    for flat, wanted in ((1.0, 5.0), (0.0, 1.0)):
        length = AdaptiveLength()
        for step in range(100):
            signs = torch.tensor([(-1.0) ** step, flat or (-1.0) ** (step // 2)])
            g = signs * torch.tensor([100.0, 1.0])
            length.share([g], [inverse * g], ("weight",))
        assert length.factor == 0.05
        assert length.damping_divisor == pytest.approx(wanted)
    state = length.state() | {"divisor": 3.0}
    length.load(state, torch.device("cpu"))
    assert length.damping_divisor == 3.0


def test_lambda_is_whole_while_averages_are_young() -> None:
    """Of few batches they do not know which directions are flat, and all early gradients agree."""
    length, g = AdaptiveLength(), torch.full((8,), 1e-4)
    found = []
    for _ in range(30):
        length.share(parts(g), parts(g), NAMES)
        found.append(length.damping_divisor)
    assert found[:10] == [1.0] * 10
    assert found[19] == pytest.approx((5.0 * math.exp(0.1 * 19) ** 2) ** 0.5)
    assert found[29] == pytest.approx(5.0 * 10.0**2)


# -------------------------------------------------------------------------------- single layers
def test_a_layer_is_no_longer_than_a_share_of_its_weights() -> None:
    weights = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "b": torch.zeros(5)}
    steps = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "b": torch.full((5,), 1e-4)}
    before = {name: step.clone() for name, step in steps.items()}
    bounds = LayerBounds(weights, [["a.weight", "a.bias"], ["b"]], ALONE)
    kept = bounds.shorten(steps, 0.1)
    pairs = [torch.cat([of["a.weight"].flatten(), of["a.bias"]]) for of in (before, weights)]
    scale = 0.1 * float(pairs[1].norm() / pairs[0].norm())
    assert scale < 1
    squares = [sum(float(t.square().sum()) for t in of.values()) for of in (steps, before)]
    assert kept == pytest.approx(math.sqrt(squares[0] / squares[1]))
    for name in ("a.weight", "a.bias"):
        torch.testing.assert_close(steps[name], scale * before[name])
    assert torch.equal(steps["b"], before["b"])  # weights of zero count as 0.01 each
    # Parameters without a gradient are no part of the length.
    alone = {"a.bias": before["a.bias"].clone()}
    bounds.shorten(alone, 0.1)
    want = min(1.0, 0.1 * float(weights["a.bias"].norm() / before["a.bias"].norm()))
    torch.testing.assert_close(alone["a.bias"], want * before["a.bias"])
