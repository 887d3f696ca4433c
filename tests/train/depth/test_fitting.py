"""Fits of pruned blocks: optimal by the gradient, as good as they say, kept by BatchNormalization and by the mix."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onnxcompress import models
from onnxcompress.data import InputSpec, load_data
from onnxcompress.model_io import load
from onnxcompress.testing import model
from onnxcompress.train.batchnorm import settle_statistics
from onnxcompress.train.cached_runs import CachedRuns
from onnxcompress.train.depth.blocks import find_blocks, without_overlaps
from onnxcompress.train.depth.fitting import fit_blocks, fit_supernet
from onnxcompress.train.depth.preparation import prepare
from onnxcompress.train.depth.supernet import Supernet, build_supernet
from onnxcompress.train.depth.training import Lambdas
from onnxcompress.train.torch_graph import TorchGraph

pytest.importorskip("sklearn")

FOLDER = Path(models.__file__).parent
# Kind of the blocks, network, preferred kind at a place; accuracy on 400 other digits with all of these blocks pruned,
# statistics settled, and with fits, both as measured. The tests ask for half of the gain.
CASES = {
    "inverted-residual": ("mobilenetv2_mini", "basic-3x3", 0.398, 0.843),
    "run": ("mobilenetv2_mini", "basic-3x3", 0.755, 0.928),
    "convnext": ("convnext_mini", "basic-3x3", 0.453, 0.743),
    "ffn": ("deit_mini", "basic-3x3", 0.143, 0.910),
    "basic": ("resnet20", "basic", 0.850, 0.975),
    "basic-3x3": ("resnet20", "basic-3x3", 0.125, 0.675),
}


def digits(source: str, count: int) -> tuple[list[dict[str, torch.Tensor]], np.ndarray]:
    data = load_data(source, inputs=[InputSpec("image", np.dtype(np.float32), ("batch", 1, 8, 8))], limit=count)
    feeds = [{name: torch.from_numpy(value) for name, value in feed.items()} for feed, _ in data.batches(100)]
    return feeds, data.labels


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, torch.Tensor]]:
    return digits("sklearn:digits:train", 300)[0]


def supernet_of(kind: str) -> Supernet:
    name, prefer, _, _ = CASES[kind]
    graph = prepare(load(FOLDER / f"{name}_digits.onnx"))
    blocks = without_overlaps(find_blocks(graph)[0], prefer=(prefer,) if prefer != "basic" else ())
    return build_supernet(graph, [block for block in blocks if block.kind == kind])


def original_of(supernet: Supernet) -> TorchGraph:
    return TorchGraph(supernet.original, trainable=lambda name: False)


def pruned_twin(supernet: Supernet) -> tuple[TorchGraph, Lambdas]:
    twin = TorchGraph(supernet.graph).eval()
    lambdas = Lambdas(twin, supernet.lambdas)
    return twin, lambdas


def accuracy(twin: TorchGraph) -> float:
    feeds, labels = digits("sklearn:digits", 400)
    with torch.no_grad():
        found = np.concatenate([twin(feed)["logits"].argmax(1).numpy() for feed in feeds])
    return float((found == labels).mean())


def end_of(supernet: Supernet, block) -> str:
    """The tensor in front of an activation that the pruned flow has at the block's end."""
    made = {str(t.name): node for node in supernet.graph.nodes for t in node.outputs}
    output = made[block.output]
    if not block.add:
        # A run ends in (1 - l) * inner + l * act(inner).
        while output.op in ("Add", "Mul"):
            output = made[str(output.inputs[0].name)]
        return str(output.outputs[0].name)
    return str(next(node for node in supernet.graph.nodes if node.name == block.add).outputs[0].name)


def squared_error(twin, supernet, block, calibration):
    """Sum over samples of ||Y - Y'||^2, and of ||Y - mean||^2, channels on axis 1 or the last."""
    original, end = original_of(supernet), end_of(supernet, block)
    wanted = torch.cat([original(feed, [block.output])[block.output] for feed in calibration])
    found = torch.cat([twin(feed, [end])[end] for feed in calibration])
    channels = wanted.shape.index(supernet_channels(supernet, block), 1)
    others = [axis for axis in range(wanted.dim()) if axis != channels]
    return (wanted - found).square().sum(), (wanted - wanted.mean(others, keepdim=True)).square().sum()


