"""Private parts of torch that the library relies on are there and do what each file says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from kfac_fx.ops.gram import functional
from kfac_fx.torch_internals import (
    buffer_registration_hooks,
    dispatch_modes,
    distributions,
    dynamo_frames,
    error_texts,
    fake_tensors,
    foreach,
    generated_forward,
    graph_code,
    graph_tasks,
    jvp_levels,
    onlookers,
    operators,
    packed_rows,
    parametrizations,
    pytree,
    rebuilt_functions,
)
from kfac_fx.torch_internals.contiguous_groups import ContiguousGroups
from kfac_fx.torch_internals.modes import (
    function_mode_of_the_user,
    function_modes,
    modes_put_back,
)


def test_uses_below_jvp() -> None:
    """A value and its tangents are plain tensors there, and what is made of them is put back."""
    seen: list[tuple[int, bool, bool]] = []

    def use(y: Tensor, tensors: Sequence[Tensor | None], order: int) -> Tensor:
        assert tensors[1] is None and tensors[2] is not None
        zero = bool((tensors[2] == 0).all())
        seen.append((order, onlookers.inside_transform(), zero))
        return y * (1.0 + order)

    constant = torch.ones(3, dtype=torch.float64)
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    v = torch.rand(3, dtype=torch.float64)

    def used(x: Tensor) -> Tensor:
        return jvp_levels.below_jvp(use, x**3, [x, None, constant])

    def derivative(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(used, (x,), (v,))

    (value, first), (_, second) = torch.func.jvp(derivative, (x,), (v,))
    torch.testing.assert_close(value, x**3)
    torch.testing.assert_close(first, 2 * 3 * x**2 * v)
    torch.testing.assert_close(second, 3 * 6 * x * v**2)
    # Tangents of what has none are zero, and every use is outside of the transforms.
    assert seen == [(0, False, False), (1, False, True), (1, False, True), (2, False, True)]
    torch.testing.assert_close(torch.autograd.grad(second.sum(), x)[0], 18 * v**2)
    # Of another transform the code stays inside.
    del seen[:]
    torch.func.vmap(used)(x)
    torch.func.jvp(torch.func.grad(lambda x: used(x).sum()), (x,), (v,))
    assert [inside for _, inside, _ in seen] == [True, True]
    del seen[:]
    with forward_ad.dual_level():
        dual = used(forward_ad.make_dual(x, v))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, 3 * x**2 * v)
    assert [order for order, _, _ in seen] == [0]


def test_function_transforms() -> None:
    seen: list[tuple[bool, bool]] = []

    def function(x: Tensor) -> Tensor:
        seen.append((onlookers.inside_transform(), onlookers.transforms_active()))
        assert onlookers.unwrapped(x) is rows
        return x * 2

    rows = torch.ones(3)
    torch.func.vmap(function)(rows)
    assert seen == [(True, True)]
    assert not onlookers.inside_transform()
    assert not onlookers.transforms_active()
    assert onlookers.unwrapped(rows) is rows
    assert onlookers.unwrap_dead_wrappers((rows, 1)) == (rows, 1)
    assert not onlookers.forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert onlookers.forward_mode()


def test_symbolic_tracing_is_seen() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(onlookers.watched())
        return x + 1

    assert not onlookers.watched()
    fx.symbolic_trace(function)
    assert seen == [True] and not onlookers.watched()


def test_saved_tensor_hooks() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(onlookers.packed_by_checkpoint())
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(function, x, use_reentrant=False)
    function(x)
    assert seen == [True, False]
    assert onlookers.pack_hook() is None and not onlookers.saved_elsewhere()

    def pack(t: Tensor) -> Tensor:
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert onlookers.pack_hook() is pack and onlookers.saved_elsewhere()
        assert not onlookers.packed_by_checkpoint()


class Calls(TorchFunctionMode):
    """Names of the torch functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_functions_that_do_not_ask_for_overrides() -> None:
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with Calls() as whole:
        want = F.cross_entropy(x, target) + F.gaussian_nll_loss(x, x, x.exp())
    opened = rebuilt_functions.without_override_question(F.gaussian_nll_loss)
    with Calls() as inner:
        got = opened(x, x, x.exp())
    assert "gaussian_nll_loss" in whole.names and "gaussian_nll_loss" not in inner.names
    assert {"log", "clone"} & set(inner.names), inner.names
    assert torch.isfinite(want) and torch.equal(got, F.gaussian_nll_loss(x, x, x.exp()))


