"""Running averages against their definition, S <- epsilon S + (1 - epsilon) S_new, written out.

epsilon is min(1 - 1/k, decay) for the k-th statistic of a block
(docs/explanation/mathematics.md, section 8).
"""

from __future__ import annotations

import logging

import pytest
import torch
from support.networks import mlp
from torch import Tensor, nn

import kfac_fx
from kfac_fx.curvature.estimate import Estimate, new_weight, terms_needed
from kfac_fx.errors import ParameterChangedError
from kfac_fx.ir.coupling import Coupling
from kfac_fx.ir.use import StatisticKey

pytestmark = pytest.mark.usefixtures("float64")
Found = dict[StatisticKey, Tensor]


def estimate(model: nn.Module | None = None, pairs: bool = False, **options: object) -> Estimate:
    model = model or mlp(4, 5, 3)
    structure = "block_tridiagonal" if pairs else "block_diagonal"
    curvature = kfac_fx.transform(model, structure=structure, **options).curvature
    return Estimate(curvature, dict(model.named_parameters()), curvature.pairs)


def statistics(of: Estimate, names: tuple[str, ...] | None = None) -> Found:
    """Random second moments for every factor of some holders."""
    found: Found = {}
    for averages in of.all:
        if names is not None and averages.holder.name not in names:
            continue
        for key, average in zip(averages.keys, averages.all, strict=True):
            rows = torch.randn(8, average.stored.shape[-1])
            square = average.stored.dim() == 2 and len(set(average.stored.shape)) == 1
            found[key] = rows.T @ rows / 8 if square else torch.randn(average.stored.shape)
    return found


def read(of: Estimate) -> Found:
    pairs = ((a, zip(a.keys, a.all, strict=True)) for a in of.all)
    return {key: average.read().clone() for _, both in pairs for key, average in both}


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.95])
def test_averages_follow_their_definition(decay: float) -> None:
    made = estimate(pairs=True)
    want = {key: torch.zeros_like(value) for key, value in read(made).items()}
    for k in range(1, 8):
        new = statistics(made)
        folded = made.fold(new, decay)
        assert folded.good and folded.first == (k == 1)
        epsilon = min(1 - 1 / k, decay)
        want = {key: epsilon * want[key] + (1 - epsilon) * new[key] for key in want}
    torch.testing.assert_close(read(made), want)
    assert made.recorded == made.folds == 7


def test_a_block_that_is_missed_keeps_its_averages_and_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its weights go on from the number of its own statistics."""
    made = estimate()
    first, second, third = statistics(made), statistics(made, ("0",)), statistics(made)
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        for new in (first, second, second):
            assert made.fold(new, 0.9).good
    assert [r.message for r in caplog.records] == ["no statistics came for 2"]
    A = made.blocks["2"].keys[0]
    assert torch.equal(read(made)[A], first[A])
    assert made.fold(third, 0.9).good
    torch.testing.assert_close(read(made)[A], 0.5 * first[A] + 0.5 * third[A])
    assert (made.blocks["0"].recorded, made.blocks["2"].recorded) == (4, 2)


def test_half_of_a_block_s_statistics_are_none() -> None:
    made = estimate()
    new = statistics(made)
    del new[made.blocks["2"].keys[1]]
    assert made.fold(new, 0.9).good
    assert made.blocks["0"].recorded == 1 and made.blocks["2"].recorded == 0
    assert not read(made)[made.blocks["2"].keys[0]].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_keeps_all_out(bad: float) -> None:
    made = estimate()
    assert made.fold(statistics(made), 0.9).good
    before, new = read(made), statistics(made)
    new[made.blocks["2"].keys[1]][0, 0] = bad
    assert not made.fold(new, 0.9).good
    torch.testing.assert_close(read(made), before, rtol=0, atol=0)
    assert made.recorded == made.folds == 1


def test_outliers_stay_out_and_a_spoilt_start_begins_anew() -> None:
    """Far longer statistics are refused; far shorter ones tell that a young average was spoilt."""
    made = estimate()
    usual = statistics(made)
    assert made.fold(usual, 0.9).good
    far = {key: 1e3 * value for key, value in usual.items()}
    assert not made.fold(far, 0.9, outlier=100.0).good
    near = {key: 1e-3 * value for key, value in usual.items()}
    assert made.fold(near, 0.9, outlier=100.0).good
    torch.testing.assert_close(read(made), near)  # as if it had been the first
    assert made.recorded == 1


def test_couplings_are_read_child_by_parent() -> None:
    """Whichever way round their pair is recorded."""
    made = estimate(pairs=True)
    assert made.fold(statistics(made), 0.9).good
    ((earlier, later),) = made.pairs
    A, G = made.pairs[earlier, later].read()
    turned = Coupling(child=later, parent=earlier)
    torch.testing.assert_close(made.cross(Coupling(child=earlier, parent=later)), (A, G))
    torch.testing.assert_close(made.cross(turned), (A.mT, G.mT))
    *blocks, A_given, G_given = made.arguments([turned])
    assert len(blocks) == 4
    torch.testing.assert_close((A_given, G_given), (A.mT, G.mT))


def test_a_state_restores_averages_and_counts() -> None:
    made, other = estimate(pairs=True), estimate(pairs=True)
    for _ in range(3):
        assert made.fold(statistics(made), 0.9).good
    state = made.state()
    other.check(state)
    other.load(state)
    torch.testing.assert_close(read(other), read(made), rtol=0, atol=0)
    new = statistics(made)
    assert made.fold(new, 0.9).good and other.fold(new, 0.9).good
    torch.testing.assert_close(read(other), read(made), rtol=0, atol=0)
    with pytest.raises(ParameterChangedError, match="other blocks"):
        estimate(mlp(4, 6, 3), pairs=True).check(state)


def test_averages_are_in_float32_at_least() -> None:
    made = estimate(mlp(4, 5, 3).bfloat16())
    assert {average.read().dtype for of in made.all for average in of.all} == {torch.float32}


def test_weights_and_the_cases_that_they_ask_for() -> None:
    """64 terms times the weight of the next statistic, rounded up."""
    assert [new_weight(k, 0.95) for k in (1, 2, 20, 21)] == pytest.approx([1, 0.5, 0.05, 0.05])
    assert [terms_needed(recorded, 0.95) for recorded in (0, 1, 3, 100)] == [64, 32, 16, 4]