def supernet_channels(supernet: Supernet, block) -> int:
    shape = block.output_shape
    return int(shape[-1] if len(shape) == 3 else shape[1])


@pytest.mark.parametrize("kind", CASES)
def test_a_fit_is_the_best_there_is_and_says_how_good(kind, calibration):
    supernet = supernet_of(kind)
    block = supernet.blocks[-1]
    supernet = build_supernet(supernet.original, [block])
    twin, lambdas = pruned_twin(supernet)
    lambdas.prune([block.name])
    settle_statistics(twin, calibration)
    before, spread = squared_error(twin, supernet, block, calibration)
    names = [name for name, _ in twin.named_parameters()]
    steep = gradient(twin, supernet, block, calibration)

    fits = fit_blocks(twin, supernet, original_of(supernet), calibration, lambdas=lambdas, settle=False)
    # Statistics were settled before the fit alone, so that the error is that of the numbers that were fitted.
    fit = fits[0]
    assert not fit.reason and fit.name == block.name
    after, _ = squared_error(twin, supernet, block, calibration)
    assert names == [name for name, _ in twin.named_parameters()]
    assert fit.before == pytest.approx(math.sqrt((before / spread).item()), rel=2e-3)
    assert fit.after == pytest.approx(math.sqrt((after / spread).item()), rel=2e-3)
    assert fit.after < 0.97 * fit.before
    flat = gradient(twin, supernet, block, calibration)
    changed = [name for name in steep if steep[name].norm() > 0]
    last = max(changed, key=lambda name: float(steep[name].norm() / flat[name].norm().clamp(min=1e-12)))
    assert flat[last].norm() < 0.05 * steep[last].norm()


def gradient(twin, supernet, block, calibration):
    twin.zero_grad()
    squared_error(twin, supernet, block, calibration)[0].backward()
    return {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CASES)
def test_fitted_networks_are_better_than_settled_ones(kind, calibration):
    supernet = supernet_of(kind)
    twin, lambdas = pruned_twin(supernet)
    lambdas.set_all(1.0)
    settle_statistics(twin, calibration)
    settled = accuracy(twin)
    twin, lambdas = pruned_twin(supernet)
    fits = fit_blocks(twin, supernet, original_of(supernet), calibration, lambdas=lambdas)
    names = [block.name for block in supernet.blocks]
    assert [fit.name for fit in fits if fit.name in names] == names and not any(fit.reason for fit in fits)
    assert fits[-1].name == "logits"
    expected, with_fits = CASES[kind][2:]
    assert settled == pytest.approx(expected, abs=0.05)
    assert accuracy(twin) > (expected + with_fits) / 2


@pytest.mark.parametrize("kind", CASES)
def test_keeping_the_front_changes_no_number(kind, calibration, monkeypatch):
    supernet = supernet_of(kind)
    found = []
    for _ in ("kept", "run whole each time"):
        twin, lambdas = pruned_twin(supernet)
        fits = fit_blocks(twin, supernet, original_of(supernet), calibration, lambdas=lambdas)
        mixed, alone = fit_supernet(supernet, original_of(supernet), calibration)
        both = TorchGraph(mixed.graph).state_dict()
        found.append((fits, alone, twin.state_dict(), both))
        monkeypatch.setattr(CachedRuns, "keep", lambda self, moving: None)
    (fits, alone, *states), (other_fits, other_alone, *others) = found
    assert len(fits) > len(supernet.blocks) and len(alone) == len(supernet.blocks)
    for mine, other in zip((*fits, *alone), (*other_fits, *other_alone), strict=True):
        assert (mine.name, mine.reason) == (other.name, other.reason)
        assert mine.after == pytest.approx(other.after, rel=1e-5, nan_ok=True)  # measured 0
    for state, other in zip(states, others, strict=True):
        assert state.keys() == other.keys()
        for name, tensor in state.items():
            assert torch.allclose(tensor, other[name], rtol=1e-3, atol=1e-5 * float(tensor.abs().max())), name


