"""Views of a parameter whose names no table knows, and operations that nobody knows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import kfac_fx
from kfac_fx.capture.unnamed_views import unnamed_views
from kfac_fx.ir.layout import Layout

pytestmark = pytest.mark.usefixtures("float64")
ROUTES = ("symbolic_trace", "export", "eager")
View = Callable[[Tensor], Tensor]

TRANSPOSED: dict[str, View] = {
    "H": lambda w: w.H,
    "mH": lambda w: w.mH,
    "adjoint": lambda w: w.adjoint(),
    "swapdims": lambda w: w.swapdims(0, 1),
    "swapaxes": lambda w: torch.swapaxes(w, 0, 1),
    "movedim": lambda w: w.movedim(0, 1),
    "moveaxis": lambda w: torch.moveaxis(w, 0, 1),
    "unflatten": lambda w: w.flatten().unflatten(0, (6, 5)).t(),
    "ravel": lambda w: w.ravel().view(6, 5).t(),
    "clone": lambda w: w.clone().t(),
    "view_as": lambda w: w.view_as(w).t(),
    "squeeze": lambda w: w[None, :, None].squeeze((0, 2)).t(),
    "tensor_split": lambda w: w.t().tensor_split(1, 1)[0],
}


class Tied(nn.Module):
    """An embedding whose table is the head as well, seen through a view."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 5)
        self.layer = nn.Linear(5, 5)
        self.view = view

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.table(tokens))) @ self.view(self.table.weight)


def preconditioned(model: nn.Module, tokens: Tensor, route: str) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    net = kfac_fx.transform(model, (tokens,), capture=route)
    assert not net.curvature.fallbacks, net.curvature
    preconditioner = kfac_fx.Preconditioner(net, fisher="exact", damping=1e-2)
    outputs = net(tokens)
    preconditioner.observe(outputs)
    torch.nn.functional.cross_entropy(outputs, tokens).backward()
    preconditioner.step()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_every_spelling_of_a_transpose_is_one(name: str, route: str) -> None:
    model = Tied(lambda w: w.T)
    tokens = torch.randint(0, 6, (9,))
    expected = preconditioned(model, tokens, "symbolic_trace")
    model.view = TRANSPOSED[name]
    found = preconditioned(model, tokens, route)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


class Pieces(nn.Module):
    """A matrix of [6, 5] whose rows serve two layers."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.cut(self.weight)
        return torch.tanh(x @ first.t()) + 2 * (x @ second.t())


CUTS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "tensor_split": lambda w: torch.tensor_split(w, 2, 0),
    "vsplit": lambda w: w.vsplit(2),
    "hsplit": lambda w: (w.t().hsplit(2)[0].t(), w.t().hsplit(2)[1].t()),
}


@pytest.mark.parametrize("route", ["symbolic_trace", "export"])
@pytest.mark.parametrize("name", CUTS)
def test_every_spelling_of_a_cut_is_one(name: str, route: str) -> None:
    x = torch.randn(4, 5)
    expected = kfac_fx.transform(Pieces(lambda w: w.chunk(2, 0)), (x,)).curvature
    found = kfac_fx.transform(Pieces(CUTS[name]), (x,), capture=route).curvature
    layouts = [[b.layouts for b in c.blocks.values()] for c in (expected, found)]
    assert layouts[0] == layouts[1] and len(layouts[1]) == 2, found


# What looks like a view and is none: cut off from the parameter, written to, copied, spread, or
# with rows that are steps apart, which no layout describes.
OTHER: dict[str, View] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "mul_": lambda w: w.mul_(2.0),
    "abs": lambda w: w.abs(),
    "relu": lambda w: w.relu(),
    "flip": lambda w: w.flip(0),
    "steps": lambda w: w[::2],
    "diagonal": lambda w: w.diagonal(),
    "unfold": lambda w: w.unfold(0, 3, 1),
    "expand": lambda w: w.expand(2, 6, 5),
    "as_strided": lambda w: w.as_strided((6, 6), (5, 0)),
    "two columns": lambda w: w.as_strided((3, 2), (10, 2)),
    "a shape": lambda w: w.size(0),
    "a user's function": lambda w: strange(w),
}


@fx.wrap
def strange(weight: Tensor) -> Tensor:
    """Whatever it would return, it is not run: a user's function may do anything."""
    raise AssertionError("it ran")


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_view_is_not_taken_for_one(name: str) -> None:
    (node,) = [n for n in fx.symbolic_trace(OTHER[name]).graph.nodes if "call" in n.op]
    assert unnamed_views(node, Layout((6, 5))) is None


# As Dynamo writes them: the arguments choose the overload, and only when the graph runs.
PACKETS: dict[str, View] = {
    "numpy_T": torch.ops.aten.numpy_T,
    "matrix_H": torch.ops.aten.matrix_H,
    "transpose": lambda w: torch.ops.aten.transpose(w, 0, 1),
    "swapdims": lambda w: torch.ops.aten.swapdims(w, 0, 1),
    "permute": lambda w: torch.ops.aten.permute(w, [1, 0]),
}


@pytest.mark.parametrize("name", PACKETS)
def test_operators_without_an_overload_are_read(name: str) -> None:
    model = Tied(lambda w: w.T)
    tokens = torch.randint(0, 6, (9,))
    expected = preconditioned(model, tokens, "symbolic_trace")
    graph = fx.symbolic_trace(model)
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function" and n.target is getattr]
    (view,) = [
        n for n in fx.symbolic_trace(lambda w: PACKETS[name](w)).graph.nodes if "call" in n.op
    ]
    node.target = view.target
    node.args = (node.args[0], *view.args[1:])
    graph.recompile()
    found = preconditioned(graph, tokens, "auto")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_views_of_views_are_views_of_the_parameter() -> None:
    """Of columns 1 and 2 of the transpose, one more transpose."""
    layout = Layout((6, 5)).transpose(0, 1).narrow(1, 1, 2)
    graph = fx.symbolic_trace(lambda w: w.H).graph
    (node,) = [n for n in graph.nodes if "call" in n.op]
    found = unnamed_views(node, layout)
    assert found is not None and not found.several
    weight = torch.randn(6, 5)
    assert torch.equal(found.layouts[0].apply(weight), weight[1:3])


class Used(nn.Module):
    def __init__(self, view: View) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.view(self.weight).t()


@torch.library.custom_op("kfac_fx_test::twisted", mutates_args=())
def twisted(weight: Tensor) -> Tensor:
    return weight.flip(0) * 2


twisted.register_fake(torch.empty_like)
twisted.register_autograd(lambda context, g: 2 * g.flip(0))


def test_an_operation_that_no_table_knows_is_named_with_the_version_of_torch() -> None:
    """It may be an old one under a name that this version of torch has made up."""
    net = kfac_fx.transform(Used(twisted), (torch.randn(4, 5),), capture="export")
    (block,) = net.curvature.fallbacks
    expected = f"torch {torch.__version__} has names here that kfac_fx does not know: "
    assert block.reason is not None
    assert block.reason.endswith(expected + "kfac_fx_test.twisted.default")
    assert expected in str(net.curvature)


def test_known_operations_are_no_strangers() -> None:
    """The weight goes through an operation of the vocabulary, and into a use without a rule."""
    net = kfac_fx.transform(Used(lambda w: w @ w.t() @ w), (torch.ones(4, 5),))
    (block,) = net.curvature.fallbacks
    assert "does not know" not in (block.reason or "")