def test_attention_that_symbolic_values_go_through() -> None:
    layer = nn.MultiheadAttention(6, 2, bias=True)
    x = torch.randn(5, 3, 6)
    arguments = {
        "embed_dim_to_check": 6,
        "num_heads": 2,
        "in_proj_weight": layer.in_proj_weight,
        "in_proj_bias": layer.in_proj_bias,
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": layer.out_proj.weight,
        "out_proj_bias": layer.out_proj.bias,
        "training": False,
        "need_weights": False,
    }
    ours = rebuilt_functions.traceable_attention()
    names = [list(inspect.signature(f).parameters) for f in (ours, F.multi_head_attention_forward)]
    assert names[0] == names[1]
    want = F.multi_head_attention_forward(x, x, x, **arguments)[0]
    torch.testing.assert_close(ours(x, x, x, **arguments)[0], want)
    # The names that are answered otherwise are still names of torch's own module.
    for name in ("has_torch_function", "_check_key_padding_mask", "_none_or_dtype", "math"):
        assert hasattr(F, name), name


def test_forward_of_one_graph_module() -> None:
    one, other = (fx.symbolic_trace(nn.Sequential(nn.ReLU())) for _ in range(2))
    generated_forward.set_forward(one, lambda self, x: x + 1)
    x = -torch.ones(2)
    assert torch.equal(one(x), torch.zeros(2)) and torch.equal(other(x), torch.zeros(2))
    assert torch.equal(other(torch.ones(2)), torch.ones(2))
    signature = inspect.signature(lambda self, image: None)
    generated_forward.set_signature(other, signature)
    assert list(inspect.signature(other.forward).parameters) in (["image"], ["self", "image"])


class Nested(nn.Module):
    def forward(self, pair: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": pair["a"] + pair["b"]}


def test_structures_that_generated_code_reads() -> None:
    program = torch.export.export(Nested(), ({"a": torch.ones(2), "b": torch.ones(2)},))
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    assert graph_code.unpacks_inputs(module.graph)
    assert not graph_code.unpacks_inputs(fx.symbolic_trace(nn.ReLU()).graph)
    forward = type(module).forward
    assert set(generated_forward.SPECS) <= set(forward.__code__.co_names)
    renamed = generated_forward.with_renamed_specs(forward, "_other")
    for name in generated_forward.SPECS:
        module.__dict__["_other" + name] = module.__dict__.pop(name)
    pair = {"a": torch.ones(2), "b": torch.ones(2)}
    assert torch.equal(renamed(module, pair)["sum"], torch.full((2,), 2.0))


def test_buffer_registration_hooks() -> None:
    seen: list[str] = []

    def note(module: nn.Module, name: str, buffer: Tensor | None) -> None:
        seen.append(name)

    with buffer_registration_hooks.no_hooks_left():
        torch.nn.modules.module.register_module_buffer_registration_hook(note)
        nn.Module().register_buffer("one", torch.ones(1))
    nn.Module().register_buffer("two", torch.ones(1))
    assert seen == ["one"]


def test_dynamo_frames() -> None:
    frames: list[int | None] = []
    sources: list[list[str]] = []

    def compiler(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        frames.append(dynamo_frames.frame_being_compiled())
        found = [node for node in module.graph.nodes if node.op == "placeholder"]
        sources.append([dynamo_frames.input_source(node) for node in found])
        return dynamo_frames.find_backend("eager")(module, inputs)

    torch.compiler.reset()
    layer = nn.Linear(3, 2)
    compiled = torch.compile(layer, backend=compiler)
    compiled(torch.ones(4, 3))
    compiled(torch.ones(5, 3))  # the same frame again, with an open size
    assert frames[0] is not None and set(frames) == {frames[0]}
    assert dynamo_frames.frame_being_compiled() is None
    assert any("_parameters['weight']" in source for source in sources[0])
    torch.compiler.reset()


def test_donated_buffers_can_be_switched_off() -> None:
    import torch._functorch.config

    assert isinstance(torch._functorch.config.donated_buffer, bool)
    assert "torch._functorch.config.donated_buffer" in dynamo_frames.DONATED_BUFFER_ADVICE


def test_fake_tensors() -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),))
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    mode = fake_tensors.detect_fake_mode(values)
    assert isinstance(mode, fake_tensors.FakeTensorMode)
    with mode:
        assert type(torch.empty(2)) is not Tensor


def test_function_modes_of_the_user() -> None:
    class Mine(torch.overrides.TorchFunctionMode):
        pass

    assert function_modes() == 0
    with torch.device("cpu"):
        assert function_modes() == 1
        assert function_mode_of_the_user() == ""
        with Mine():
            assert function_mode_of_the_user() == "Mine"


