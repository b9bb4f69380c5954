"""The command line: what every parameter of a model gets, as a table, a picture or a program."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kfac_fx.api import transform
from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.codegen.program import Program
from kfac_fx.config import COUPLINGS, FLOW_DIRECTIONS, STRUCTURES
from kfac_fx.errors import KFACError
from kfac_fx.viz.facts import summary
from kfac_fx.viz.save import SUFFIXES

FAILED = 1
WRONG = 2
"""Exit codes: of a model that is not captured, and of arguments that are wrong."""

BATCH = 3
OTHER = 8
"""Sizes of dimensions that are given by name: of the first one in an input, and of others."""

EXAMPLES = """examples:
  python -m kfac_fx inspect torch.nn:Linear --kwargs '{"in_features": 3, "out_features": 2}'
  python -m kfac_fx draw torchvision.models:resnet18 -o resnet.svg
  python -m kfac_fx program my.models:build --input "float32[N,3,32,32]" -o program.py
  python -m kfac_fx inspect transformers:BertModel --input "input_ids=int64[N,16]" --json

A named dimension is free: N becomes a small number, T=16 says which. An input with a name is passed
as that keyword. A class with a `config_class` (transformers) gets --kwargs through it.

exit codes: 0 done; 1 the model cannot be captured or a package is missing; 2 wrong arguments"""


Keywords = dict[str, Any]
"""What JSON gave; the model's callable says what it takes."""


