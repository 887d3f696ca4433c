"""The axes of real graphs: levels that follow from one another, and costs that are those of the pruned graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnxcompress import models
from onnxcompress.channels.allocation import Limits
from onnxcompress.channels.groups import find_channels
from onnxcompress.channels.options import Goal
from onnxcompress.channels.preparing import prepare as prepare_channels
from onnxcompress.channels.ranking import magnitudes
from onnxcompress.cost import count
from onnxcompress.errors import RecipeError
from onnxcompress.measure import LatencyFigures
from onnxcompress.model_io import load, save, to_proto
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import model, run
from onnxcompress.train.depth.preparation import copy_graph
from onnxcompress.train.depth.preparation import prepare as prepare_blocks
from onnxcompress.train.scale.axes import Ladders, count_all, pixel_ladder, remove, structure, width_ladder
from onnxcompress.train.scale.estimating import Measurements
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.making import move_weights
from onnxcompress.train.scale.options import ScaleOptions
from onnxcompress.train.scale.ranking import residual_blocks
from onnxcompress.train.scale.solving import CostTable
from onnxcompress.train.scale.timing import MARGIN, LatencyTable

FOLDER = Path(models.__file__).parent
MODELS = ["resnet20", "mobilenetv2_mini", "convnext_mini", "deit_mini"]


def made(name, step=-1):
    """The prepared graph of a small model, and its ladders down to a fifth of the MACs; the last blocks go first."""
    with Runtime() as runtime:
        graph = prepare_channels(prepare_blocks(load(FOLDER / f"{name}_digits.onnx"), runtime=runtime), runtime)
    blocks, whole = residual_blocks(graph)
    least = 0.2 * count(graph).macs
    channels = find_channels(graph)
    orders, widths, sizes = width_ladder(channels, magnitudes(channels), Limits(), least)
    pixels = tuple(pixel_ladder(graph, least))
    ladders = Ladders(tuple(blocks[::step]), whole, orders, tuple(widths), tuple(sizes), pixels)
    return graph, ladders


@pytest.fixture(scope="module")
def resnet():
    return made("resnet20")


@pytest.mark.parametrize(
    ("name", "step"), [*((name, -1) for name in MODELS), ("mobilenetv2_mini", 1), ("deit_mini", 1)]
)
def test_the_cost_of_a_triple_is_that_of_its_graph(name, step):
    graph, ladders = made(name, step)
    table = count_all(graph, ladders, count(graph).macs)
    ends = np.array(table.costs.shape) - 1
    assert ends.min() >= 1
    rng = np.random.default_rng(0)
    triples = [tuple(ends), (ends[0], 0, 0), (0, ends[1], 0), (0, 0, ends[2])]
    triples += [tuple(rng.integers(0, ends + 1)) for _ in range(4)]
    for triple in triples:
        levels = tuple(map(int, triple))
        assert count(structure(graph, ladders, levels)).macs == table.cost(levels)
    assert table.cost((0, 0, 0)) == count(graph).macs
    for axis in range(3):
        assert (np.diff(table.alone(axis)) <= 0).all() and np.diff(table.sizes[axis]).max() < 0


def test_a_pruned_graph_runs(resnet):
    graph, ladders = resnet
    x = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    model = to_proto(structure(graph, ladders, (3, 4, 2)))
    assert run(model, {model.graph.input[0].name: x})[0].shape == (3, 10)


def test_channels_that_go_in_two_steps_are_those_that_go_in_one(resnet):
    graph, ladders = resnet
    at_once, in_two = copy_graph(graph), copy_graph(graph)
    remove(at_once, ladders.gone(0, 6))
    remove(in_two, ladders.gone(0, 2))
    remove(in_two, ladders.gone(2, 6))
    assert to_proto(at_once).SerializeToString() == to_proto(in_two).SerializeToString()


def test_streams_under_layer_normalization_stay():
    graph, ladders = made("deit_mini")
    channels = find_channels(graph)
    near = {group.name for group in channels.groups if group.approximate}
    assert near and not near & set(ladders.orders)
    assert all(not near & set(taken) for taken in ladders.widths)


def test_ladders_are_the_same_after_a_file(resnet):
    _, ladders = resnet
    assert Ladders.from_dict(json.loads(json.dumps(ladders.as_dict()))) == ladders


def test_weights_move_into_a_graph_of_another_resolution():
    graph, ladders = made("deit_mini")
    small = structure(graph, ladders, (0, 0, 2))
    for node in small.nodes:
        for tensor in node.inputs:
            if hasattr(tensor, "values") and tensor.values.dtype == np.float32 and tensor.values.ndim == 2:
                tensor.values = tensor.values + 1
    target = copy_graph(graph)
    before = {t.name: t.values.copy() for node in target.nodes for t in node.inputs if hasattr(t, "values")}
    move_weights(small, target)
    after = {t.name: t.values for node in target.nodes for t in node.inputs if hasattr(t, "values")}
    matrices = [name for name, values in before.items() if values.dtype == np.float32 and values.ndim == 2]
    assert matrices and all(np.array_equal(after[name], before[name] + 1) for name in matrices)
    rest = set(before) - set(matrices)
    assert all(np.array_equal(after[name], before[name]) for name in rest)  # sizes and tables of positions stay


# -- latency -----------------------------------------------------------------------------------------------------------


class Clock:
    """Times networks by a rule: a fifth is fixed, and two axes together save less than their product says."""

    def __init__(self, table):
        self.table, self.timed = table, []

    def merged(self, levels):
        self.levels = levels
        return load(FOLDER / "resnet20_digits.onnx")

    def rule(self, levels):
        return 0.2 + 0.8 * self.table.cost(levels) / self.table.cost((0, 0, 0))

    def compare(self, path):
        assert path.exists()
        self.timed.append(self.levels)
        share = self.rule(self.levels)
        return LatencyFigures(10.0, 10.0 * share, 1 / share, 1 / share, 1 / share, 9)


def test_latency_is_estimated_from_the_axes_and_measured_where_it_counts(tmp_path):
    sizes = tuple(float(size) for size in np.linspace(1.0, 0.5, 11))
    grid = np.array(sizes)
    macs = CostTable((sizes, sizes, (1.0,)), 1e6 * grid[:, None, None] * grid[None, :, None] ** 2, 1e6)
    clock = Clock(macs)

    def read(resume, run="this"):
        kept = Measurements(tmp_path / "latency.json", run, resume=resume)
        return LatencyTable(macs, clock.merged, clock.compare, kept, lambda line: None)

    found = read(True)
    assert len(clock.timed) == 9  # five levels of two axes; the original is one of both
    assert found.original_ms == 10.0
    assert found.table.cost((10, 0, 0)) == pytest.approx(6.0 * (1 + MARGIN))
    assert found.table.cost((5, 0, 0)) == pytest.approx(8.0 * (1 + MARGIN))
    # Between them along the logarithm of the MACs.
    assert found.table.cost((6, 0, 0)) == pytest.approx(10 * (0.2 + 0.8 * 0.7) * (1 + MARGIN), rel=0.01)
    alone = [found.table.cost(levels) for levels in [(0, 10, 0), (5, 0, 0)]]
    expected, product = found.table.cost((10, 10, 0)), found.table.cost((9, 9, 0))
    measured = found.measured((10, 10, 0))
    assert measured > expected and found.table.cost((10, 10, 0)) == pytest.approx(measured)
    # Near to it the product is off by about as much, on the axes it was measured.
    true = clock.rule((9, 9, 0)) * 10 * (1 + MARGIN)
    assert abs(found.table.cost((9, 9, 0)) - true) < 0.5 * abs(product - true)
    assert [found.table.cost(levels) for levels in [(0, 10, 0), (5, 0, 0)]] == pytest.approx(alone, rel=0.01)
    count_of = len(clock.timed)
    again = read(True)
    assert len(clock.timed) == count_of and again.original_ms == 10.0
    read(False)
    assert len(clock.timed) == count_of + 9
    read(True, "another")
    assert len(clock.timed) == count_of + 18
    (tmp_path / "latency.json").write_text('{"run": "another", "figures": [1, 2')
    with pytest.raises(RecipeError, match=r"latency\.json cannot be read .*--no-resume starts anew"):
        read(True)


def test_macs_of_a_file_whose_sizes_hide_are_those_of_the_prepared_graph(tmp_path):
    rng = np.random.default_rng(0)
    hidden = model(
        "g (float[N,1,8,8] x) => (float[N,4] y) { f = Cast<to=1>(p) q = Cast<to=7>(f) a = Pad(x, q) b = Conv(a, w) "
        "c = GlobalAveragePool(b) y = Flatten(c) }",
        p=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        w=rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
    )
    save(load(hidden), tmp_path / "hidden.onnx")
    graph = load(hidden)
    infer_shapes(graph)
    assert not count(graph).exact
    options = ScaleOptions(data="x", val="x", goal=Goal("macs", 0.5, True))
    with Given(tmp_path / "hidden.onnx", options) as given:
        assert (given.figures.macs, given.figures.macs_exact) == (4 * 9 * 64, True)
