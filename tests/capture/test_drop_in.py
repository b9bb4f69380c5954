"""Idioms of real code: a net does what the model does, or is refused with an error that says why.

A net is compared with an untouched twin of its model over several calls: outputs, gradients of
parameters and inputs, buffers, and what the caller can see of the model.
"""

from __future__ import annotations

import collections
import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import kfac_fx
from kfac_fx.errors import CaptureError, CoverageError

D = 4
ROUTES = ("none", "inputs", "export", "eager")
Value = Any
"""Whatever a model takes or returns."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.tau = 1.0

    def forward(self, x: Tensor) -> Value:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def transformed(model: nn.Module, route: str, *example: Value) -> Any:
    options: dict[str, Value] = {"structure": "block_diagonal"}
    if route != "none":
        options["example_inputs"] = example or (torch.randn(5, D),)
    if route in ("export", "eager"):
        options["capture"] = route
    return kfac_fx.transform(model, **options)


def both(kind: Callable[[], nn.Module], route: str, *example: Value) -> tuple[Any, Any, Any]:
    """Return a net, its model, and an untouched twin."""
    torch.manual_seed(0)
    model = kind()
    twin = copy.deepcopy(model)
    return transformed(model, route, *example), model, twin


def seen(run: Value, model: nn.Module, inputs: Sequence[Value], read: Value = None) -> list[Tensor]:
    """Return outputs, gradients and buffers of one call."""
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(1)
    given = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    out = run(*given)
    out = out if read is None else read(out)
    found = list(out) if isinstance(out, (tuple, list)) else [out]
    sum(t.square().sum() for t in found if t.requires_grad).backward()
    grads = [*(p.grad for p in model.parameters()), *(x.grad for x in given if hasattr(x, "grad"))]
    found += [torch.zeros(()) if g is None else g for g in grads]
    return [*found, *(b for n, b in model.named_buffers() if "kfac" not in n)]


def agree(
    net: Value, model: nn.Module, twin: nn.Module, *inputs: Value, read: Value = None
) -> None:
    given = inputs or (torch.randn(5, D),)
    close(seen(net, model, given, read), seen(twin, twin, given, read))


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


every_route = pytest.mark.parametrize("route", ROUTES)


class Scaled(Net):
    """Keeps a setting under another name than the caller's."""

    @property
    def scale(self) -> float:
        return self.tau

    @scale.setter
    def scale(self, value: float) -> None:
        self.tau = value

    def forward(self, x: Tensor) -> Value:
        return super().forward(x) * self.tau


@every_route
def test_what_is_set_on_the_net_is_set_on_the_model(route: str) -> None:
    net, model, twin = both(Scaled, route)
    for value in (3.0, 0.5):
        net.tau = twin.tau = value
        agree(net, model, twin)
        net.scale = twin.scale = 2 * value
        agree(net, model, twin)


@every_route
def test_a_hook_on_the_backward_pass_of_the_net_or_of_the_model(route: str) -> None:
    def halved(module: nn.Module, inputs: Value, outputs: Value) -> Value:
        return tuple(None if g is None else g / 2 for g in inputs)

    for owner in ("net", "model"):
        net, model, twin = both(Net, route)
        (net if owner == "net" else model).register_full_backward_hook(halved)
        twin.register_full_backward_hook(halved)
        for _ in range(2):
            agree(net, model, twin)


class Holding(Net):
    """Reads a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(D) / D

    def forward(self, x: Tensor) -> Value:
        return super().forward(x + self.table)


@every_route
def test_a_copy_holds_the_tensors_of_its_own_model(route: str) -> None:
    net, _, twin = both(Holding, route)
    copied = copy.deepcopy(net)
    agree(copied, copied.source, twin)
    copied.source.table = twin.table = torch.ones(D)
    agree(copied, copied.source, twin)
    copied.table = twin.table = 2 * torch.ones(D)
    agree(copied, copied.source, twin)


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Value:
        self.n += 1
        return super().forward(x) / self.n


@every_route
def test_a_buffer_that_counts_can_be_divided_by(route: str) -> None:
    net, model, twin = both(Counts, route)
    for _ in range(3):
        agree(net, model, twin)


class Own(collections.namedtuple("Own", "y n")):
    """Takes other arguments than it has fields."""

    __slots__ = ()

    def __new__(cls, y: Tensor) -> Own:
        return super().__new__(cls, y, 3)


@dataclass(frozen=True)
class Doubling:
    """Changes what it is given, and computes another field."""

    y: Tensor
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "y", 2 * self.y)
        object.__setattr__(self, "total", self.y.sum())


class Recorded(Net):
    kind: type

    def forward(self, x: Tensor) -> Value:
        return self.kind(super().forward(x))


@pytest.mark.parametrize("route", ["none", "inputs", "eager"])
@pytest.mark.parametrize("kind", [Own, Doubling])
def test_records_are_made_as_the_model_made_them(kind: type, route: str) -> None:
    net, model, twin = both(type("Model", (Recorded,), {"kind": kind}), route)
    agree(net, model, twin, read=lambda out: out.y)
    found = net(torch.ones(2, D))
    assert type(found) is kind
    if kind is Doubling:
        close((found.total,), (found.y.sum(),))
    else:
        assert found.n == 3
    assert route == "eager" or net.curvature.route == "symbolic_trace"


class Unpacks(Net):
    def forward(self, x: Value) -> Value:
        return super().forward(x.y)


@pytest.mark.parametrize("route", ["none", "inputs", "eager"])
def test_inputs_of_a_named_tuple_that_makes_itself(route: str) -> None:
    net, model, twin = both(Unpacks, route, Own(torch.randn(5, D)))
    agree(net, model, twin, Own(torch.randn(3, D)))


class Moves(Net):
    """Holds tensors in other ways than as a member, and changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.kept = torch.ones(D), {"n": torch.zeros(())}

    def forward(self, x: Tensor) -> Value:
        self.mean.mul_(1.5)
        self.kept["n"].add_(1)
        return super().forward(x * self.mean / self.kept["n"])