class UsageError(Exception):
    """An argument is wrong; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one line on stderr.

    Args:
        arguments: without the program's name; None for those of this process.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.quiet:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # torch's loggers have levels of their own
    try:
        _check(options)
        return _run(options)
    except UsageError as error:
        return _fail(error, WRONG)
    except (KFACError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(error, WRONG if isinstance(error, ValueError) else FAILED)
    finally:
        logging.disable(logging.NOTSET)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what ``--help`` prints is written here."""
    parser = argparse.ArgumentParser(
        prog="python -m kfac_fx",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("inspect", "print a table of what every parameter gets"),
        ("draw", "save a picture (svg, png, pdf, html) or a file (dot, graphml, json)"),
        ("program", "print the generated preconditioner program"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("model", metavar="MODULE:CALLABLE")
        command.add_argument("--kwargs", default="{}", metavar="JSON", help="of the callable")
        command.add_argument(
            "--input", action="append", default=[], metavar="SPEC", help='"float32[N,3,32,32]"'
        )
        command.add_argument("--structure", choices=STRUCTURES)
        command.add_argument("--couplings", choices=COUPLINGS, default="topology")
        command.add_argument("--exclude", action="append", default=[], metavar="GLOB")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("-o", "--output", metavar="FILE", help="instead of stdout")
        command.add_argument("--json", action="store_true", help="for scripts")
        command.add_argument("-q", "--quiet", action="store_true", help="errors only")
        if name == "draw":
            command.add_argument(
                "--unfold", action="store_true", help="repeated modules one by one"
            )
            command.add_argument("--direction", choices=FLOW_DIRECTIONS, default="TB")
    return parser


def _fail(error: Exception, code: int) -> int:
    """Print an error as one line, whatever breaks it has, and return the exit code."""
    print("kfac_fx: error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _check(options: argparse.Namespace) -> None:
    """Check what needs no model before one is built, which may take minutes."""
    if options.command == "draw":
        options.output = options.output or _file_name(options.model)
        if Path(options.output).suffix.lower().removeprefix(".") not in SUFFIXES:
            known = ", ".join(f".{suffix}" for suffix in SUFFIXES)
            raise UsageError(f"{options.output!r} has no known suffix; valid are {known}")
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        raise UsageError(f"there is no folder for {options.output!r}")


def _run(options: argparse.Namespace) -> int:
    """Build the model, transform it, and write what the command asks for."""
    torch.manual_seed(options.seed)
    inputs, keywords = _inputs(options.input)
    model = _model(options.model, _keywords(options.kwargs))
    # torch.export prints graphs that it cannot follow, whatever its loggers are told.
    silence = (
        contextlib.redirect_stderr(io.StringIO()) if options.quiet else contextlib.nullcontext()
    )
    with silence:
        net = transform(
            model,
            inputs or None,
            example_kwargs=keywords or None,
            structure=options.structure,
            couplings=options.couplings,
            exclude=options.exclude,
        )
    if options.command == "draw":
        fold = not options.unfold
        net.curvature.save(options.output, fold=fold, direction=options.direction)
        facts = {"file": options.output, "blocks": len(net.curvature.blocks)}
        print(json.dumps(facts) if options.json else f"saved {options.output}")
        return 0
    text = _text(options, net)
    if options.output is None:
        print(text)
        sys.stdout.flush()
    else:
        Path(options.output).write_text(text + "\n", encoding="utf-8")
    return 0


def _text(options: argparse.Namespace, net: CapturedModule) -> str:
    """Return what ``inspect`` or ``program`` prints."""
    curvature = net.curvature
    if options.command == "inspect":
        facts = summary(curvature)
        return json.dumps(facts, indent=1, ensure_ascii=False) if options.json else str(curvature)
    program = Program(curvature, curvature.couplings)
    return json.dumps({"code": program.code}) if options.json else program.code.rstrip("\n")


def _file_name(model: str) -> str:
    """Return the picture's file name: the last part of the callable's path."""
    return f"{model.rpartition(':')[2].rpartition('.')[2] or 'model'}.svg"


def _keywords(text: str) -> Keywords:
    """Return the keywords of the model's callable from JSON."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--kwargs is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--kwargs must be a JSON object, got {text}")
    return found


def _model(text: str, keywords: Keywords) -> nn.Module:
    """Return the module that MODULE:CALLABLE makes, or is."""
    name, colon, path = text.partition(":")
    if not (name and colon and path):
        raise UsageError(f"{text!r} is not of the form MODULE:CALLABLE, like torch.nn:Linear")
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # a module may raise anything while it is imported
        raise UsageError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except Exception as error:  # lazy modules import here
            raise UsageError(f"{name!r} has no {path!r}: {error}") from error
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(f"{text} is no callable, but {type(found).__name__}")
    try:
        config = getattr(found, "config_class", None)
        made = found(config(**keywords)) if isinstance(config, type) else found(**keywords)
    except Exception as error:  # whatever it is, it is its own
        raise UsageError(f"{text} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{text} made no nn.Module, but {type(made).__name__}")
    return made


def _inputs(specs: Sequence[str]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Return positional inputs and those with a name, from specifications like float32[N,3]."""
    sizes: dict[str, int] = {}
    inputs, keywords = [], {}
    for spec in specs:
        found = re.fullmatch(r"(?:(\w+)=)?(\w+)\[([^\[\]]*)\]", spec.replace(" ", ""))
        if found is None:
            raise UsageError(f"input {spec!r} is not of the form dtype[size,...], float32[N,3,8,8]")
        name, dtype, shape = found.groups()
        tensor = _tensor(
            spec, dtype, [_size(spec, part, sizes) for part in shape.split(",") if part]
        )
        if name:
            keywords[name] = tensor
        else:
            inputs.append(tensor)
    return tuple(inputs), keywords


def _size(spec: str, part: str, sizes: dict[str, int]) -> int:
    """Return the size that a part of a shape means: 3, N, or N=3.

    Args:
        spec: the whole specification, for messages.
        part: a number, a name (the same size wherever it stands), or name=number.
        sizes: the sizes of the names so far; a new one is added.
    """
    name, _, given = part.partition("=")
    if given and name.isidentifier() and given.isdigit():
        if sizes.setdefault(name, int(given)) != int(given):
            raise UsageError(f"input {spec!r}: {name} is {sizes[name]} already")
        return sizes[name]
    if part.isdigit():
        return int(part)
    if part.isidentifier():
        return sizes.setdefault(part, OTHER if sizes else BATCH)
    raise UsageError(f"input {spec!r}: {part!r} is neither a size nor a name")


def _tensor(spec: str, name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return random values of a dtype by name; integers are zeros and ones."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"input {spec!r}: {name!r} is no dtype of torch, like float32 or int64")
    if math.prod(shape) > 2**28:
        raise UsageError(f"input {spec!r} has {math.prod(shape):,} entries: give a smaller example")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(*shape, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    return torch.randint(2, tuple(shape)).to(dtype)  # small enough for every vocabulary
