"""One model of the zoo: transformed, compared with the original, stepped, and its coverage counted.

Every model runs in a process of its own with a time limit, so that a crash or a hang is a row of
the table and not the end of it.
"""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import kfac_fx

WEAK = ("elementwise", "generic", "frozen", "unused", "missed")  # what does not count as covered
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}
FLOOR = 1e-2  # a gradient this much smaller than the largest of the model is compared with that one
LIMIT = 120  # seconds a model
LEAST = 99.0  # per cent of the trained elements that the goal wants covered

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: collection/architecture.
        build: makes the model, with random weights, in training mode.
        inputs: positional and keyword arguments for a batch size.
        main: name or index of the output that the likelihood is about; None finds the usual one.
        likelihood: for Preconditioner; None is "categorical" for logits and "normal" otherwise.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    main: str | int | None = None
    likelihood: str | None = None


@dataclass
class Row:
    """What happened to a model; ``errors`` maps a stage to the exception's text."""

    name: str
    route: str = ""
    seconds: float = 0.0
    nodes: int = 0
    tensors: int = 0
    elements: int = 0
    blocks: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)  # elements by kind of block
    approximations: dict[str, int] = field(default_factory=dict)  # elements by class of coverage
    generic: list[tuple[str, int, str]] = field(default_factory=list)  # name, elements, reason
    weaker: list[tuple[str, int, str]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)  # blocks whose statistics are all zero
    unused: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # unused, but the original gives a gradient
    frozen: list[str] = field(default_factory=list)
    output_error: float = 0.0
    gradient_error: float = 0.0
    gradient_where: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    peak: float = 0.0
    total_seconds: float = 0.0

    @property
    def trained(self) -> int:
        """Elements that train: neither frozen nor without influence on the outputs."""
        return self.elements - sum(self.approximations.get(k, 0) for k in ("frozen", "unused"))

    @property
    def covered(self) -> int:
        """Elements in blocks with structure: Kronecker, full, pairs and the like."""
        return sum(count for kind, count in self.approximations.items() if kind not in WEAK)

    @property
    def coverage(self) -> float:
        """Percentage of the trained elements that are covered."""
        return 100 * self.covered / max(self.trained, 1)

    @property
    def passed(self) -> bool:
        return not self.errors


# ------------------------------------------------------------------------------------ the checks
def check(entry: Entry, *, step: bool = True, double: bool = False) -> Row:
    """Runs one model in this process; failures become entries of ``errors``.

    Args:
        step: whether a Preconditioner takes a step as well.
        double: in float64 instead of float32.
    """
    row = Row(entry.name)
    tolerance = TOLERANCES[torch.float64 if double else torch.float32]
    begin = time.perf_counter()
    try:
        torch.manual_seed(0)
        model = entry.build()
        inputs = entry.inputs(2), entry.inputs(3)
        if double:
            model, inputs = model.double(), pytree.tree_map_only(Tensor, _double, inputs)
        (args, kwargs), other = inputs
    except Exception as error:
        row.errors["build"] = describe(error)
        return row
    parameters = dict(model.named_parameters())
    row.tensors, row.elements = len(parameters), sum(p.numel() for p in parameters.values())
    try:
        want = _run(model, args, kwargs)
    except Exception as error:
        row.errors["original"] = describe(error)
        return row
    start = time.perf_counter()
    try:
        net = kfac_fx.transform(model, args, example_kwargs=kwargs)
    except Exception as error:
        row.errors["transform"] = describe(error)
        row.seconds = time.perf_counter() - start
        return row
    row.seconds = time.perf_counter() - start
    _count(row, net, want)
    for stage, function in (
        ("equality", lambda: _compare(row, want, _run(net, args, kwargs), tolerance)),
        ("step", lambda: _warned(row, entry, net, args, kwargs) if step else None),
        ("batch", lambda: _same_outputs(model, net, other, True, tolerance)),
        ("evaluation", lambda: _same_outputs(model, net, inputs[0], False, tolerance)),
    ):
        try:
            function()
        except Exception as error:
            kept = row.errors if stage in ("equality", "step") else row.notes
            kept[stage] = describe(error)
    row.total_seconds = time.perf_counter() - begin
    return row


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


