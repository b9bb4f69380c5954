"""What users do that a step must not pass over: it is served, or ends in an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.networks import mlp
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import (
    CaptureError,
    LikelihoodError,
    ObservationError,
    ParameterChangedError,
)
from kfac_fx.likelihoods import Categorical, Normal, Sum

pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------- classes of an image
def image_net(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, channels, 1))


def image_factors(likelihood: object, targets: Tensor | None, **options: object) -> dict:
    torch.manual_seed(0)
    net = kfac_fx.transform(image_net(), structure="block_diagonal")
    pre = kfac_fx.Preconditioner(net, likelihood, fisher="exact", **options)
    pre.observe(inputs=torch.randn(2, 2, 4, 5), targets=targets)
    net(torch.ones(2, 2, 4, 5)).sum().backward()
    pre.step()
    return dict(pre.factors)


@pytest.mark.parametrize("compile", [False, "eager"])
def test_targets_of_an_image_say_where_the_classes_are(compile: bool | str) -> None:
    targets = torch.randint(3, (2, 4, 5))
    got = image_factors("categorical", targets, compile=compile)
    want = image_factors(Categorical(dim=1), targets)
    for name, group in want.items():
        for one, other in zip(got[name], group, strict=True):
            torch.testing.assert_close(one, other)


def test_an_image_without_targets_is_refused() -> None:
    with pytest.raises(LikelihoodError, match=r"dim=1.*\[N, C, H, W\]"):
        image_factors("categorical", None)


def test_an_image_whose_sides_are_as_many_as_classes_is_refused() -> None:
    net = kfac_fx.transform(image_net(4))
    pre = kfac_fx.Preconditioner(net, "categorical", fisher="exact")
    outputs = net(torch.randn(2, 2, 4, 4))
    with pytest.raises(LikelihoodError, match="cannot tell"):
        pre.observe(outputs, torch.randint(4, (2, 4, 4)))


def test_sequences_of_either_layout_follow_their_targets() -> None:
    last, first = torch.randn(2, 5, 3), torch.randn(2, 3, 5)
    targets = torch.randint(3, (2, 5))
    assert Categorical().fitted(last, targets).dim == -1
    assert Categorical().fitted(first, targets).dim == 1
    assert Categorical().fitted(torch.randn(2, 3, 3), torch.zeros(2, 3)).dim is None


# ---------------------------------------------------------------- a backward that brings nothing
@pytest.mark.parametrize("through", ["inputs", "grad"])
def test_a_backward_for_some_leaves_has_no_empirical_statistics(through: str) -> None:
    net = kfac_fx.transform(mlp(4, 4, 3))
    pre = kfac_fx.Preconditioner(net, "categorical", fisher="empirical")
    parameters = list(net.parameters())
    for again in (False, True):  # also where there are averages already
        y = torch.randint(3, (6,))
        outputs = net(torch.randn(6, 4))
        pre.observe(outputs, y)
        loss = F.cross_entropy(outputs, y)
        if again and through == "inputs":
            loss.backward(inputs=parameters)
        elif again:
            for parameter, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = g
        else:
            loss.backward()
            pre.step()
    with pytest.raises(ObservationError, match=r"backward\(inputs=...\)"):
        pre.step()


# -------------------------------------------------------------------------- layers that thaw
def half_frozen() -> tuple[nn.Module, nn.Module]:
    model = mlp(4, 4, 3)
    model[0].requires_grad_(False)
    return model, kfac_fx.transform(model)


def test_a_layer_that_thaws_is_named() -> None:
    model, net = half_frozen()
    pre = kfac_fx.Preconditioner(net, "categorical")

    def step() -> None:
        outputs = net(torch.randn(6, 4))
        pre.observe(outputs)
        outputs.square().sum().backward()
        pre.step()

    step()
    model[0].requires_grad_(True)
    with pytest.raises(ParameterChangedError, match=r"parameter 0\.weight was frozen.*transform"):
        step()


def test_kfac_names_it_too() -> None:
    model, net = half_frozen()
    model[0].requires_grad_(True)
    optimizer = kfac_fx.KFAC(net, "categorical")
    with pytest.raises(ParameterChangedError, match=r"parameter 0\.weight was frozen"):
        optimizer.step(torch.randn(6, 4), torch.randint(3, (6,)))


# ------------------------------------------------------------------ checkpoints of another Fisher
SUM = Sum([("categorical", 1.0), ("normal", 0.5)])


@pytest.mark.parametrize(
    "other",
    ["bernoulli", Normal(0.3), Categorical(weight=torch.ones(3)), SUM, torch.distributions.Normal],
    ids=str,
)
@pytest.mark.parametrize("made", [kfac_fx.Preconditioner, kfac_fx.KFAC])
def test_a_state_of_another_likelihood_is_refused(made: Callable, other: object) -> None:
    state = made(kfac_fx.transform(mlp(4, 3)), other).state_dict()
    same = made(kfac_fx.transform(mlp(4, 3)), other)
    same.load_state_dict(state)
    one = made(kfac_fx.transform(mlp(4, 3)), "normal")
    with pytest.raises(LikelihoodError, match=r"the state_dict is of the likelihood"):
        one.load_state_dict(state)


# ------------------------------------------------------------------------- models compiled before
@pytest.mark.parametrize("inputs", [None, torch.ones(5, 4)], ids=["none", "example"])
def test_a_compiled_model_is_refused_with_the_order_to_go(inputs: Tensor | None) -> None:
    whole = torch.compile(mlp(4, 3), backend="eager")
    part = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 3))
    for model, place in ((whole, "it is"), (part, "its part 0 is")):
        with pytest.raises(CaptureError, match=rf"compiled already: {place}.*torch\.compile\(kfac"):
            kfac_fx.transform(model, inputs)


# ----------------------------------------------------------------- one case without a batch
class Picked(nn.Module):
    """A norm that gets the one case of its batch without the batch dimension."""

    def __init__(self, norm: nn.Module, unbatched: bool) -> None:
        super().__init__()
        self.norm, self.unbatched = norm, unbatched

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.squeeze(0)).unsqueeze(0) if self.unbatched else self.norm(x)


@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_an_instance_norm_of_one_case_needs_no_batch(dims: int, tracks: bool) -> None:
    """Its factors are those of a batch of one, in training and with running statistics."""
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d)[dims - 1]
    x = torch.randn(1, 3, *(4, 5)[:dims])
    norm = kind(3, affine=True, track_running_stats=tracks)
    if tracks:
        norm(torch.randn(7, *x.shape[1:]))
        norm.eval()
    found = []
    for unbatched in (False, True):
        net = kfac_fx.transform(Picked(norm, unbatched), x)
        pre = kfac_fx.Preconditioner(net, "normal", fisher="exact")
        outputs = net(x)
        pre.observe(outputs)
        outputs.sin().sum().backward()
        pre.step()
        found.append(pre.factors["norm"][0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_a_head_of_another_size_is_refused(fisher: str) -> None:
    model = mlp()
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = kfac_fx.Preconditioner(net, "categorical", fisher=fisher)
    x = torch.randn(6, next(model.parameters()).shape[1])
    before = model[-1]
    model[-1] = nn.Linear(before.in_features, before.out_features + 2)
    outputs = net(x)
    with pytest.raises(ObservationError, match="replaced by one of another size"):
        pre.observe(outputs, torch.zeros(6, dtype=torch.int64))
        F.cross_entropy(outputs, torch.zeros(6, dtype=torch.int64)).backward()