def test_the_batchnormalization_behind_a_fit_holds_the_statistics_of_what_it_reads(calibration):
    supernet = supernet_of("inverted-residual")
    supernet = build_supernet(supernet.original, supernet.blocks[:1])
    twin, lambdas = pruned_twin(supernet)
    fit_blocks(twin, supernet, original_of(supernet), calibration, lambdas=lambdas, settle=False)
    norm = [norm for norm in twin.batch_normalizations if norm.node in supernet.blocks[0].nodes][-1]
    source = next(str(n.inputs[0].name) for n in supernet.graph.nodes if n.name == norm.node)
    with torch.no_grad():
        read = torch.cat([twin(feed, [source])[source] for feed in calibration])
    mean, variance = twin.get_buffer(norm.mean), twin.get_buffer(norm.variance)
    assert torch.allclose(mean, read.mean((0, 2, 3)), atol=1e-5)  # measured 1e-7
    assert torch.allclose(variance, read.var((0, 2, 3), correction=0), rtol=1e-4)  # measured 2e-6


def test_a_fitted_supernet_is_the_original_at_0_and_fitted_at_1(calibration):
    for kind in ("run", "ffn", "basic-3x3"):
        supernet = supernet_of(kind)
        supernet = build_supernet(supernet.original, supernet.blocks[:1])
        original = original_of(supernet)
        mixed, fits = fit_supernet(supernet, original, calibration)
        assert not any(fit.reason for fit in fits)
        both, lambdas = pruned_twin(mixed)
        feed, end = calibration[0], supernet.blocks[0].output
        with torch.no_grad():
            expected = original(feed)["logits"]
            assert (both(feed)["logits"] - expected).abs().max() / expected.abs().max() < 1e-5  # measured 5e-7
            twin, ones = pruned_twin(supernet)
            fit_blocks(twin, supernet, original, calibration, lambdas=ones)
            lambdas.set_all(1.0)
            settle_statistics(both, calibration)
            wanted, found = (one(feed, [end])[end] for one in (twin, both))
        assert (found - wanted).abs().max() / wanted.abs().max() < 1e-4  # measured 2e-6


