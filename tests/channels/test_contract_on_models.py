"""Every committed model: a third of each group removed gives what zeros in these channels give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.channels.groups import MacsModel, find_channels, share
from onnxcompress.channels.preparing import prepare
from onnxcompress.channels.removing import remove_and_zero
from onnxcompress.cost import count
from onnxcompress.model_io import load, to_proto
from onnxcompress.runtime import Runtime
from onnxcompress.testing import assert_equivalent, graph_of, inputs_for, relative_error, run

MODELS = sorted((Path(__file__).parents[2] / "models").glob("*.onnx"))


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60) as made:
        yield made


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_pruned_equals_zeroed(path, runtime):
    base = to_proto(prepare(load(path), runtime))
    copy = onnx.ModelProto()
    copy.CopyFrom(base)
    channels = find_channels(graph_of(copy))
    assert share(channels) > 0.93  # all but what the head gives
    rng = np.random.default_rng(1)
    removed = {
        group.name: sorted(rng.choice(group.size, max(1, group.size // 3), replace=False).tolist())
        for group in channels.groups
        if not group.frozen
    }
    pruned, zeroed = remove_and_zero(base, removed)
    onnx.checker.check_model(pruned)
    feeds = [inputs_for(base, sizes={"batch": 2})]
    assert_equivalent(zeroed, pruned, rel=5e-6, feeds=feeds)  # measured 5.6e-7: sums in another order
    exact = {name: chosen for name, chosen in removed.items() if not channels.by_name[name].approximate}
    assert_equivalent(*remove_and_zero(base, exact, makers_alone=True)[::-1], rel=5e-6, feeds=feeds)
    assert count(graph_of(pruned)).macs == pytest.approx(MacsModel(channels).macs(removed), rel=1e-9)
    assert relative_error(run(base, feeds[0])[0], run(pruned, feeds[0])[0]) > 1e-3


def test_attention_heads_and_their_places_are_groups_of_their_own(runtime):
    path = next(path for path in MODELS if path.stem == "deit_mini_digits")
    channels = find_channels(prepare(load(path), runtime))
    found = [(group.size, group.width) for group in channels.groups if not group.frozen][:4]
    # The stream; heads; places in q, k and v of all heads; the perceptron between.
    assert found == [(24, 1), (2, 36), (12, 6), (48, 1)]
