"""The transformed net is the model: outputs, gradients, parameters, state, modes and copies."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.asserts import assert_same
from support.networks import BY_NAME, NETWORKS, Network
from torch import Tensor, nn

import kfac_fx

assert_equal = functools.partial(assert_same, rtol=1e-6, atol=1e-9)
pytestmark = pytest.mark.usefixtures("float64")
every_network = pytest.mark.parametrize("network", NETWORKS, ids=str)
with_modes = pytest.mark.parametrize(
    "name", ["batch_norm", "group_norm", "functional_modes", "mode_branch", "shape_modes",
             "shape_norm", "encoder"]
)  # fmt: skip
both_recordings = pytest.mark.parametrize("recording", [False, True], ids=["off", "on"])


def pair(network: Network) -> tuple[nn.Module, nn.Module]:
    """An untouched copy of the model, and its net."""
    model = network.build()
    return copy.deepcopy(model), kfac_fx.transform(model, **network.captured_with())


def arm(net: nn.Module, recording: bool) -> None:
    for buffers in kfac_fx.ops.factor_buffers(net).values():
        kfac_fx.ops.switch(net, buffers, recording)


def forward(module: nn.Module, network: Network, n: int = 5) -> Tensor:
    """Outputs on inputs and dropout masks that are the same in every call."""
    torch.manual_seed(7)
    inputs, kwargs = network.inputs(n), network.kwargs(n)
    return network.pick(module(*inputs, **kwargs))


def gradients(module: nn.Module, network: Network, n: int = 5) -> dict[str, Tensor | None]:
    module.zero_grad()
    forward(module, network, n).sin().sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@both_recordings
@every_network
def test_outputs_and_gradients(network: Network, recording: bool) -> None:
    model, net = pair(network)
    arm(net, recording)
    assert_equal({"out": forward(net, network)}, {"out": forward(model, network)})
    assert_equal(gradients(net, network), gradients(model, network))


@every_network
def test_other_batch_size(network: Network) -> None:
    model, net = pair(network)
    assert_equal(gradients(net, network, 3), gradients(model, network, 3))
    assert_equal(gradients(net, network, 8), gradients(model, network, 8))


@every_network
def test_eval_is_bitwise_identical(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the operators the model is written in: torch fuses a whole encoder layer in eval."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    model, net = pair(network)
    model.eval(), net.eval()
    with torch.no_grad():
        assert torch.equal(forward(net, network), forward(model, network))


@every_network
def test_parameters_and_state_are_the_model_s(network: Network) -> None:
    model = network.build()
    before = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    keys = list(model.state_dict())
    net = kfac_fx.transform(model, **network.captured_with())
    assert dict(net.named_parameters()).keys() == before.keys()
    assert all(net.get_parameter(name) is tensor for name, tensor in before.items())
    assert all(net.get_buffer(name) is tensor for name, tensor in buffers.items())
    assert all(model.get_parameter(name) is tensor for name, tensor in before.items())
    assert sorted(net.state_dict()) == sorted(keys)
    assert list(model.state_dict()) == keys


@both_recordings
@with_modes
def test_modes_follow_train_and_eval(name: str, recording: bool) -> None:
    """Outputs and running statistics agree after every switch: each batch is counted once."""
    network = BY_NAME[name]
    model, net = pair(network)
    arm(net, recording)
    for training in (True, False, True, True, False, True):
        model.train(training), net.train(training)
        assert net.training == training
        assert_equal({"out": forward(net, network)}, {"out": forward(model, network)})
        assert_equal(dict(net.state_dict()), dict(model.state_dict()))


@with_modes
def test_captured_in_eval(name: str) -> None:
    network = BY_NAME[name]
    model = network.build().eval()
    net = kfac_fx.transform(model, **network.captured_with())
    model = copy.deepcopy(model)
    for training in (False, True, False):
        model.train(training), net.train(training)
        assert_equal({"out": forward(net, network)}, {"out": forward(model, network)})


def test_capture_keeps_mode_statistics_and_generator() -> None:
    """transform may run the model to check itself, and leaves no trace of having done so."""
    network = BY_NAME["shape_norm"]
    for training in (True, False):
        model = network.build().train(training)
        before = copy.deepcopy(model.state_dict())
        arguments = network.captured_with()
        state = torch.get_rng_state()
        net = kfac_fx.transform(model, **arguments)
        assert torch.equal(state, torch.get_rng_state())
        assert model.training == net.training == training
        assert_equal(dict(model.state_dict()), dict(before))
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["functional_modes", "shape_modes"])
def test_functional_dropout_is_off_in_eval(name: str) -> None:
    network = BY_NAME[name]
    _, net = pair(network)
    inputs = network.inputs(64)
    net.eval()
    assert torch.equal(net(*inputs), net(*inputs))
    net.train()
    assert not torch.equal(net(*inputs), net(*inputs))


@both_recordings
@every_network
def test_deepcopy(network: Network, recording: bool) -> None:
    """A copy has parameters and taps of its own, and computes the same."""
    _, net = pair(network)
    arm(net, recording)
    twin = copy.deepcopy(net)
    own = {id(parameter) for parameter in net.parameters()}
    assert not any(id(parameter) in own for parameter in twin.parameters())
    assert twin.curvature.blocks.keys() == net.curvature.blocks.keys()
    assert_equal(gradients(twin, network), gradients(net, network))


def shared_module() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


def shared_weight() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.parametrize("build", [shared_module, shared_weight])
def test_shared_parameters_stay_shared(build: Callable[[], nn.Module]) -> None:
    model = build()
    net = kfac_fx.transform(model)
    assert [id(p) for p in net.parameters()] == [id(p) for p in model.parameters()]
    assert net.state_dict().keys() == model.state_dict().keys()


def double_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


def double_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 2,)


@pytest.mark.parametrize("with_inputs", [False, True], ids=["traced", "with inputs"])
@pytest.mark.parametrize("where", ["", "0", "2"])
@pytest.mark.parametrize("hook", [double_output, double_input])
def test_hooks_of_the_user(hook: Callable[..., Any], where: str, with_inputs: bool) -> None:
    """Forward hooks are a part of the model, those of the whole model too."""
    network = BY_NAME["mlp"]
    model = network.build()
    module = model.get_submodule(where)
    if hook is double_input:
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)
    reference = copy.deepcopy(model)
    net = kfac_fx.transform(model, *(network.inputs(4) if with_inputs else ()))
    assert_equal({"out": forward(net, network)}, {"out": forward(reference, network)})
    assert_equal(gradients(net, network), gradients(reference, network))


def test_weight_norm_by_hooks() -> None:
    for model in (
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))),
    ):
        reference, network = copy.deepcopy(model), BY_NAME["mlp"]
        net = kfac_fx.transform(model)
        for _ in range(2):
            assert_equal(gradients(net, network), gradients(reference, network))


def test_transform_leaves_the_model_alone() -> None:
    model = BY_NAME["conv2d"].build()
    before = [(name, type(module)) for name, module in model.named_modules()]
    kfac_fx.transform(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_no_grad_forward_records_nothing() -> None:
    network = BY_NAME["mlp"]
    _, net = pair(network)
    arm(net, True)
    with torch.no_grad():
        outputs = net(*network.inputs(5))
    assert not outputs.requires_grad
    for buffers in kfac_fx.ops.factor_buffers(net).values():
        assert all(buffer.grad is None for buffer in buffers)