TEXT = """g (float[N,4,6,6] x) => (float[N,4,6,6] y) {{
    a1 = Conv<pads=[1,1,1,1]>(x, w1)  r1 = Relu(a1)
    a2 = Conv<pads=[1,1,1,1]{group}>(r1, {second})  {end}
}}"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEXT.format(group=",group=2", second="half", end="y = Add(a2, x)"), "its last Conv has 2 groups"),
        (
            TEXT.format(group="", second="w2", end="e = Add(a2, x)  z = Conv<pads=[1,1,1,1]>(e, w2)  y = Relu(z)"),
            "the weight of its last linear operator is no parameter of its own",
        ),
        (TEXT.format(group="", second="w2", end="y = Add(a2, x)"), ""),
    ],
)
def test_what_cannot_be_fitted_says_why_and_stays(text, reason):
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 4, 3, 3), "w2": (4, 4, 3, 3), "half": (4, 2, 3, 3)}
    weights = {name: rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items() if name in text}
    graph = prepare(load(model(text, **weights)))
    supernet = build_supernet(graph, without_overlaps(find_blocks(graph)[0], prefer=()))
    feeds = [{"x": torch.from_numpy(rng.normal(size=(16, 4, 6, 6)).astype(np.float32))} for _ in range(4)]
    twin, lambdas = pruned_twin(supernet)
    start = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    fits = fit_blocks(twin, supernet, original_of(supernet), feeds, lambdas=lambdas)
    assert fits[0].reason == reason
    assert all(torch.equal(tensor, start[name]) for name, tensor in twin.state_dict().items()) == bool(reason)


def test_a_kept_block_with_auto_pad_is_fitted():
    """The second block stays, and its last kernel of 3x3 pads by itself."""
    rng = np.random.default_rng(1)
    text = """g (float[N,4,6,6] x) => (float[N,4,6,6] y) {
        a1 = Conv<pads=[1,1,1,1]>(x, w1)  r1 = Relu(a1)  a2 = Conv<pads=[1,1,1,1]>(r1, w2)  e = Add(a2, x)
        a3 = Conv<auto_pad="SAME_UPPER">(e, w3)  r3 = Relu(a3)  a4 = Conv<auto_pad="SAME_UPPER">(r3, w4)  y = Add(a4, e)
    }"""
    weights = {f"w{i}": rng.normal(size=(4, 4, 3, 3)).astype(np.float32) * 0.3 for i in (1, 2, 3, 4)}
    graph = prepare(load(model(text, **weights)))
    blocks = without_overlaps(find_blocks(graph)[0], prefer=())
    supernet = build_supernet(graph, blocks[:1])
    feeds = [{"x": torch.from_numpy(rng.normal(size=(16, 4, 6, 6)).astype(np.float32))} for _ in range(4)]
    twin, lambdas = pruned_twin(supernet)
    fits = fit_blocks(twin, supernet, original_of(supernet), feeds, lambdas=lambdas)
    assert len(fits) == 2 and all(fit.after < 0.9 * fit.before and not fit.reason for fit in fits)


def test_blocks_side_by_side_are_fitted_as_if_nothing_was_kept(monkeypatch):
    """The second block is pruned after the first was fitted, and begins in front of it; its statistics settle last."""
    rng = np.random.default_rng(2)
    text = """g (float[N,4,6,6] x) => (float[N,4,6,6] y) {
        a1 = Conv<pads=[1,1,1,1]>(x, w1)  r1 = Relu(a1)
        a3 = Conv<pads=[1,1,1,1]>(x, w3)  r3 = Relu(a3)
        a2 = Conv<pads=[1,1,1,1]>(r1, w2)  e = Add(a2, x)
        a4 = Conv<pads=[1,1,1,1]>(r3, w4)  f = Add(a4, x)
        s = Add(e, f)  y = BatchNormalization(s, one, one, one, one)
    }"""
    weights = {f"w{i}": rng.normal(size=(4, 4, 3, 3)).astype(np.float32) * 0.3 for i in (1, 2, 3, 4)}
    graph = prepare(load(model(text, **weights, one=np.ones(4, np.float32))))
    supernet = build_supernet(graph, without_overlaps(find_blocks(graph)[0], prefer=()))
    feeds = [{"x": torch.from_numpy(rng.normal(size=(16, 4, 6, 6)).astype(np.float32))} for _ in range(4)]
    states = []
    for _ in ("kept", "run whole each time"):
        twin, lambdas = pruned_twin(supernet)
        fits = fit_blocks(twin, supernet, original_of(supernet), feeds, lambdas=lambdas)
        assert len(fits) == 2 and not any(fit.reason for fit in fits)
        states.append({name: tensor.clone() for name, tensor in twin.state_dict().items()})
        settle_statistics(twin, feeds)
        states.append(twin.state_dict())
        monkeypatch.setattr(CachedRuns, "keep", lambda self, moving: None)
    for other in states[1:]:
        assert all(torch.allclose(tensor, other[name], rtol=1e-5) for name, tensor in states[0].items())  # measured 0


def test_a_deleted_block_has_nothing_to_fit(calibration):
    graph = supernet_of("basic").original
    block = next(block for block in find_blocks(graph)[0] if block.deletable)
    supernet = build_supernet(graph, [replace(block, kind="residual")])
    twin, lambdas = pruned_twin(supernet)
    first, *others = fit_blocks(twin, supernet, original_of(supernet), calibration, lambdas=lambdas)
    assert first.reason == "nothing is left of it" and lambdas.values == {block.name: 1.0}
    # What follows makes up for it: blocks that stay as they are, and the classifier.
    assert len(others) == 9 and all(fit.after < fit.before and not fit.reason for fit in others)
