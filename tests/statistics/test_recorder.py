"""One step of the recorder: how micro-batches are weighed, and what is forgotten when."""

from __future__ import annotations

import pytest
import torch
from support.networks import mlp
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import ObservationError, UnknownOptionError
from kfac_fx.likelihoods.named import likelihood_of
from kfac_fx.parallel import ALONE
from kfac_fx.statistics.buffers import sources_of
from kfac_fx.statistics.recorder import Recorder, StepStatistics
from kfac_fx.statistics.sampled import Collected

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def net() -> nn.Module:
    return kfac_fx.transform(mlp(4, 5, 3), structure="block_diagonal")


def recorder(net: nn.Module, fisher: str = "exact", likelihood: object = "normal") -> Recorder:
    given = likelihood_of(likelihood)
    blocks = net.curvature.blocks.values()
    made = Recorder(net, blocks, given, fisher, torch.Generator(), ALONE)
    made.switch(True)
    return made


def definition(x: Tensor) -> Tensor:
    """A of the first layer: the mean of a a^T over cases, the homogeneous coordinate last."""
    a = torch.cat([x, torch.ones(len(x), 1)], 1)
    return a.T @ a / len(x)


def first_input(net: nn.Module, found: dict) -> Tensor:
    (value,) = (v for k, v in found.items() if k.factor == "A" and k.slot == slot(net))
    return value


def slot(net: nn.Module) -> str:
    return net.curvature.blocks["0"].slot


def test_the_sum_of_a_step_weighs_micro_batches_by_their_terms(net: nn.Module) -> None:
    """Squares of derivatives of `scale` times a summed NLL are 1 / (scale^2 count) of the mean's.

    Of one process alone, inputs are means already.
    """
    sources = sources_of(net, net.curvature.blocks.values())
    names = [one.key for one in sources.names.tapped]
    step = StepStatistics(sources, ALONE)
    assert not step.added
    parts = [(3.0, 1.0), (5.0, 0.5)]
    for count, scale in parts:
        places = zip(names, sources.factors, strict=True)
        values = {key: torch.full(factor.shape, count) for key, factor in places}
        step.add(Collected(True, values, count, count, scale))
    assert step.added
    found = step.take()
    assert not step.added and step.take() == {}
    inputs, derivatives = names[: sources.names.inputs], names[sources.names.inputs :]
    means = sum(count / 8 * count for count, _ in parts)
    squares = sum(count / 8 * count / (scale**2 * count) for count, scale in parts)
    found = {key: value.mean() for key, value in found.items()}
    assert [float(found[key]) for key in inputs] == pytest.approx([means] * 2)
    assert [float(found[key]) for key in derivatives] == pytest.approx([squares] * 2)


def test_a_statistic_that_one_micro_batch_lacks_counts_as_zero(net: nn.Module) -> None:
    sources = sources_of(net, net.curvature.blocks.values())
    key = sources.names.tapped[0].key
    step = StepStatistics(sources, ALONE)
    step.add(Collected(True, {key: torch.ones_like(sources.factors[0])}, 1.0, 1.0))
    step.add(Collected(True, {}, 3.0, 3.0))
    assert {k: float(v.mean()) for k, v in step.take().items()} == {key: pytest.approx(0.25)}


def test_taken_statistics_are_those_of_the_cases(net: nn.Module) -> None:
    one, x = recorder(net), torch.randn(6, 4)
    assert not one.observing
    assert one.observe(net(x), None) and one.observing
    found = one.take()
    torch.testing.assert_close(first_input(net, found), definition(x))
    assert len(found) == 4 and not one.observing and one.take() == {}


def test_micro_batches_are_as_one_batch(net: nn.Module) -> None:
    one, x = recorder(net), torch.randn(8, 4)
    for part in (x[:3], x[3:]):
        outputs = net(part)
        assert one.observe(outputs, None)
        outputs.sum().backward()
    parts = one.take()
    one.switch(True)
    assert one.observe(net(x), None)
    whole = one.take()
    assert parts.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value)
    torch.testing.assert_close(first_input(net, parts), definition(x))


def test_what_was_not_taken_is_forgotten_at_the_switch(net: nn.Module) -> None:
    one = recorder(net)
    assert one.observe(net(torch.randn(6, 4)), None)
    one.switch(True)
    assert not one.observing and one.take() == {}


def test_a_switch_that_is_off_leaves_the_forward_without_taps(net: nn.Module) -> None:
    one = recorder(net)
    assert all(factor.requires_grad for factor in one.sources.factors)
    one.switch(False)
    assert not any(factor.requires_grad for factor in one.sources.factors)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_outputs_that_are_not_finite_leave_nothing(net: nn.Module, fisher: str) -> None:
    one, x = recorder(net, fisher), torch.full((6, 4), float("nan"))
    y = torch.zeros(6, 3)
    outputs = net(x)
    assert not one.observe(outputs, y)
    outputs.sum().backward()
    assert one.take() == {}


def test_a_second_call_before_the_backward_is_an_error(net: nn.Module) -> None:
    one = recorder(net)
    outputs = net(torch.randn(6, 4))
    one.observe(outputs, None)
    with pytest.raises(ObservationError, match="twice before"):
        one.observe(outputs, None)


def test_empirical_statistics_wait_for_the_user_s_backward(net: nn.Module) -> None:
    """Without one the step is an error, and nothing of it is left."""
    one, x, y = recorder(net, "empirical"), torch.randn(6, 4), torch.zeros(6, 3)
    with pytest.raises(ObservationError, match="targets"):
        one.observe(net(x), None)
    outputs = net(x)
    assert one.observe(outputs, y)
    with pytest.raises(ObservationError):
        one.take()
    assert not one.observing
    one.switch(True)
    outputs = net(x)
    assert one.observe(outputs, y)
    outputs.square().sum().div(2).backward()
    torch.testing.assert_close(first_input(net, one.take()), definition(x))


def test_after_a_pass_of_its_own_the_taps_stay_off(net: nn.Module) -> None:
    """The forward of the user is not recorded any more, and observing it is an error."""
    one, x = recorder(net), torch.randn(6, 4)
    assert one.observe_inputs(x, None)
    torch.testing.assert_close(first_input(net, one.take()), definition(x))
    one.switch(True)
    assert not any(factor.requires_grad for factor in one.sources.factors)
    with pytest.raises(ObservationError, match="from the inputs"):
        one.observe(net(x), None)


def test_sums_have_no_empirical_fisher(net: nn.Module) -> None:
    joint = kfac_fx.likelihoods.Sum([("normal", 1.0)])
    with pytest.raises(UnknownOptionError, match="mixes the gradients"):
        recorder(net, "empirical", joint)


def test_outputs_that_retain_their_gradient_keep_that_of_the_loss() -> None:
    net = kfac_fx.transform(mlp())
    pre = kfac_fx.Preconditioner(net, "normal")
    outputs = net(torch.randn(4, 6))
    outputs.retain_grad()
    pre.observe(outputs)
    assert outputs.grad is None
    outputs.sum().backward()
    torch.testing.assert_close(outputs.grad, torch.ones_like(outputs))


def test_the_exact_fisher_refuses_outputs_that_retain_their_gradient() -> None:
    net = kfac_fx.transform(mlp())
    pre = kfac_fx.Preconditioner(net, "normal", fisher="exact")
    outputs = net(torch.randn(4, 6))
    outputs.retain_grad()
    with pytest.raises(ObservationError, match=r"retain_grad\(\) after observe"):
        pre.observe(outputs)
