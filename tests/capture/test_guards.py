"""What a graph was specialised to may change behind it: the net still does what the model does.

Each case changes a model, or gives other inputs, after the transform. An untouched twin goes the
same way; outputs and gradients are compared, also while statistics are recorded.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.oracles import close
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kfac_fx

D = 4
Value = Any
"""Whatever a change or an input is made of."""

SETTING = {"scale": 1.0}
NUMBER = 1.0


class Block(nn.Module):
    """Not of torch.nn, so a tracer looks into it."""

    offset = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(D, D), nn.Dropout(0.0)
        self.scale: Value = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.fc(x))) * self.scale + self.offset


class Options:
    """A plain object that a model reads."""

    def __init__(self) -> None:
        self.deep = False


class Model(nn.Module):
    """Reads its settings from attributes, lists, objects and globals."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(D), nn.Linear(D, 3)
        self.shift = nn.Parameter(torch.randn(D))
        self.register_buffer("mean", torch.randn(D))
        self.factors, self.options, self.adapter = [1.0, {"x": 1.0}], Options(), True

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.options.deep:
            x = torch.tanh(x)
        if self.adapter:
            x = x + self.shift * self.factors[0] - self.mean * self.factors[1]["x"]  # type: ignore[index]
        return self.head(self.norm(x)) * SETTING["scale"] * NUMBER


