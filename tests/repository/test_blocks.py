"""Every Python block of README and docs runs, and prints the words that the page shows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> ModuleType:
    """Import a script of docs/tools."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/tools/{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = tool("run_blocks")
PAGES = TOOL.pages()


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if TOOL.slow(page) else [], id=name(page))
        for page in PAGES
    ],
)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for block, printed in TOOL.run(page, tmp_path).items():
        if block.printed is not None:
            assert TOOL.words(printed) == TOOL.words(block.printed), f"line {block.line}"


def test_a_block_that_does_not_run_says_why() -> None:
    unknown = [
        f"{name(page)}:{block.line}: {block.info}"
        for page in PAGES
        for block in TOOL.blocks_of(page)
        if not block.runs and not block.info.startswith("title=")
        if len((block.excuse or "").split()) < 3
    ]
    assert not unknown


def test_most_blocks_run_and_most_are_quick() -> None:
    """A page that is marked slow, or a block that does not run, is the exception."""
    shown = [(page, block) for page in PAGES for block in TOOL.blocks_of(page) if not block.hidden]
    followed = [block for _, block in shown if block.info.startswith("title=")]
    run = [block for _, block in shown if block.runs]
    quick = [block for page, block in shown if block.runs and not TOOL.slow(page)]
    assert len(run) >= 0.9 * (len(shown) - len(followed))
    assert len(quick) >= 0.6 * len(run)


def test_a_page_that_prints_something_else_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- run before\nx = 2\n-->\n\n```python\nprint('loss', x / 3)\n```\n\n"
        '```text\nerror 0.7\n```\n\n```python {norun="it would end this"}\nraise SystemExit\n```\n',
        encoding="utf-8",
    )
    (found,) = [block for block in TOOL.run(page, tmp_path) if not block.hidden]
    assert TOOL.words("loss 0.67") != TOOL.words(found.printed)
    assert TOOL.words("error  1.2e-5") == TOOL.words(found.printed)
    assert TOOL.words("torch 2.13.0+cpu has") == TOOL.words("torch 2.14.1+cu130 has")
    assert TOOL.words("torch 2.13.0+cpu has") == TOOL.words("torch 2.14.1 has")
