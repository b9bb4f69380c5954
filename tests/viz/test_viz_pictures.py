"""Pictures: what they show, how repetition is folded, who draws them, and what is missing."""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from support.towers import Tower
from torch import nn

import kfac_fx
from kfac_fx.errors import MissingExtraError, UnknownOptionError
from kfac_fx.viz.draw_graphviz import clear_headings, dot_graph
from kfac_fx.viz.draw_matplotlib import plain_figure
from kfac_fx.viz.layout import Box, arranged
from kfac_fx.viz.module_tree import Group, Item, leaves, module_tree
from kfac_fx.viz.picture import FALLBACK, picture

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's dot")


@pytest.fixture(scope="module")
def tower() -> kfac_fx.CurvatureGraph:
    return kfac_fx.transform(Tower(5)).curvature


def names(item: Item) -> list[str]:
    return [child.name for child in item.children] if isinstance(item, Group) else []


def test_equal_modules_are_folded(tower: kfac_fx.CurvatureGraph) -> None:
    tree = module_tree(tower)
    (fold,) = [child for child in tree.root.children if isinstance(child, Group)]
    assert (fold.name, fold.copies) == ("branches.0 … 4", 5)
    assert names(fold) == ["norm", "up", "down"]
    assert tree.shown["branches.3.up"] == "branches.0.up"
    assert set(tree.shown) == set(tower.blocks)
    assert tree.apart("branches.1.up", "branches.2.up")
    assert not tree.apart("branches.1.up", "branches.1.down")
    assert not tree.apart("stem", "branches.1.down")


def test_nothing_is_folded_when_not_asked(tower: kfac_fx.CurvatureGraph) -> None:
    tree = module_tree(tower, fold=False)
    assert [leaf.block for leaf in leaves(tree.root)] != []
    assert {leaf.block for leaf in leaves(tree.root)} == set(tower.blocks)
    assert all(shown == name for name, shown in tree.shown.items())


@pytest.mark.parametrize("widths", [(4, 4, 5, 4, 4), (4, 4, 4)])
def test_two_equal_layers_stay(widths: tuple[int, ...]) -> None:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    tree = module_tree(kfac_fx.transform(nn.Sequential(*layers)).curvature)
    assert [leaf.copies for leaf in leaves(tree.root)] == [1] * len(layers)


def test_patterns_of_siblings_are_folded() -> None:
    layers = [m for _ in range(6) for m in (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2))
    tree = module_tree(kfac_fx.transform(model).curvature)
    first, last = tree.root.children
    assert isinstance(first, Group)
    assert (first.copies, names(first), last.name) == (6, ["0", "1"], "19")


def test_lines_between_copies_are_apart(tower: kfac_fx.CurvatureGraph) -> None:
    lines = {(x.source, x.target, x.onward): x for x in picture(tower).lines}
    within = lines["branches.0.up", "branches.0.down", False]
    assert (within.coupled, within.pairs, within.label) == (5, 5, "1.00")
    onward = lines["branches.0.down", "branches.0.up", True]
    assert (onward.coupled, onward.pairs) == (4, 4)
    every = picture(tower, fold=False).lines
    assert sum(line.coupled for line in every) == len(tower.couplings)


def test_boxes_grow_with_parameters_and_name_fallbacks(tower: kfac_fx.CurvatureGraph) -> None:
    nodes = picture(tower).nodes
    assert nodes["gain"].fallback is not None
    assert "fallback: diagonal" in nodes["gain"].lines
    assert [name for name, node in nodes.items() if node.fallback] == ["gain"]
    wide = picture(kfac_fx.transform(nn.Sequential(nn.Linear(99, 99))).curvature).nodes["0"]
    assert wide.size > nodes["stem"].size
    assert "9.9 k parameters" in wide.lines


def test_statistics_are_on_the_boxes() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    pre = kfac_fx.Preconditioner(net, structure="block_tridiagonal")
    outputs = net(torch.randn(8, 3))
    pre.observe(outputs)
    outputs.sum().backward()
    pre.step()
    shown = picture(net.curvature, pre.report())
    assert any(line.startswith("damping A ") for line in shown.nodes["0"].lines)
    (line,) = shown.lines
    assert line.values == [pre.report().couplings["0", "2"].strength]
    assert "canonical correlation" in net.curvature.to_pydot(pre).to_string()


def boxes(box: Box) -> list[Box]:
    return [box, *(inner for part in box.inside for inner in boxes(part))]