class Untraceable(Model):
    """Symbolic tracing stops at the branch, torch.export does not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) if x.dim() != 2 else x)


def twice(module: nn.Module, args: Value, output: Tensor) -> Tensor:
    return 2 * output


def shrink(module: nn.Module, got: Value, given: Value) -> Value:
    return tuple(None if g is None else 0.5 * g for g in got)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


def patch(model: Value) -> None:
    forward = model.blocks[0].forward
    model.blocks[0].forward = lambda x: 2 * forward(x)


def patch_root(model: Value) -> None:
    model.forward = lambda x: 2 * type(model).forward(model, x)


def drawn(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(9)
    return {name: torch.rand_like(t) + 0.5 for name, t in model.state_dict().items() if t.dim()}


def setting(key: str, value: Value) -> Callable[[Value], None]:
    return lambda m: setattr(m, key, value)


def untie(model: Value) -> None:
    model.blocks[1].fc.weight = nn.Parameter(2 * model.blocks[1].fc.weight.detach())


CHANGES: dict[str, Callable[[Value], object]] = {
    "a flag": setting("adapter", False),
    "a float of a block": lambda m: setattr(m.blocks[0], "scale", 0.5),
    "a float made a tensor": lambda m: setattr(m.blocks[0], "scale", torch.ones(D) / 3),
    "a list": lambda m: m.factors.__setitem__(0, 0.3),
    "a dictionary in a list": lambda m: m.factors[1].update(x=3.0),
    "an object": lambda m: setattr(m.options, "deep", True),
    "an object replaced": setting("options", type("Other", (), {"deep": True})()),
    "a class": lambda m: setattr(type(m.blocks[0]), "offset", 0.25),
    "a global": lambda m: SETTING.update(scale=0.5),
    "a global number": lambda m: globals().update(NUMBER=0.5),
    "the depth": lambda m: m.blocks.append(Block().double()),
    "a layer fewer": lambda m: m.blocks.pop(1),
    "a layer replaced": lambda m: setattr(m.blocks[0], "fc", nn.Linear(D, D).double()),
    "a layer of the root replaced": lambda m: setattr(m, "head", nn.Linear(D, 3).double()),
    "a layer of another class": lambda m: setattr(m.blocks[0], "drop", nn.Tanh()),
    "a parameter assigned": lambda m: setattr(m, "shift", nn.Parameter(torch.ones(D).double())),
    "a buffer assigned": lambda m: setattr(m, "mean", torch.ones(D).double()),
    "a state assigned": lambda m: m.load_state_dict(drawn(m), strict=False, assign=True),
    "a state": lambda m: m.load_state_dict(drawn(m), strict=False),
    "a probability": lambda m: setattr(m.blocks[0].drop, "p", 0.5),
    "the norm's settings": lambda m: vars(m.norm).update(eps=0.5, momentum=0.9),
    "a hook on a layer": lambda m: m.head.register_forward_hook(twice),
    "a hook on a block": lambda m: m.blocks[0].register_forward_hook(twice),
    "a hook on the model": lambda m: m.register_forward_hook(twice),
    "a hook before a block": lambda m: m.blocks[0].register_forward_pre_hook(lambda b, x: 2 * x[0]),
    "a hook on a block's backward": lambda m: m.blocks[0].register_full_backward_hook(shrink),
    "a hook on a layer's backward": lambda m: m.head.register_full_backward_hook(shrink),
    "a hook on the model's backward": lambda m: m.register_full_backward_hook(shrink),
    "a forward patched": patch,
    "a forward of the root patched": patch_root,
    "a parametrization of a layer": lambda m: parametrize.register_parametrization(
        m.blocks[0].fc, "weight", Symmetric()
    ),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].fc),
    "a norm that stays frozen": lambda m: m.norm.eval(),
    "one block in evaluation": lambda m: m.blocks[0].eval(),
    "float32": lambda m: m.float(),
    "a layer frozen": lambda m: m.head.requires_grad_(False),
    "a parameter that is no longer shared": untie,
}  # fmt: skip


@pytest.fixture(autouse=True)
def settings_as_they_were() -> Value:
    yield
    SETTING["scale"] = 1.0
    globals()["NUMBER"] = 1.0
    Block.offset = 0.0


class Run(NamedTuple):
    outputs: Tensor
    gradients: list[Tensor | None]


def run(net: Value, model: nn.Module, x: Tensor) -> Run:
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(3)
    outputs = net(x)
    (outputs * torch.arange(outputs.numel()).view_as(outputs).cos()).sum().backward()
    return Run(outputs.detach(), [p.grad for p in model.parameters()])


def agree(net: Value, model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    got, want = run(net, model, x), run(twin, twin, x)
    close((got.outputs,), (want.outputs,))
    for mine, theirs in zip(got.gradients, want.gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            close((mine,), (theirs,))


def built(kind: type[nn.Module], **options: Value) -> tuple[Value, nn.Module, nn.Module]:
    """The net, its model, and a twin of that."""
    torch.manual_seed(0)
    model = kind().double()
    if kind in (Model, Untraceable):
        model.blocks[1].fc.weight = model.blocks[0].fc.weight  # type: ignore[index, union-attr]
    twin = copy.deepcopy(model)
    x = torch.randn(5, D, dtype=torch.float64)
    options = {"structure": "block_diagonal", **options}
    return kfac_fx.transform(model, x, **options), model, twin


def record(net: Value, on: bool) -> None:
    kfac_fx.ops.switch(net, kfac_fx.ops.all_buffers(net), on)


@pytest.mark.parametrize("kind", [Model, Untraceable])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_followed(change: str, kind: type[nn.Module]) -> None:
    net, model, twin = built(kind)
    assert net.curvature.route == ("symbolic_trace" if kind is Model else "export")
    dtype = torch.float32 if change == "float32" else torch.float64
    x = torch.randn(6, D, dtype=dtype)
    if dtype is torch.float64:
        agree(net, model, twin, x)
    for one in (model, twin):
        torch.manual_seed(7)
        CHANGES[change](one)
    agree(net, model, twin, x)
    record(net, True)
    agree(net, model, twin, x)
    record(net, False)
    net.eval(), twin.eval()
    agree(net, model, twin, x)


class Plain(nn.Module):
    """Two layers that are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head, self.adapter = nn.Linear(D, D), nn.Linear(D, 3), True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.head(h if self.adapter else 2 * h)


class PlainUntraceable(Plain):
    """Symbolic tracing stops at the branch, torch.export does not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) if x.dim() != 2 else x)


@pytest.mark.parametrize("kind", [Plain, PlainUntraceable])
def test_a_change_that_is_taken_back_leads_back_to_the_graph(kind: type[nn.Module]) -> None:
    net, model, twin = built(kind, structure="block_tridiagonal")
    x = torch.randn(6, D, dtype=torch.float64)
    for one in (model, twin):
        one.adapter = False
    agree(net, model, twin, x)
    record(net, True)
    with pytest.raises(kfac_fx.errors.CaptureError, match="adapter is False, not True"):
        net(x)  # couplings need the graph
    for one in (model, twin):
        one.adapter = True
    agree(net, model, twin, x)


def test_an_attribute_set_on_the_net_is_set_on_the_model() -> None:
    net, model, twin = built(Model)
    net.adapter = twin.adapter = False
    agree(net, model, twin, torch.randn(6, D, dtype=torch.float64))
    net.head = twin.head = nn.Linear(D, 2).double()
    assert model.head is twin.head
    close((net(torch.ones(2, D).double()),), (twin(torch.ones(2, D).double()),))


def test_what_no_graph_reads_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The model is traced again, and it is the same graph: the graph goes on."""
    net, model, _ = built(Model)
    model.note = "epoch 3"  # type: ignore[assignment]
    model.options.seen = 5  # type: ignore[union-attr]
    model.shift.requires_grad_(False)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        net(torch.randn(6, D, dtype=torch.float64))
    assert "was captured" not in caplog.text


