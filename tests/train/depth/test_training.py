"""Ramps, the sandwich rule, progressive training and scores, on a network of two residual blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from onnxcompress.data import Dataset
from onnxcompress.errors import RecipeError
from onnxcompress.model_io import load
from onnxcompress.testing import model
from onnxcompress.train.batches import Batches
from onnxcompress.train.batchnorm import settle_statistics
from onnxcompress.train.depth.blocks import find_blocks, without_overlaps
from onnxcompress.train.depth.preparation import prepare
from onnxcompress.train.depth.scoring import Judge, SubnetScorer
from onnxcompress.train.depth.supernet import Supernet, build_pruned, build_supernet
from onnxcompress.train.depth.training import (
    Lambdas,
    Ramp,
    Sandwich,
    settled,
    train_progressively,
    train_supernet,
)
from onnxcompress.train.loop import Evaluation
from onnxcompress.train.losses import LossSettings, WeightedSum
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.metrics import find_metric

RNG = np.random.default_rng(0)
TEXT = """g (float[N,4,6,6] x) => (float[N,3] y) {
    a1 = Conv<pads=[1,1,1,1]>(x, w1)  b1 = BatchNormalization(a1, s1, o1, m1, v1)  r1 = Relu(b1)
    a2 = Conv<pads=[1,1,1,1]>(r1, w2)  e1 = Add(a2, x)  f1 = Relu(e1)
    a3 = Conv<pads=[1,1,1,1]>(f1, w3)  r3 = Relu(a3)
    a4 = Conv<pads=[1,1,1,1]>(r3, w4)  e2 = Add(a4, f1)  f2 = Relu(e2)
    p = GlobalAveragePool(f2)  q = Flatten(p)  y = Gemm(q, head)
}"""
WEIGHTS = {f"w{i}": RNG.normal(size=(4, 4, 3, 3)).astype(np.float32) * 0.3 for i in (1, 2, 3, 4)}
WEIGHTS |= {name: np.full(4, value, np.float32) for name, value in (("s1", 1), ("o1", 0), ("m1", 0), ("v1", 1))}
WEIGHTS["head"] = RNG.normal(size=(4, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    graph = prepare(load(model(TEXT, **WEIGHTS)))
    return build_supernet(graph, without_overlaps(find_blocks(graph)[0]))


@pytest.fixture
def batches() -> Batches:
    x = RNG.normal(size=(96, 4, 6, 6)).astype(np.float32)
    labels = x[:, :3].mean(axis=(2, 3)).argmax(axis=1)
    return Batches(Dataset([{"x": row} for row in x], labels), 16)


OBJECTIVE = WeightedSum(LossSettings(), "y")
SETTINGS = TrainSettings(steps=6, batch=16, device="cpu")


def twin_of(supernet: Supernet) -> tuple[TorchGraph, Lambdas]:
    twin = TorchGraph(supernet.graph)
    return twin, Lambdas(twin, supernet.lambdas)


def feeds_of(batches: Batches) -> list[dict[str, torch.Tensor]]:
    return [dict(batch.feeds) for batch in batches.ordered()]


def test_a_ramp_goes_from_0_to_1_and_stays():
    linear, cosine = Ramp(0.5), Ramp(0.5, "cosine")
    assert [linear.at(step, 8) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [round(cosine.at(step, 8), 3) for step in range(5)] == [0, 0.146, 0.5, 0.854, 1]
    assert linear.kept_from(8) == 5  # the weights after the fifth step, the first with lambda 1
    assert Ramp(0).at(0, 8) == 1 and Ramp(0).kept_from(8) == 0
    assert Ramp(0.9).steps(3) == 2 and Ramp(0.9).kept_from(3) == 3  # the last step is always of the pruned network


@pytest.mark.parametrize(("wish", "text"), [((1.0,), "ramp 1"), ((0.5, "square"), "ramp shape 'square' is unknown")])
def test_bad_ramps_are_refused(wish, text):
    with pytest.raises(RecipeError, match=text):
        Ramp(*wish)


def test_lambdas_choose_the_network(supernet, batches):
    twin, lambdas = twin_of(supernet)
    feeds = feeds_of(batches)[0]
    names = [block.name for block in supernet.blocks]
    for bits in ("00", "10", "01", "11"):
        lambdas.set_bits(bits)
        chosen = [name for name, bit in zip(names, bits, strict=True) if bit == "1"]
        pruned = TorchGraph(build_pruned(supernet, supernet.blocks, chosen))
        expected, found = pruned(feeds)["y"], twin(feeds)["y"]
        assert (expected - found).abs().max() <= 2e-6 * expected.abs().max()  # measured 2.4e-7
    assert not any(name in dict(twin.named_parameters()) for name in supernet.lambdas.values())


def test_the_sandwich_adds_the_gradients_of_three_passes(supernet, batches):
    twin, lambdas = twin_of(supernet)
    batch = next(batches.at(0))
    rule = Sandwich(OBJECTIVE, lambdas, seed=1)
    rule.on_step(3, 10)
    expected = torch.zeros(4, 4, 3, 3)
    twin.eval()
    for bits in ("00", rule.bits(3), "11"):
        lambdas.set_bits(bits)
        expected += torch.autograd.grad(OBJECTIVE(twin, batch), twin.get_parameter("w1"))[0]
    for loss in rule(twin, batch):
        loss.backward()
    found = twin.get_parameter("w1").grad
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_random_subnets_of_a_sandwich_vary_with_the_step_and_the_seed(supernet):
    lambdas = twin_of(supernet)[1]
    bits = [Sandwich(OBJECTIVE, lambdas, seed).bits(step) for seed, step in itertools.product(range(2), range(40))]
    assert set(bits) == {"00", "01", "10", "11"}
    assert bits[:40] != bits[40:]


def test_supernet_training_improves_the_pruned_flow(supernet, batches):
    twin, lambdas = twin_of(supernet)

    def loss() -> float:
        lambdas.set_all(1.0)
        twin.eval()
        settle_statistics(twin, feeds_of(batches))
        with torch.no_grad():
            return float(torch.stack([OBJECTIVE(twin, batch) for batch in batches.ordered()]).mean())

    before = loss()
    settings = TrainSettings(steps=40, batch=16, learning_rate=5e-3, device="cpu")
    result = train_supernet(twin, lambdas, batches, OBJECTIVE, settings)
    assert result.steps == 40 and loss() < 0.8 * before


def test_weights_from_within_the_ramp_are_never_kept(supernet, batches):
    twin, lambdas = twin_of(supernet)
    seen = []

    def falling(trained: nn.Module) -> float:
        seen.append((lambdas.values[lambdas.blocks[0]], trained.get_parameter("w1").detach().clone()))
        return -float(len(seen))  # the first would be the best

    result = train_progressively(
        twin,
        lambdas,
        batches,
        OBJECTIVE,
        TrainSettings(steps=6, batch=16, eval_every=1, device="cpu"),
        ramp=Ramp(0.5),
        evaluation=Evaluation(falling),
    )
    assert [round(value, 3) for value, _ in seen] == [0, 0, 0.333, 0.667, 1, 1, 1]
    assert result.best_step == 4
    assert torch.equal(twin.get_parameter("w1"), seen[4][1])
    assert set(lambdas.values.values()) == {1.0}


def test_without_a_ramp_the_weights_pruned_at_once_count(supernet, batches):
    twin, lambdas = twin_of(supernet)
    before = twin.get_parameter("w1").detach().clone()
    evaluation = Evaluation(lambda trained: -1.0)
    result = train_progressively(twin, lambdas, batches, OBJECTIVE, SETTINGS, ramp=Ramp(0), evaluation=evaluation)
    assert result.best_step == 0 and torch.equal(twin.get_parameter("w1"), before)


def test_statistics_are_settled_before_an_evaluation(supernet, batches):
    twin, lambdas = twin_of(supernet)
    lambdas.set_all(1.0)
    mean = twin.get_buffer("m1").clone()
    held = settled(Evaluation(lambda model: float(model.get_buffer("m1").sum())), feeds_of(batches))
    assert held.function(twin) != float(mean.sum())
    values = torch.cat([twin(feeds, ["a1"])["a1"] for feeds in feeds_of(batches)])
    assert torch.allclose(twin.get_buffer("m1"), values.mean(dim=(0, 2, 3)), atol=1e-6)


def scorer_of(supernet, batches, **wishes) -> SubnetScorer:
    judge = Judge(find_metric("mse"), "y", np.eye(3, dtype=np.float32)[batches.labels.numpy()])
    twin = TorchGraph(supernet.graph)
    return SubnetScorer(twin, supernet.lambdas, feeds_of(batches)[:3], feeds_of(batches), judge, **wishes)


def scores_of(scorer: SubnetScorer, wanted: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    with scorer:
        scorer(wanted, found.update)
    return found


def test_scores_are_negative_where_lower_is_better_and_differ(supernet, batches):
    found = scores_of(scorer_of(supernet, batches, jobs=1), ["00", "01", "10", "11"])
    assert len(set(found.values())) == 4 and max(found.values()) < 0


def test_processes_give_the_scores_of_one(supernet, batches):
    wanted = ["00", "01", "10", "11"]
    alone = scores_of(scorer_of(supernet, batches, jobs=1), wanted)
    assert scores_of(scorer_of(supernet, batches, jobs=2), wanted) == alone


def test_a_score_does_not_depend_on_the_one_before(supernet, batches):
    scorer = scorer_of(supernet, batches, jobs=1)
    assert scores_of(scorer, ["11", "01"])["01"] == scores_of(scorer_of(supernet, batches, jobs=1), ["01"])["01"]


def test_scoring_leaves_the_supernet_as_it_was(supernet, batches):
    scorer = scorer_of(supernet, batches, jobs=1)
    before = {name: value.detach().clone() for name, value in scorer.twin.named_parameters()}
    scores_of(scorer, ["11"])
    assert all(torch.equal(value, before[name]) for name, value in scorer.twin.named_parameters())