def test_fake_tensors_without_a_cache() -> None:
    with fake_tensors.FakeTensorMode() as mode:
        assert mode.cache_enabled
    with pytest.raises(ZeroDivisionError), fake_tensors.without_fake_cache():
        assert not fake_tensors.FakeTensorMode().cache_enabled
        raise ZeroDivisionError
    assert fake_tensors.FakeTensorMode().cache_enabled


def test_operators() -> None:
    assert operators.runs_nested_graph(torch.ops.higher_order.cond)
    assert not operators.runs_nested_graph(torch.ops.aten.mm.default)
    assert operators.overload_name(torch.ops.aten.mul.Tensor) == "Tensor"
    assert operators.overload_name(torch.mul) is None
    shared = [name.default for name in (torch.ops.aten.view, torch.ops.aten.permute)]
    for target in (*shared, torch.ops.aten.split.Tensor, torch.ops.aten.add_.Tensor):
        assert operators.may_share_memory(target)
    for other in (torch.ops.aten.mm.default, torch.ops.aten.add.Tensor, torch.mul, "view"):
        assert not operators.may_share_memory(other)


def test_foreach() -> None:
    two = [torch.ones(2), torch.ones(1)]
    foreach.mul_(two, 3.0)
    foreach.add_(two, [torch.ones(2), torch.ones(1)], alpha=2)
    assert [t.tolist() for t in two] == [[5.0, 5.0], [5.0]]
    foreach.lerp_(two, [torch.zeros(2), torch.zeros(1)], 0.2)
    assert torch.equal(torch.stack(foreach.norm(two)), torch.tensor([32.0, 16.0]).sqrt())
    half = foreach.norm([torch.ones(2).half()], 2, torch.float32)
    assert half[0].dtype == torch.float32
    foreach.copy_(two, [torch.full((2,), 7.0), torch.full((1,), 7.0)])
    assert two[1].item() == 7
    foreach.zero_(two)
    assert not any(t.any() for t in two)


def test_graph_tasks() -> None:
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        y = x * 2
        y.register_hook(lambda g: seen.append(graph_tasks.current_graph_task()))
        y.sum().backward()
    assert len(set(seen)) == 2 and min(seen) >= 0
    assert graph_tasks.current_graph_task() == -1


def test_ends_of_graph_tasks() -> None:
    """A run inside of another has the larger number, and is over before the outer one's end."""
    runs: dict[str, int] = {}
    order: list[str] = []

    def see(name: str, _: Tensor) -> None:
        runs[name] = graph_tasks.current_graph_task()
        graph_tasks.at_end_of_run(partial(order.append, name))

    def inner(x: Tensor) -> Tensor:
        y = x.sin()
        if y.requires_grad:
            y.register_hook(partial(see, "inner"))
        return y

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(inner, x, use_reentrant=True)
    y.register_hook(partial(see, "outer"))
    assert order == []
    y.sum().backward()
    assert order == ["inner", "outer"] and runs["inner"] > runs["outer"]


def test_dispatch_modes() -> None:
    seen: list[str] = []

    class Watch(dispatch_modes.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    rows = torch.ones(2)
    assert not onlookers.traced() and not functional(rows)
    assert functional(torch.ones(2, requires_grad=True))
    with Watch():
        assert onlookers.traced() and functional(rows)
        torch.ones(2).mul(2)
    assert "aten::mul.Tensor" in seen
    with dispatch_modes.enable_python_dispatcher():
        assert torch.ones(2).sum() == 2


def test_distributions() -> None:
    wrong = -torch.ones(2)
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)  # torch._dynamo switches it off
    with distributions.arguments_unchecked():
        torch.distributions.Normal(0.0, wrong)
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, wrong)
    Distribution.set_default_validate_args(before)


@pytest.mark.parametrize("name", ["spectral_norm", "orthogonal", "weight_norm"])
def test_parametrizations(name: str) -> None:
    layer = getattr(nn.utils.parametrizations, name)(nn.Linear(3, 3))
    (found,) = layer.parametrizations.weight
    assert parametrizations.is_weight_norm(found) == (name == "weight_norm")
    assert parametrizations.is_untraceable(found) == (name != "weight_norm")


def test_pytree() -> None:
    nested = {"a": [torch.ones(1), 2], "b": (3,)}
    leaves, spec = pytree.tree_flatten(nested)
    assert leaves == pytree.tree_leaves(nested) and leaves[1:] == [2, 3]
    assert pytree.tree_unflatten(leaves, spec) == nested
    assert pytree.tree_map_only(Tensor, lambda t: 0, nested) == {"a": [0, 2], "b": (3,)}
    assert pytree.tree_map(type, nested) == {"a": [Tensor, int], "b": (int,)}