@dataclass
class _Result:
    outputs: list[Any]
    structure: Any
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running averages and the like come back afterwards."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                old = before.get(name)
                if old is not None and old.shape == buffer.shape and not torch.equal(old, buffer):
                    buffer.copy_(old)


def _leaves(outputs: Any) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(outputs)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Result:
    """Outputs, gradients of a random linear function of them, and buffers afterwards."""
    with _buffers_kept(model):
        torch.manual_seed(1)
        outputs, structure = _leaves(model(*copy.copy(args), **copy.copy(kwargs)))
        generator = torch.Generator().manual_seed(2)
        loss: Any = 0.0
        for value in outputs:
            if _differentiable(value):
                weight = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                # What is not finite (a mask's -inf) takes no part, on either side.
                finite = value.detach().isfinite()
                loss = loss + (value.where(finite, 0.0) * weight).sum() / max(value.numel(), 1)
        model.zero_grad(set_to_none=True)
        loss.backward()
        gradients = {
            name: None if p.grad is None else p.grad.to_dense().clone()
            for name, p in model.named_parameters()
        }
        model.zero_grad(set_to_none=True)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plain = [v.detach().clone() if isinstance(v, Tensor) else v for v in outputs]
    return _Result(plain, structure, gradients, buffers)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def _distance(one: Tensor, other: Tensor, scale: float | None = None) -> float:
    """Largest difference relative to the largest entry of the first."""
    if one.shape != other.shape or one.dtype != other.dtype:
        raise AssertionError(f"{one.shape} {one.dtype} became {other.shape} {other.dtype}")
    if not one.numel():
        return 0.0
    if not one.is_floating_point() and not one.is_complex():
        return 0.0 if torch.equal(one, other) else float("inf")
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return float("inf")
    one, other = one.where(finite, 0.0), other.where(finite, 0.0)
    size = max(float(one.abs().max()), scale or 0.0)
    difference = float((one - other).abs().max())
    return difference / size if size else difference


def _distance_of_outputs(want: list[Any], got: list[Any]) -> float:
    if len(want) != len(got):
        raise AssertionError(f"{len(want)} outputs became {len(got)}")
    worst = 0.0
    for one, other in zip(want, got, strict=True):
        if isinstance(one, Tensor):
            worst = max(worst, _distance(one, other))
        elif one != other:
            raise AssertionError(f"the output {one!r} became {other!r}")
    return worst


def _compare(row: Row, want: _Result, got: _Result, tolerance: float) -> None:
    """Outputs, gradients and buffers of the transformed model against the original's."""
    problems = []
    if want.structure != got.structure:
        row.notes["structure"] = f"{want.structure} became {got.structure}"[:300]
    row.output_error = _distance_of_outputs(want.outputs, got.outputs)
    if not row.output_error <= tolerance:
        problems.append(f"outputs differ by {row.output_error:.1e}")
    sizes = [float(g.abs().max()) for g in want.gradients.values() if g is not None and g.numel()]
    largest = max(sizes, default=0.0)
    for name, one in want.gradients.items():
        other = got.gradients.get(name)
        if one is None or other is None:
            present = one if one is not None else other
            if present is not None and float(present.abs().max()) > 0:
                problems.append(f"{name} has {'no' if other is None else 'a'} gradient")
            continue
        error = _distance(one, other, FLOOR * largest)
        if error > row.gradient_error:
            row.gradient_error, row.gradient_where = error, name
    if not row.gradient_error <= tolerance:
        problems.append(f"gradient of {row.gradient_where} differs by {row.gradient_error:.1e}")
    differing = [
        name
        for name, one in want.buffers.items()
        if name not in got.buffers or not _distance(one, got.buffers[name]) <= tolerance
    ]
    if differing:
        problems.append(f"{len(differing)} buffers differ: {', '.join(differing[:3])}")
    if problems:
        raise AssertionError("; ".join(problems))


