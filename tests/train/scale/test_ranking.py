"""Which blocks go first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcompress import models
from onnxcompress.channels.options import Goal
from onnxcompress.cost import count
from onnxcompress.errors import RecipeError
from onnxcompress.train.cached_runs import CachedRuns
from onnxcompress.train.scale import ranking
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.options import ScaleOptions
from onnxcompress.train.scale.ranking import _error, rank_blocks, residual_blocks
from onnxcompress.train.settings import TrainSettings

pytest.importorskip("sklearn")

RESNET = Path(models.__file__).parent / "resnet20_digits.onnx"


@pytest.fixture(params=["fits", "probes"])
def given(request):
    options = ScaleOptions(
        data="sklearn:digits:train",
        val="sklearn:digits",
        goal=Goal("macs", 0.5, True),
        depth_ranking=request.param,
        calibration=64,
        limit=300,
        training=TrainSettings(device="cpu"),
    )
    with Given(RESNET, options) as found:
        yield found


@pytest.mark.parametrize("given", ["fits"], indirect=True)  # to a probe another block may do harm
def test_a_block_that_does_nothing_goes_first(given):
    blocks, whole = residual_blocks(given.graph)
    assert len(blocks) == 7 and whole == 9  # two change the shape
    idle = next(block for block in blocks if block.add == "stages.1.1/Add")
    norm = next(node for node in given.graph.nodes if node.op == "BatchNormalization" and node.name in idle.nodes[-3:])
    for tensor in norm.inputs[1:3]:
        tensor.values = np.zeros_like(tensor.values)
    runs, first = [], str(given.graph.nodes[0].outputs[0].name)
    given.original.edit(first, lambda tensor: runs.append(1) or tensor)
    order = rank_blocks(given, blocks, 0.5 * count(given.graph).macs, lambda line: None)
    assert order[0] is idle
    assert len(runs) == len(given.calibration) > 0, "the original runs once, however many blocks are tried"


@pytest.mark.parametrize("given", ["fits"], indirect=True)
def test_the_front_that_tries_share_changes_nothing(given, monkeypatch):
    blocks, _ = residual_blocks(given.graph)
    seen = []

    def recorded(runs, original):
        seen.append(_error(runs, original))
        return seen[-1]

    monkeypatch.setattr(ranking, "_error", recorded)
    order = rank_blocks(given, blocks, 0.5 * count(given.graph).macs, lambda line: None)
    shared = seen.copy()
    seen.clear()
    monkeypatch.setattr(CachedRuns, "keep", lambda self, moving: None)
    assert rank_blocks(given, blocks, 0.5 * count(given.graph).macs, lambda line: None) == order
    assert [order.index(block) for block in sorted(order, key=lambda block: block.nodes)] != list(range(len(order)))
    assert len(order) > 2 and seen == pytest.approx(shared, rel=1e-6)  # measured 0


def test_no_more_blocks_go_than_the_goal_needs(given):
    blocks, _ = residual_blocks(given.graph, skip=["stages.0.0/*"])
    assert len(blocks) == 6
    whole = count(given.graph).macs
    order = rank_blocks(given, blocks, 0.6 * whole, lambda line: None)
    left = whole - np.cumsum([block.macs for block in order])
    assert left[-1] <= 0.6 * whole < left[-2]
    assert rank_blocks(given, blocks, 0.6 * whole, lambda line: None) == order


@pytest.mark.parametrize("given", ["fits"], indirect=True)
def test_a_pattern_that_fits_nothing_is_refused(given):
    with pytest.raises(RecipeError, match=r"'encoder\*' is the name or kind of no residual block; there are 9"):
        residual_blocks(given.graph, only=["encoder*"])