@pytest.mark.parametrize("route", ["inputs", "export", "eager"])
def test_tensors_that_are_no_members_are_put_back(route: str) -> None:
    net, model, twin = both(Moves, route)
    close((model.mean, model.kept["n"]), (twin.mean, twin.kept["n"]))
    for _ in range(2):
        agree(net, model, twin)
        close((model.mean, model.kept["n"]), (twin.mean, twin.kept["n"]))


class Draws(Net):
    def __init__(self) -> None:
        super().__init__()
        self.engine = torch.quasirandom.SobolEngine(D)

    def forward(self, x: Tensor) -> Value:
        return super().forward(x + self.engine.draw(1)[0])


def test_a_quasi_random_sequence_goes_on_where_it_was() -> None:
    net, model, twin = both(Draws, "inputs")
    assert net.curvature.route == "eager"
    for _ in range(2):
        agree(net, model, twin)


@every_route
def test_an_iterator_cannot_be_put_back(route: str) -> None:
    model = Net()
    model.numbers = itertools.count(1)  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="numbers is an iterator"):
        transformed(model, route)
    assert next(model.numbers) == 1  # type: ignore[call-overload]


class Catches(Net):
    """Another layer for batches that do not fit, by an error that it catches."""

    def forward(self, x: Tensor) -> Value:
        try:
            return self.head(self.a(x).view(5, D))
        except RuntimeError:
            return self.head(self.b(x))


class Refuses(Net):
    def forward(self, x: Tensor) -> Value:
        return self.head(self.a(x).view(5, D))


@pytest.mark.parametrize("route", ["none", "inputs"])
def test_an_error_of_a_graph_is_the_models_own_or_is_explained(route: str) -> None:
    net = transformed(Catches(), route)
    net(torch.randn(5, D))
    with pytest.raises(CaptureError, match="fails where the model does not"):
        net(torch.randn(3, D))
    net, _, twin = both(Refuses, route)
    with pytest.raises(RuntimeError) as expected:
        twin(torch.randn(3, D))
    with pytest.raises(RuntimeError) as found:
        net(torch.randn(3, D))
    assert type(found.value) is RuntimeError and str(found.value) == str(expected.value)


class Asks(Net):
    """Branches on what torch.export takes for a constant."""

    question: Callable[[Net, Tensor], bool]

    def forward(self, x: Tensor) -> Value:
        x = x.flatten(1) if x.dim() != 2 else x
        return self.head(self.a(x)) * (2.0 if type(self).question(self, x) else 1.0)


class Straight(Net):
    """Branches on something else than its input."""

    question: Callable[[Net, Tensor], bool]

    def forward(self, x: Tensor) -> Value:
        return self.head(self.a(x)) * (2.0 if type(self).question(self, x) else 1.0)


