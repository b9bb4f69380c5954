"""Every model of the zoo: transformed, equal to the original, stepped, and covered.

``python -m pytest -m zoo``; requirements.txt says what it needs. Collections that cannot be
imported are skipped. ``python tests/zoo/table.py`` prints the table, with
``--short tests/zoo/table.txt`` it writes the one that is kept.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from collection import COLLECTIONS, entries
from harness import LEAST, Entry, check_isolated

pytestmark = pytest.mark.zoo


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The models as parameters; other runs than ``-m zoo`` do not import the collections."""
    if "entry" in metafunc.fixturenames:
        wanted = "not zoo" not in (metafunc.config.getoption("-m") or "")
        found = entries() if wanted else []
        metafunc.parametrize("entry", found, ids=[entry.name for entry in found])


@pytest.mark.parametrize("library", COLLECTIONS)
def test_collection_is_there(library: str) -> None:
    found = entries()
    if not any(entry.name.startswith(f"{library}/") for entry in found):
        pytest.skip(f"{library} cannot be imported")


def test_the_kept_table_has_the_models_that_are_here() -> None:
    """In table.txt, each with its name first."""
    table = (Path(__file__).parent / "table.txt").read_text().splitlines()
    kept = {line.split(" ", 1)[0] for line in table if "/" in line.split(" ", 1)[0]}
    here = {entry.name for entry in entries()}
    libraries = {name.split("/")[0] for name in here}
    assert here == {name for name in kept if name.split("/")[0] in libraries}


def test_model(entry: Entry) -> None:
    row = check_isolated(entry)
    assert not row.errors, row.errors
    reasons = "\n".join(f"{name} ({size}): {reason}" for name, size, reason in row.generic)
    assert row.coverage >= LEAST, f"{row.coverage:.2f} % covered\n{reasons}"