def _same_outputs(
    model: nn.Module, net: nn.Module, inputs: Inputs, training: bool, tolerance: float
) -> None:
    args, kwargs = inputs
    results = []
    for module in (model, net):
        module.train(training)
        with _buffers_kept(module), torch.no_grad():
            torch.manual_seed(1)
            results.append(_leaves(module(*args, **kwargs))[0])
        module.train()
    worst = _distance_of_outputs(*results)
    if not worst <= tolerance:
        raise AssertionError(f"outputs differ by {worst:.1e}")


# ---------------------------------------------------------------------------------- the coverage
def _count(row: Row, net: Any, want: _Result) -> None:
    curvature = net.curvature
    row.route = curvature.route
    row.nodes = len(net.graph.nodes)
    row.blocks = dict(Counter(block.kind for block in curvature.blocks.values()))
    for block in curvature.blocks.values():
        size = block.parameter_count
        kind = block.approximation
        if block.kind == "generic":
            kind = "generic"
            row.generic.append((", ".join(block.parameters), size, block.reason or "no reason"))
        elif block.reason is not None:
            row.weaker.append((", ".join(block.parameters), size, block.reason))
        if kind == "diagonal":
            kind = "elementwise"
        row.kinds[block.kind] = row.kinds.get(block.kind, 0) + size
        row.approximations[kind] = row.approximations.get(kind, 0) + size
    row.frozen = list(curvature.frozen)
    for name in curvature.unused:
        gradient = want.gradients.get(name)
        (row.unused if gradient is None or not gradient.any() else row.missed).append(name)
    for kind in ("frozen", "unused", "missed"):
        names = getattr(row, kind)
        if names:
            row.approximations[kind] = sum(curvature.sizes[name] for name in names)
    counted = sum(row.approximations.values())
    if counted != row.elements:
        row.notes["count"] = f"{counted} elements are accounted for, the model has {row.elements}"


# -------------------------------------------------------------------------------------- the step
USUAL = (
    "logits",
    "prediction_logits",
    "logits_per_image",
    "last_hidden_state",
    "prediction_outputs",
    "pred_masks",
    "predicted_depth",
    "reconstruction",
    "image_embeds",
    "spectrogram",
)


def main_output(outputs: Any, main: str | int | None) -> tuple[int, str]:
    """The index among the leaves and the name of the output that the likelihood is about."""
    leaves = _leaves(outputs)[0]
    if isinstance(main, int):
        return main, str(main)
    if hasattr(outputs, "keys"):
        for name in (main,) if main else USUAL:
            if name in outputs and _differentiable(outputs[name]):
                found = [i for i, leaf in enumerate(leaves) if leaf is outputs[name]]
                if found:
                    return found[0], name
    for index, leaf in enumerate(leaves):
        if _differentiable(leaf):
            return index, "output"
    raise AssertionError("no output depends on the parameters")