def test_a_change_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    net, model, _ = built(Model)
    model.adapter = False  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        for _ in range(3):
            net(torch.randn(6, D, dtype=torch.float64))
    said = [r for r in caplog.records if "was captured" in r.getMessage()]
    assert len(said) == 1 and "adapter is False, not True" in said[0].getMessage()


@pytest.mark.parametrize("when", ["before", "after"])
def test_statistics_of_the_model_are_those_of_its_graph(when: str) -> None:
    """A model that runs in the place of its graph fills the same buffers with the same factors."""
    x = torch.randn(6, D, dtype=torch.float64)
    torch.manual_seed(0)
    model: Value = Model().double()
    if when == "before":
        model.adapter = False
    net = kfac_fx.transform(model, structure="block_diagonal")
    model.adapter = False
    found = kfac_fx.Preconditioner(net, "normal", fisher="exact")
    outputs = net(x)
    found.observe(outputs)
    outputs.mean().backward()
    found.step()
    torch.manual_seed(0)
    other: Value = Model().double()
    other.adapter = False
    twin = kfac_fx.transform(other, structure="block_diagonal")
    wanted = kfac_fx.Preconditioner(twin, "normal", fisher="exact")
    outputs = twin(x)
    wanted.observe(outputs)
    outputs.mean().backward()
    wanted.step()
    for name in ("blocks.0.fc", "blocks.1.fc", "head"):
        close(found.factors[name], wanted.factors[name])


class Branches(nn.Module):
    """Takes another way for sizes, dtypes, numbers, names, containers and their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Value, mode: str = "sum", k: int = 1, more: Value = None) -> Tensor:
        parts = list(x.values()) if isinstance(x, dict) else [x] if isinstance(x, Tensor) else x
        h = self.a(parts[0].to(self.a.weight.dtype))
        for part in parts[1:]:
            h = h + self.b(part)
        if h.shape[0] > 4:
            h = h - h.mean(0)
        if h.shape[0] % 2:
            h = 2 * h
        if parts[0].dtype == torch.float32:
            h = 3 * h
        for _ in range(k):
            h = torch.tanh(h)
        h = h + more if more is not None else h
        return self.head(h if mode == "sum" else h / len(h))


def rows(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, D, dtype=dtype)


CALLS: dict[str, tuple[tuple[Value, ...], dict[str, Value]]] = {
    "another size": ((rows(3),), {}),
    "an even size": ((rows(6),), {}),
    "one": ((rows(1),), {}),
    "another dtype": ((rows(5, torch.float32),), {}),
    "by name": ((), {"x": rows(5)}),
    "the default given": ((rows(5), "sum"), {}),
    "another name": ((rows(5),), {"mode": "mean"}),
    "another number": ((rows(5),), {"k": 3}),
    "what was left out": ((rows(5),), {"more": rows(5)}),
    "a list": (([rows(5), rows(5)],), {}),
    "a dictionary": (({"u": rows(5), "v": rows(5)},), {}),
    "another dimension": ((torch.randn(5, 2, D, dtype=torch.float64),), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_other_inputs_are_followed(call: str) -> None:
    torch.manual_seed(0)
    model = Branches().double()
    twin = copy.deepcopy(model)
    net = kfac_fx.transform(model, (rows(5),), capture="export", structure="block_diagonal")
    args, kwargs = CALLS[call]
    for on in (False, True):
        record(net, on)
        close((net(*args, **kwargs),), (twin(*args, **kwargs),))


CONTAINERS: dict[str, tuple[Value, Value]] = {
    "a longer list": ([rows(5)], [rows(5), rows(5)]),
    "a shorter list": ([rows(5), rows(5)], [rows(5)]),
    "another key": ({"u": rows(5)}, {"v": rows(5)}),
    "a key more": ({"u": rows(5)}, {"u": rows(5), "v": rows(5)}),
    "another order": ({"u": rows(5), "v": rows(5)}, {"v": rows(5), "u": rows(5)}),
    "a tuple": ([rows(5), rows(5)], (rows(5), rows(5), rows(5))),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_other_containers_are_followed(case: str) -> None:
    model = Branches().double()
    example, given = CONTAINERS[case]
    net = kfac_fx.transform(model, (example,), capture="export")
    close((net(example),), (model(example),))
    close((net(given),), (model(given),))


def test_arguments_that_tracing_fixed_are_followed() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(D, D), nn.Linear(D, 3)

        def forward(self, x: Tensor, mask: Tensor | None = None, deep: bool = False) -> Tensor:
            h = torch.tanh(self.a(x))
            if mask is not None:
                h = h * mask
            return self.head(torch.tanh(h) if deep else h)

    model = Masked().double()
    for example in ((rows(5),), (rows(5), rows(5))):
        net = kfac_fx.transform(model, example)
        assert net.curvature.route == "symbolic_trace"
        for kwargs in ({}, {"mask": rows(5)}, {"deep": True}, {"mask": rows(5), "deep": True}):
            x = rows(5)
            close((net(x, **kwargs),), (model(x, **kwargs),))
        close((net(x, None, True),), (model(x, None, True),))


def test_an_example_of_one_is_not_baked_in() -> None:
    model = Untraceable().double().eval()
    net = kfac_fx.transform(model, rows(1), structure="block_diagonal")
    assert net.curvature.route == "export"
    for n in (1, 2, 5):
        x = rows(n)
        close((net(x),), (model(x),))


class Frozen(Model):
    """Keeps its norm in evaluation, as fine-tuning does."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_the_models_own_train_is_called(capture: str) -> None:
    net, model, twin = built(Frozen, capture=capture)
    x = torch.randn(6, D, dtype=torch.float64)
    for mode in (True, False, True):
        net.train(mode), twin.train(mode)
        assert net.training == model.training == mode and not model.norm.training  # type: ignore[union-attr]
        agree(net, model, twin, x)
    model.eval(), twin.eval()
    agree(net, model, twin, x)
    assert capture == "eager" or not net.training


