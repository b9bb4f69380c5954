"""Curvature graphs as JSON, GraphML, DOT and an HTML page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import pytest
import torch
from support.towers import Tower
from torch import nn

import kfac_fx
from kfac_fx.errors import FormatError
from kfac_fx.viz import from_json, load, to_json

MODELS = {
    "tower": (Tower(4), None, {}),
    "attention": (nn.TransformerEncoderLayer(8, 2, 16), torch.randn(3, 2, 8), {}),
    "data": (Tower(3), None, {"couplings": "data"}),
    "diagonal": (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)), None, {}),
    "ekfac": (Tower(2), None, {"ekfac": True}),
    "recurrent": (nn.LSTM(3, 4), torch.randn(5, 2, 3), {"structure": "block_diagonal"}),
    "excluded": (Tower(1), None, {"exclude": ("stem",), "large_factors": "blocks"}),
    "scaled": (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), torch.randn(2, 3), {}),
}


@pytest.fixture(scope="module", params=MODELS)
def curvature(request: pytest.FixtureRequest) -> kfac_fx.CurvatureGraph:
    model, inputs, options = MODELS[request.param]
    return kfac_fx.transform(model, inputs, **options).curvature


def test_json_round_trip(curvature: kfac_fx.CurvatureGraph, tmp_path: Path) -> None:
    again = from_json(to_json(curvature))
    assert again == curvature
    assert str(again) == str(curvature)
    assert again.coverage == curvature.coverage
    curvature.save(tmp_path / "curvature.json")
    assert load(tmp_path / "curvature.json") == curvature
    other = kfac_fx.transform(nn.Linear(3, 2)).curvature
    assert from_json(to_json(other)) != curvature


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"a": 2}', "3"])
def test_other_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        from_json(text)


def test_json_of_another_version_is_refused() -> None:
    content = json.loads(to_json(kfac_fx.transform(nn.Linear(3, 2)).curvature))
    with pytest.raises(FormatError, match="version"):
        from_json(json.dumps(content | {"version": 0}))
    with pytest.raises(FormatError, match="version 2"):  # factors had a name, no side and form
        from_json(json.dumps(content | {"version": 1}))


def test_fields_of_a_version_stay() -> None:
    """Whoever changes the fields of a factor raises VERSION too: old files name them."""
    content = json.loads(to_json(kfac_fx.transform(nn.Linear(3, 2)).curvature))
    (block,) = content["curvature"]["blocks"].values()
    fields = {"type", "side", "shape", "role", "diagonal", "cut", "form"}
    assert (content["version"], set(block["factors"][0])) == (2, fields)


def test_networkx(curvature: kfac_fx.CurvatureGraph, tmp_path: Path) -> None:
    """Nodes, couplings and dependencies, there and in GraphML."""
    graph = curvature.to_networkx()
    assert list(graph) == list(curvature.blocks)
    coupled = {(d["child"], d["parent"]) for _, _, d in graph.edges(data=True) if d["coupled"]}
    assert coupled == {(c.child, c.parent) for c in curvature.couplings}
    dependencies = {(s, t) for s, t, d in graph.edges(data=True) if d["dependency"]}
    assert dependencies == {(e.source, e.target) for e in curvature.edges}
    curvature.save(tmp_path / "curvature.graphml")
    read = nx.read_graphml(tmp_path / "curvature.graphml")
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(read.edges) == set(graph.edges)
    assert all(read.edges[edge] == graph.edges[edge] for edge in graph.edges)


def test_dot_is_read_back(curvature: kfac_fx.CurvatureGraph, tmp_path: Path) -> None:
    pydot = pytest.importorskip("pydot")
    curvature.save(tmp_path / "curvature.dot", fold=False)
    (read,) = pydot.graph_from_dot_file(str(tmp_path / "curvature.dot"), encoding="utf-8")

    def nodes(graph: object) -> set[str]:
        own = {node.get_name().strip('"') for node in graph.get_nodes()}
        return own.union(*map(nodes, graph.get_subgraphs()))

    assert set(curvature.blocks) <= nodes(read)
    if shutil.which("dot"):
        plain = ["dot", "-Tplain", str(tmp_path / "curvature.dot")]
        found = subprocess.run(plain, capture_output=True, text=True, check=True)
        assert not found.stderr
        drawn = {line.split()[1].strip('"') for line in found.stdout.splitlines() if "node" in line}
        assert set(curvature.blocks) <= drawn


class Page(HTMLParser):
    """Collects what a page would load, and its data."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.data = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        self._inside = tag == "script" and values.get("id") == "data"
        if tag in {"link", "script", "img", "iframe", "use", "image", "a", "object"}:
            for key in ("src", "href", "xlink:href", "data"):
                if values.get(key) and not values[key].startswith(("#", "data:")):
                    self.loads.append(values[key])

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data
            self._inside = False


@pytest.mark.parametrize("with_dot", [True, False])
def test_page_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_dot: bool) -> None:
    pytest.importorskip("pydot")
    if with_dot and not shutil.which("dot"):
        pytest.skip("needs Graphviz's dot")
    if not with_dot:
        monkeypatch.setenv("PATH", str(tmp_path))
    curvature = kfac_fx.transform(Tower(4)).curvature
    curvature.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.loads == []
    assert not re.search(r"url\(['\"]?http|@import|fetch\(|XMLHttpRequest", text)
    assert {f"block:{name}" for name in curvature.blocks} <= page.ids  # in the unfolded drawing
    data = json.loads(page.data)
    assert set(data["blocks"]) == set(curvature.blocks)
    assert [len(set(shown.values())) for shown in data["shown"]] == [6, 15]
    assert data["blocks"]["gain"]["fallback"] == curvature.blocks["gain"].reason


def test_page_data_cannot_end_its_script(tmp_path: Path) -> None:
    pytest.importorskip("pydot")
    pytest.importorskip("matplotlib")
    model = nn.Module.__new__(nn.Sequential)
    nn.Module.__init__(model)
    model.add_module("</script><b>", nn.Linear(3, 2))
    curvature = kfac_fx.transform(model).curvature
    curvature.save(tmp_path / "page.html")
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert list(json.loads(page.data)["blocks"]) == list(curvature.blocks)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_page_runs_in_a_browser(tmp_path: Path) -> None:
    kfac_fx.transform(Tower(4)).curvature.save(tmp_path / "page.html")
    page = tmp_path / "page.html"
    text = page.read_text(encoding="utf-8")
    # A visit: search, click, and what was seen becomes the title.
    visit = """<script>
    $("search").value = "branches.2 up"; search(); choose(hits[0], true); zoom(0.5, 0, 0);
    document.title = [hits.length, document.querySelector("#panel h2").textContent,
      svg().querySelectorAll(".found").length].join(" | ");
    </script>"""
    page.write_text(text.replace("</body>", visit + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    command = ["chromium", *options, "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "<title>1 | branches.2.up | 1</title>" in found.stdout