class _Messages(logging.Handler):
    """Keeps what the library warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def _warned(row: Row, entry: Entry, net: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """``_step``, with its warnings among the notes."""
    messages, log = _Messages(), logging.getLogger("kfac_fx")
    log.addHandler(messages)
    try:
        _step(row, entry, net, args, kwargs)
    finally:
        log.removeHandler(messages)
        if messages.found:
            row.notes["warning"] = "; ".join(messages.found)[:300]


def _step(row: Row, entry: Entry, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One step of a Preconditioner: statistics arrive and the updates are finite."""
    torch.manual_seed(3)
    outputs = net(*args, **kwargs)
    index, name = main_output(outputs, entry.main)
    main = _leaves(outputs)[0][index]
    classes = name in ("logits", "prediction_logits", "output") and main.dim() in (2, 3)
    likelihood = entry.likelihood or ("categorical" if classes else "normal")
    preconditioner = kfac_fx.Preconditioner(
        net, likelihood=likelihood, damping=1e-2, fisher="sampled"
    )
    # The signs of one draw may add up to zero at a parameter that all entries of a case share (the
    # bias of two captions' logits): a block is silent if no draw of a few brings it anything.
    for _ in range(4):
        net.zero_grad(set_to_none=True)
        with _buffers_kept(net):
            torch.manual_seed(3)
            main = _leaves(net(*args, **kwargs))[0][index]
            weight = torch.randn(main.shape, generator=torch.Generator().manual_seed(4)).to(main)
            preconditioner.observe(main)
            (main * weight).mean().backward()
            reached = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
            preconditioner.step()
        row.silent = _silent(net, preconditioner, reached)
        if not row.silent:
            break
    bad = [n for n, p in net.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if bad:
        raise AssertionError(f"updates are not finite: {', '.join(bad[:5])}")
    if preconditioner.skipped_gradients or preconditioner.skipped_statistics:
        raise AssertionError("the step was skipped: something was not finite")
    if not any(p.grad is not None and p.grad.any() for p in net.parameters()):
        raise AssertionError("every update is zero")
    net.zero_grad(set_to_none=True)
    if row.silent:
        raise AssertionError(
            f"no statistics for {len(row.silent)} blocks with a gradient: "
            + ", ".join(row.silent[:4])
        )


def _silent(net: Any, preconditioner: kfac_fx.Preconditioner, reached: set[str]) -> list[str]:
    """Blocks that have a gradient and no statistics."""
    return [
        f"{block.name} ({block.kind})"
        for block in net.curvature.blocks.values()
        if any(name in reached for name in block.parameters)
        and not all(bool(value.any()) for value in preconditioner.factors[block.name])
    ]


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


# ----------------------------------------------------------------------------------- one process
def describe(error: BaseException) -> str:
    """The exception's first lines and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if "kfac_fx" in f.filename or f"{os.sep}passes{os.sep}" in f.filename]
    shown = {(f.filename, f.lineno, f.name): f for f in (*mine[-1:], *frames[-1:])}
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = f"{type(error).__name__}: " + " | ".join(lines[:3])[:600]
    for frame in shown.values():
        parts = frame.filename.split(os.sep)
        text += f" [{'/'.join(parts[-2:])}:{frame.lineno} {frame.name}]"
    return text


def _child(entry: Entry, step: bool, double: bool, connection: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):  # torch.export prints whole graphs when it fails
            os.dup2(nowhere.fileno(), stream)
    try:
        row = check(entry, step=step, double=double)
    except BaseException as error:  # a row, whatever it was
        row = Row(entry.name, errors={"harness": describe(error)})
    try:
        import resource

        row.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    except ImportError:
        pass
    connection.send(json.dumps(asdict(row)))
    connection.close()


def check_isolated(
    entry: Entry, *, step: bool = True, double: bool = False, limit: float = LIMIT
) -> Row:
    """``check`` in a forked process with a time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(entry, step, double, theirs))
    begin = time.perf_counter()
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            row = Row(entry.name, errors={"timeout": f"more than {limit:g} s"})
        else:
            row = row_of(json.loads(ours.recv()))
    except EOFError:
        process.join(5)
        row = Row(entry.name, errors={"crash": f"the process ended with {process.exitcode}"})
    finally:
        if process.is_alive():
            process.join(1)
            process.kill()
        process.join()
        ours.close()
    row.total_seconds = time.perf_counter() - begin
    return row


def row_of(data: dict[str, Any]) -> Row:
    """A Row from what ``asdict`` made of it."""
    row = Row(**data)
    row.generic = [tuple(item) for item in row.generic]
    row.weaker = [tuple(item) for item in row.weaker]
    return row
