"""Run the Python blocks of pages, and put what they print under them.

    python docs/tools/run_blocks.py                           every page: runs and counts
    python docs/tools/run_blocks.py --write docs/tutorials/*.md

Blocks of a page share a namespace and run in an empty folder with one thread. What stands around a
block decides:

- ```` ```python ```` runs. ```` ```python {norun="why"} ```` does not, and its page says why.
  ```` ```python title="path" ```` is a file of a guide, which is followed as a whole
  (tests/repository/test_guides.py).
- ``<!-- run before`` ... ``-->`` is code that the page takes for granted (a model, a loader); it
  runs and is not shown.
- ``<!-- slow: why -->`` in a page leaves the page to the long tests.
- a ```` ```text ```` block right after a Python block is what that block prints. ``--write``
  replaces it, and copies pictures that the page shows and its blocks have drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import linecache
import os
import re
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BLOCK = re.compile(
    r"^```python[ \t]*(?P<info>[^\n]*)\n(?P<code>.*?)^```[ \t]*\n"
    r"(?:\n*^```text[ \t]*\n(?P<printed>.*?)^```[ \t]*$)?"
    r"|^<!-- run before\n(?P<hidden>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)
SLOW = re.compile(r"^<!-- slow: (.+?) -->", re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]\n]*\]\(([^)\s/:]+)\)")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
VERSION = re.compile(r"\btorch \d[\w.+]*")  # with the build, which may be +cpu, +cu130 or none


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        line: of the page, on which the code begins.
        code: what is run.
        info: what stands after the language: empty, ``{norun="why"}`` or ``title="path"``.
        printed: the text block after it; None without one.
        span: where ``printed`` lies in the page's text.
        hidden: whether readers of the page do not see it.
    """

    line: int
    code: str
    info: str
    printed: str | None
    span: tuple[int, int]
    hidden: bool

    @property
    def runs(self) -> bool:
        """Tell whether the block is run here."""
        return not self.info

    @property
    def excuse(self) -> str | None:
        """Return why it does not run; None where nothing is said."""
        found = re.fullmatch(r'\{norun="([^"]+)"\}', self.info)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """Return the Python blocks of a page in order, hidden ones among them."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"] is not None
        name = "hidden" if hidden else "code"
        line = text.count("\n", 0, match.start(name)) + 1
        found.append(
            Block(
                line=line,
                code=match[name],
                info="" if hidden else match["info"].strip(),
                printed=match["printed"],
                span=match.span("printed"),
                hidden=hidden,
            )
        )
    return found


def pages() -> list[Path]:
    """Return README.md and the pages of docs/ that have a Python block."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in every if blocks_of(page)]


def slow(page: Path) -> str | None:
    """Return why a page takes long; None for the others."""
    found = SLOW.search(page.read_text(encoding="utf-8"))
    return found[1] if found else None


@contextlib.contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Work in a folder, and with one thread, until the end of the block."""
    import torch

    threads, before = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def run(page: Path, folder: Path) -> dict[Block, str]:
    """Return what each block of a page prints, of those that run.

    Args:
        page: its blocks are run in order.
        folder: the empty folder that they run in.
    """
    found = {}
    # A module of its own: classes that a page defines can be pickled, and inspect finds their code.
    module = types.ModuleType(f"page_{page.stem}")
    sys.modules[module.__name__] = module
    try:
        with elsewhere(folder):
            for block in blocks_of(page):
                if not block.runs:
                    continue
                name = f"<{page.name}, block of line {block.line}>"
                code = "\n" * (block.line - 1) + block.code  # so that tracebacks have page lines
                linecache.cache[name] = (len(code), None, code.splitlines(True), name)
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(code, name, "exec"), module.__dict__)
                found[block] = printed.getvalue()
    finally:
        del sys.modules[module.__name__]
    return found


def words(text: str) -> list[str]:
    """Return a text's lines with every number as #: what machines and versions leave as it is."""
    text = NUMBER.sub("#", VERSION.sub("torch #", text))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [re.sub(r"-{2,}", "--", line) for line in lines if line]


def write(page: Path, printed: dict[Block, str], folder: Path) -> None:
    """Put what was printed, and pictures that were drawn, into a page.

    Args:
        page: is changed.
        printed: what ``run`` returned.
        folder: the one that the blocks ran in.
    """
    text = page.read_text(encoding="utf-8")
    for block in reversed(list(printed)):
        if block.printed is not None:
            start, end = block.span
            lines = [line.rstrip() for line in printed[block].rstrip().splitlines()]
            text = text[:start] + "\n".join([*lines, ""]) + text[end:]
    page.write_text(text, encoding="utf-8")
    for name in PICTURE.findall(text):
        if (folder / name).exists():
            shutil.copyfile(folder / name, page.parent / name)


def main() -> None:
    """Run the pages that are given, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="put what is printed into the pages")
    options = parser.parse_args()
    blocks = 0
    for page in [path.resolve() for path in options.pages] or pages():
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            printed = run(page, Path(folder))
            if options.write:
                write(page, printed, Path(folder))
        blocks += len(printed)
        seconds = time.process_time() - start
        print(f"{page.relative_to(ROOT)}: {len(printed)} blocks, {seconds:.1f} s")
    print(f"{blocks} blocks ran")


if __name__ == "__main__":
    main()