class PutsBack(Net):
    """Lets a layer run in another mode than its own, and puts that back."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.part, self.mode = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)), mode

    def forward(self, x: Tensor) -> Value:
        before = self.part.training
        self.part.train(self.mode)
        h = self.part(x)
        self.part.train(before)
        return self.head(h)


@pytest.mark.parametrize("mode", [False, True])
def test_a_mode_that_the_forward_puts_back(mode: bool) -> None:
    if mode:  # in training nothing is changed, and in evaluation the model itself runs
        assert "changes the mode of part" in transformed(PutsBack(mode), "none").untraced
    else:
        with pytest.raises(CaptureError, match="changes the mode of part"):
            transformed(PutsBack(mode), "none")
    net, model, twin = both(lambda: PutsBack(mode), "inputs")
    for training in (True, False):
        net.train(training), twin.train(training)
        agree(net, model, twin)


def test_a_branch_on_the_order_in_memory() -> None:
    kind = type("Model", (Asks,), {"question": lambda self, x: x.is_contiguous()})
    net, _, twin = both(kind, "inputs")
    assert net.curvature.route == "export"
    for x in (torch.randn(5, D), torch.randn(D, 5).t(), torch.randn(3, D)):
        close((net(x),), (twin(x),))


@pytest.mark.parametrize(
    "question",
    [
        lambda self, x: self.b.weight.requires_grad,
        lambda self, x: all(p.requires_grad for p in self.parameters()),
        lambda self, x: dict(self.named_parameters())["b.weight"].requires_grad,
    ],
)
def test_a_branch_on_whether_a_weight_is_trained(question: Value) -> None:
    with pytest.raises(CaptureError, match=r"requires_grad|flow"):
        transformed(type("Alone", (Straight,), {"question": question})(), "none")
    kind = type("Model", (Asks,), {"question": question})
    net, model, twin = both(kind, "inputs")
    for _ in range(2):
        agree(net, model, twin)
        model.b.requires_grad_(False), twin.b.requires_grad_(False)


class Tagged(Net):
    def forward(self, x: Tensor) -> Value:
        y = super().forward(x.flatten(1) if x.dim() != 2 else x)
        y.tag = "logits"
        return y


def test_an_attribute_of_an_output_is_kept() -> None:
    net, model, twin = both(Tagged, "inputs")
    agree(net, model, twin)
    assert net(torch.ones(1, D)).tag == "logits"


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Value:
        return self.head(self.norm(self.a(x.flatten(1) if x.dim() != 2 else x)))


def test_a_buffer_that_is_gone_is_noticed() -> None:
    net, model, twin = both(Normed, "export")
    for one in (model, twin):
        one.norm.running_mean = one.norm.running_var = None
        one.eval()
    agree(net, model, twin)


class Sized(Net):
    """Reads sizes of its members, which are numbers to a tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.ones(2))

    def forward(self, x: Tensor) -> Value:
        return super().forward(x) / self.steps.shape[0] / self.head.weight.shape[0]


@pytest.mark.parametrize("route", ["none", "inputs", "export"])
def test_members_of_other_sizes(route: str) -> None:
    net, model, twin = both(Sized, route)
    agree(net, model, twin)
    for one in (model, twin):
        one.steps = torch.ones(7)
    agree(net, model, twin)
    for one in (model, twin):
        one.head.weight = nn.Parameter(torch.ones(5, D))
        one.head.bias = nn.Parameter(torch.ones(5))
    agree(net, model, twin)
    net, model, twin = both(Sized, route)
    for one in (model, twin):
        one.steps.data = torch.ones(7)
    agree(net, model, twin)


class Table(Net):
    def forward(self, x: Tensor) -> Value:
        return self.head(self.a(x).double().mean() + torch.zeros(D)).sum() * torch.ones(3)


@pytest.mark.parametrize("route", ["none", "inputs", "export"])
def test_another_default_dtype(route: str) -> None:
    net, _, twin = both(Table, route)
    x = torch.randn(5, D)
    assert net(x).dtype == twin(x).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        for one in (net, twin):
            with pytest.raises(RuntimeError, match="dtype"):
                one(x)
    finally:
        torch.set_default_dtype(torch.float32)
    close((net(x),), (twin(x),))


class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(D, 5), nn.Linear(5, 2)

    def forward(self, x: Value) -> Tensor:
        return self.head(self.rnn(x)[0].data)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_of_every_recurrent_layer(kind: type[nn.RNNBase]) -> None:
    model = Packed(kind)
    x = rnn.pack_sequence([torch.randn(3, D), torch.randn(2, D)])
    net = kfac_fx.transform(model, (x,), structure="block_diagonal")
    assert net.curvature.blocks["rnn.weight_ih_l0"].approximation == "kronecker"
    for recording in (False, True):
        kfac_fx.ops.switch(net, kfac_fx.ops.all_buffers(net), recording)
        close((net(x),), (model(x),))


@every_route
@pytest.mark.parametrize("name", ["graph", "code", "meta", "curvature", "source", "takes"])
def test_members_under_names_of_the_net_are_refused(name: str, route: str) -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Linear(D, D))

        def forward(self, x: Tensor) -> Value:
            return super().forward(getattr(self, name)(x))

    with pytest.raises(CaptureError, match=f"member named {name}"):
        transformed(Named(), route)
    net, model, twin = both(lambda: nn.Sequential(Named()), route)
    agree(net, model, twin)


class Attends(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Value:
        return self.head(self.attention(x, x, x)[0])


def test_a_layer_that_is_kept_whole_asks_for_inputs() -> None:
    with pytest.raises(CoverageError, match=r"kept whole .* example_inputs"):
        kfac_fx.transform(Attends(), strict=True)
    kfac_fx.transform(Attends(), torch.randn(5, 6, D), strict=True)


def test_a_failing_backward_pass_is_a_difference() -> None:
    """A graph whose backward pass autograd refuses was taken, as a model's own would be."""

    class Written(Net):
        def forward(self, x: Tensor) -> Value:
            h = torch.exp(self.a(x))
            y = self.head(h)
            if isinstance(x, torch.fx.Proxy):
                h.mul_(2)
            return y

    with pytest.raises(CaptureError, match="backward pass fails"):
        kfac_fx.transform(Written(), torch.randn(5, D), capture="symbolic_trace")
