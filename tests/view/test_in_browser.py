"""Original and result side by side, in a browser."""

import onnx
import pytest

from onnxcompress import models, optimize
from onnxcompress.view import Viewer
from tests.deployment import browser

pytest.importorskip("netron")

DRAWN = "[...document.querySelectorAll('iframe')].filter(f => f.contentWindow.__view__?.target?.marked).length === 2"
IN_PANES = "[...document.querySelectorAll('iframe')].map(f => {})"
SELECTED = IN_PANES.format("[...(f.contentWindow.__view__.target.selection)].map(one => one.value?.name)")
# Whether the selected node is where the pane can show it.
VISIBLE = IN_PANES.format(
    "[...f.contentDocument.querySelectorAll('g.node.select')].map(one => one.getBoundingClientRect())"
    ".filter(box => box.top >= 0 && box.bottom <= f.contentWindow.innerHeight).length"
)


@pytest.mark.slow
def test_original_and_result_side_by_side(tmp_path):
    if browser.program() is None:
        pytest.skip("Chromium is not installed")
    original, result = models.path("digits"), tmp_path / "digits.optimized.onnx"
    optimize(original, result, measure_latency=False)
    counts = [len(onnx.load(model).graph.node) for model in (original, result)]
    with Viewer([original, result]) as viewer, browser.Browser() as page:
        page.open(viewer.url)
        page.wait_for(DRAWN)
        assert page.evaluate(IN_PANES.format("f.contentDocument.title")) == [original.name, result.name]
        drawn = page.evaluate(IN_PANES.format("f.contentWindow.__view__.target.target.nodes.length"))
        assert drawn == counts
        # What is gone is marked on the left, what is new on the right, what changed on both sides.
        marked = IN_PANES.format("f.contentDocument.querySelectorAll('[data-status={}]').length")
        assert [page.evaluate(marked.format(status)) for status in ("gone", "new", "changed")] == [
            [32, 0],
            [0, 5],
            [2, 2],
        ]
        assert page.evaluate("document.querySelectorAll('#nodes button').length") == len(viewer.changes) == 39
        # A click shows the node: in both panes where it changed.
        last = [number for number, one in enumerate(viewer.changes) if one.status == "changed"][-1]
        name = viewer.changes[last].name
        page.evaluate(f"document.querySelectorAll('#nodes button')[{last}].click()")
        assert page.evaluate(SELECTED) == [[name], [name]]
        page.wait_for(f"({VISIBLE}).join() === '1,1'")
        assert page.evaluate("document.getElementById('said').textContent") == ""
        # The filter finds nodes by the pass that made them.
        page.evaluate("document.getElementById('filter').value = 'fuse-parallel-convs'; list()")
        assert page.evaluate("document.querySelectorAll('#nodes button').length") == 2
        page.evaluate("document.querySelectorAll('#nodes button')[1].click()")
        assert page.evaluate(SELECTED)[1] == [[c.name for c in viewer.changes if c.detail == "fuse-parallel-convs"][1]]
        page.wait_for(f"({VISIBLE})[1] === 1")
        assert not page.console