@pytest.mark.parametrize("fold", [True, False])
def test_boxes_without_graphviz_do_not_overlap(tower: kfac_fx.CurvatureGraph, fold: bool) -> None:
    for box in boxes(arranged(picture(tower, fold=fold))):
        for index, one in enumerate(box.inside):
            assert box.x <= one.x + 1e-9 and one.x + one.width <= box.x + box.width + 1e-9
            assert box.y <= one.y + 1e-9 and one.y + one.height <= box.y + box.height + 1e-9
            for other in box.inside[:index]:
                apart = (
                    one.x >= other.x + other.width - 1e-9
                    or other.x >= one.x + one.width - 1e-9
                    or one.y >= other.y + other.height - 1e-9
                    or other.y >= one.y + one.height - 1e-9
                )
                assert apart, (one.title, other.title)


def test_texts_without_graphviz_fit_their_boxes(tower: kfac_fx.CurvatureGraph) -> None:
    pytest.importorskip("matplotlib")
    shown = picture(tower)
    figure = plain_figure(shown)
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    frames = {p.get_gid(): p.get_window_extent(renderer) for p in axes.patches if p.get_gid()}
    assert set(frames) == {f"block:{name}" for name in shown.nodes}
    texts = {t.get_text(): t.get_window_extent(renderer) for t in axes.texts}
    for name, node in shown.nodes.items():
        frame = frames[f"block:{name}"]
        assert texts[node.title].x0 >= frame.x0 and texts[node.title].x1 <= frame.x1


def test_without_dot_matplotlib_draws(
    tower: kfac_fx.CurvatureGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
            tower.save(tmp_path / f"tower.{suffix}")
            assert (tmp_path / f"tower.{suffix}").read_bytes().startswith(start)
    assert "apt install graphviz" in caplog.text
    assert 'id="block:branches.0.up"' in (tmp_path / "tower.svg").read_text(encoding="utf-8")


@needs_dot
def test_graphviz_draws(tower: kfac_fx.CurvatureGraph, tmp_path: Path) -> None:
    """PNG, SVG and PDF; copies that are folded are there unfolded."""
    pytest.importorskip("pydot")
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        tower.save(tmp_path / f"tower.{suffix}")
        assert (tmp_path / f"tower.{suffix}").read_bytes().startswith(start)
    drawn = (tmp_path / "tower.svg").read_text(encoding="utf-8")
    assert 'id="block:branches.0.up"' in drawn and "× 5" in drawn
    assert FALLBACK in drawn
    tower.save(tmp_path / "all.svg", fold=False)
    assert 'id="block:branches.4.up"' in (tmp_path / "all.svg").read_text(encoding="utf-8")


@needs_dot
def test_headings_leave_the_lines(tower: kfac_fx.CurvatureGraph) -> None:
    pytest.importorskip("pydot")
    graph = dot_graph(picture(tower))
    before = graph.to_string()
    clear_headings(graph)
    (cluster,) = graph.get_subgraphs()[:1]
    assert cluster.get("labeljust") in ("l", "c", "r")
    assert len(graph.to_string()) - len(before) < 10  # nothing else changed


@needs_dot
@pytest.mark.slow
def test_a_thousand_blocks_are_drawn_in_time(tmp_path: Path) -> None:
    pytest.importorskip("pydot")
    curvature = kfac_fx.transform(Tower(333)).curvature
    assert len(curvature.blocks) > 1000
    assert len(picture(curvature).nodes) == 6
    start = time.perf_counter()
    curvature.save(tmp_path / "tower.svg")
    curvature.save(tmp_path / "all.svg", fold=False)
    assert time.perf_counter() - start < 20


def test_what_is_missing_says_how_to_get_it(
    tower: kfac_fx.CurvatureGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydot", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for attempt in (lambda: tower.save(tmp_path / "x.dot"), tower.to_pydot):
        with pytest.raises(MissingExtraError, match=r"pydot.*pip install kfac_fx\[viz\]"):
            attempt()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"matplotlib.*pip install kfac_fx\[viz\]"):
        tower.save(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_unknown_files_and_directions(tower: kfac_fx.CurvatureGraph, tmp_path: Path) -> None:
    with pytest.raises(UnknownOptionError, match=r"\.svg, .*\.html"):
        tower.save(tmp_path / "tower.bmp")
    with pytest.raises(UnknownOptionError, match="'TB', 'LR'"):
        tower.save(tmp_path / "tower.svg", direction="UP")
