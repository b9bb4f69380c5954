"""Turn the formulas of a page into MathML while the site is built.

Browsers draw MathML themselves, so the pages need no script, and a formula that cannot be read
fails the build rather than the reader.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(\\\(|\\\[)(.*?)(\\\)|\\\])</\1>', re.DOTALL)


def on_page_content(page_html: str, **_: Any) -> str:
    """Return the page with MathML in the place of every formula that arithmatex has marked."""
    return _FORMULA.sub(_mathml, page_html)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[3]).strip(), display=display)