def raised(function: Callable[[], object]) -> RuntimeError:
    with pytest.raises(RuntimeError) as found:
        function()
    return found.value


def test_texts_of_refused_backward_passes() -> None:
    x = torch.ones(3, requires_grad=True)
    loss = x.square().sum()
    loss.backward()
    assert error_texts.backward_refusal(raised(loss.backward)) == "freed"
    y = checkpoint(torch.sin, x, use_reentrant=True).sum()
    refused = raised(lambda: torch.autograd.grad(y, x))
    assert error_texts.backward_refusal(refused) == "reentrant"
    assert error_texts.backward_refusal(RuntimeError("another one")) is None


def test_text_of_nested_forward_mode() -> None:
    def nested() -> None:
        with torch.autograd.forward_ad.dual_level(), torch.autograd.forward_ad.dual_level():
            pass

    assert error_texts.refuses_nested_forward_mode(raised(nested))
    assert not error_texts.refuses_nested_forward_mode(RuntimeError("another one"))


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_rows(batch_first: bool) -> None:
    """Packing refuses forward mode; the same rows chosen one by one have a derivative."""
    x, lengths = torch.randn(3, 4, 2, 2), torch.tensor([3, 2, 2, 1])
    x = x.transpose(0, 1) if batch_first else x

    def pack(x: torch.Tensor) -> torch.Tensor:
        return pack_padded_sequence(x, lengths, batch_first).data

    def tangent() -> torch.Tensor:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(pack(forward_ad.make_dual(x, 2 * x))).tangent
        return found

    assert error_texts.refuses_packing(raised(tangent))
    assert not error_texts.refuses_packing(NotImplementedError("another one"))
    want = pack_padded_sequence(x, lengths, batch_first)
    with packed_rows.PackedByRows():
        found = pack_padded_sequence(x, lengths, batch_first)
        assert torch.equal(tangent(), 2 * want.data)
    assert torch.equal(found.data, want.data)
    assert torch.equal(found.batch_sizes, want.batch_sizes)


def test_groups_of_images_in_forward_mode() -> None:
    """torch before 2.14 refuses channels_last, in these words; a contiguous copy is taken."""
    x, tangent = torch.randn(2, 3, 3, 4).permute(0, 3, 1, 2), torch.randn(2, 4, 3, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        if torch.__version__ < "2.14":
            assert error_texts.refuses_layout(raised(lambda: F.group_norm(dual, 2)))
        with ContiguousGroups():
            found = forward_ad.unpack_dual(F.group_norm(dual, 2)).tangent
    _, expected = torch.func.jvp(lambda x: F.group_norm(x, 2), (x.contiguous(),), (tangent,))
    torch.testing.assert_close(found, expected)


def test_text_of_a_derivative_without_a_graph() -> None:
    with torch.no_grad():
        value = torch.ones(2, requires_grad=True).sum()
    refused = raised(lambda: torch.autograd.grad(value, torch.ones(2)))
    assert error_texts.refuses_derivative(refused)


def test_texts_of_distributions() -> None:
    """Of parameters that a distribution does not take, and of values outside of it."""
    normal, uniform = torch.distributions.Normal, torch.distributions.Uniform
    zero, two = torch.zeros(2), torch.full((2,), 2.0)
    for failing in (
        lambda: normal(zero, zero, validate_args=True),
        lambda: uniform(zero, zero + 1, validate_args=True).log_prob(two),
    ):
        with pytest.raises(ValueError, match="Expected") as refused:
            failing()
        assert error_texts.refuses_values(refused.value)
    assert not error_texts.refuses_values(ValueError("Expected another one"))


def test_text_of_communication() -> None:
    lost = raised(lambda: dist.TCPStore("127.0.0.1", 1, timeout=timedelta(seconds=0.1)))
    assert error_texts.of_communication(lost)
    assert not error_texts.of_communication(RuntimeError("another one"))


def test_an_error_leaves_no_autocast_nested() -> None:
    """What stays nested keeps autocast's copies of weights in a precision of before."""

    def entered() -> None:
        torch.autocast("cpu", torch.bfloat16).__enter__()
        raise ValueError

    def nesting() -> int:
        torch.autocast_increment_nesting()
        return torch.autocast_decrement_nesting()

    before = nesting()
    with pytest.raises(ValueError):
        modes_put_back(entered)()
    assert nesting() == before