def test_flags_of_children_are_read_where_the_code_reads_them() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor, training: bool) -> Tensor:
            return F.dropout(x, 0.5, training)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner, self.one, self.two = (
                nn.Linear(D, D),
                Inner(),
                nn.Identity(),
                Block(),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(F.dropout(self.a(x), 0.5, self.one.training), self.training)
            return self.two(F.dropout(h, 0.5, not self.two.training))

    for capture in ("symbolic_trace", "export"):
        net, model, twin = built(Outer, capture=capture)
        x = torch.randn(6, D, dtype=torch.float64)
        for path in ("one", "inner", "two", "two.drop"):
            for mode in (False, True):
                net.train(mode), twin.train(mode)
                model.get_submodule(path).train(not mode)
                twin.get_submodule(path).train(not mode)
                agree(net, model, twin, x)


def test_a_copy_knows_what_its_model_was_captured_with() -> None:
    net, model, _ = built(Model)
    copied = copy.deepcopy(net)
    twin = copy.deepcopy(model)
    x = torch.randn(6, D, dtype=torch.float64)
    copied.adapter = twin.adapter = False
    agree(copied, copied.source, twin, x)
    assert model.adapter
    again, twin = copy.deepcopy(copied), copy.deepcopy(twin)
    agree(again, again.source, twin, x)
    again.adapter = twin.adapter = True
    agree(again, again.source, twin, x)
    shallow = copy.copy(net)
    assert shallow.head is net.head
    agree(shallow, model, copy.deepcopy(model), x)


def test_a_net_is_not_pickled() -> None:
    import pickle

    net, _, _ = built(Model)
    with pytest.raises(kfac_fx.errors.CaptureError, match="cannot be pickled"):
        pickle.dumps(net)


def test_the_guard_takes_microseconds() -> None:
    """Below one hundredth of a forward pass of 150 layers; a small net loses little."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(75)))
    net = kfac_fx.transform(model)
    state = net.__dict__["_guard"]._state
    best = min(_seconds(lambda: state.holds(True)) for _ in range(20))
    assert best < 2e-3, f"{best * 1e6:.0f} microseconds"


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


ITERATION = 0


class Counted(nn.Module):
    """Reads an attribute that is called as a global of the same file, which is another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.ITERATION, self.fc = 2.0, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.ITERATION


def test_a_global_of_an_attributes_name_is_another_thing() -> None:
    model = Counted()
    net = kfac_fx.transform(model)
    x = torch.randn(3, 4)
    for step in range(40):  # a graph that changes more often is given up
        globals()["ITERATION"] = step + 1
        close((net(x),), (model(x),))
        assert net._guard.holds(net)
    model.ITERATION = 3.0
    close((net(x),), (model(x),))
