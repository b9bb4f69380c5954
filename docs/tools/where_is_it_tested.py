"""Write the table of tests into docs/reference/where_is_it_tested.md, from the tests' docstrings.

Run ``python docs/tools/where_is_it_tested.py`` after a test file was added, moved or renamed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reference/where_is_it_tested.md"
START, END = "<!-- start of the table -->", "<!-- end of the table -->"


def rows() -> Iterator[str]:
    """Yield the lines of the table: one heading a folder, one row a file."""
    for folder in sorted(path for path in (ROOT / "tests").iterdir() if path.is_dir()):
        files = sorted(folder.glob("test_*.py"))
        if not files:
            continue
        yield from ("", f"### tests/{folder.name}", "", "| behaviour | file |", "|---|---|")
        for file in files:
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            said = docstring.partition("\n")[0].rstrip(".").replace("|", "\\|").replace("``", "`")
            yield f"| {said} | `{file.relative_to(ROOT).as_posix()}` |"
    yield ""


def page() -> str:
    """Return the text of the page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return before + "\n".join([START, *rows(), END]) + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
