"""``onnxcompress prune-scale``: what it makes of a file, and what it says when it cannot."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from onnxcompress import models
from onnxcompress.channels.options import Goal
from onnxcompress.cli import cli
from onnxcompress.cost import count
from onnxcompress.errors import OnnxCompressError, RecipeError
from onnxcompress.model_io import load, save
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import model, run
from onnxcompress.train.depth.offers import BudgetError
from onnxcompress.train.scale.axes import Ladders, count_all
from onnxcompress.train.scale.collecting import axis_points
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.laddering import kept_ladders
from onnxcompress.train.scale.making import prune, train_graph
from onnxcompress.train.scale.options import ScaleOptions, parse_axes
from onnxcompress.train.scale.pruning import Job, plan_scale, prune_scale
from onnxcompress.train.scale.ranking import residual_blocks
from onnxcompress.train.scale.space import Space
from onnxcompress.train.settings import TrainSettings

pytest.importorskip("sklearn")

FOLDER = Path(models.__file__).parent
RESNET = FOLDER / "resnet20_digits.onnx"
OPTIONS = ScaleOptions(
    data="sklearn:digits:train",
    val="sklearn:digits",
    goal=Goal("macs", 0.5, True),
    rounds=2,
    mixed=1,
    candidates=3,
    round_epochs=0.4,
    width_ranking="magnitude",
    depth_ranking="probes",
    calibration=128,
    training=TrainSettings(epochs=1, batch=64, learning_rate=1e-3, device="cpu"),
    jobs=1,
)


class Stop(Exception):
    """A run is stopped."""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A small ResNet at half of its MACs, along all three axes; the state is kept."""
    folder = tmp_path_factory.mktemp("pruned")
    said = []
    result = prune_scale(
        RESNET, folder / "out.onnx", replace(OPTIONS, checkpoint=folder / "state"), progress=said.append
    )
    return result, folder, said


def test_the_goal_is_kept_and_the_interface_is_the_same(pruned):
    result, folder, _ = pruned
    graph = load(folder / "out.onnx")
    infer_shapes(graph)
    assert count(graph).macs == result.figures_after.macs <= 0.5 * result.figures_before.macs
    before, after = onnx.load(RESNET).graph, onnx.load(folder / "out.onnx").graph
    assert [list(after.input), list(after.output)] == [list(before.input), list(before.output)]
    x = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    assert run(onnx.load(folder / "out.onnx"), {after.input[0].name: x})[0].shape == (5, 10)
    assert result.after > 0.9  # measured 0.965
    assert result.merge_error < 1e-5


def test_points_are_networks_of_their_cost(pruned):
    result, folder, _ = pruned
    decision = result.decision
    assert {point.axis for point in decision.points} == {"depth", "width", "resolution", "mixed"}
    for point in decision.points:
        graph = load(folder / "state" / f"{point.name}.onnx")
        infer_shapes(graph)
        assert count(graph).macs == point.macs
        assert point.cost == pytest.approx(point.macs / result.figures_before.macs)
        assert 0 < point.figure <= 1 and point.figure >= point.fitted
    for axis, fit in decision.fits.items():
        own = [point for point in decision.points if point.axis == axis]
        assert own[-1].cost <= 0.5 < own[0].cost  # in rounds, the last one at the goal
        assert fit.figures == (decision.base, *(point.figure for point in own))
    mixed = [point for point in decision.points if point.axis == "mixed"]
    assert len(mixed) == 1 and sum(map(bool, mixed[0].levels)) > 1 and mixed[0].cost <= 0.5
    assert decision.off_axis_error > 0
    assert decision.cost == pytest.approx(result.figures_after.macs / result.figures_before.macs)


def test_the_finalist_that_learned_most_is_taken(pruned):
    result, folder, _ = pruned
    decision, finalists = result.decision, result.finalists
    raced = decision.candidates
    assert len(raced) >= 3 and len({point.levels for point in raced}) == len(raced)
    assert [point.loss for point in raced] == sorted(point.loss for point in raced)
    assert all(point.cost <= 0.5 and point.loss > 0 for point in raced)
    off = next(point for point in decision.points if point.axis == "mixed")
    assert off in raced  # it was trained already
    ends = {[p for p in decision.points if p.axis == axis][-1].levels for axis in decision.fits}
    assert ends & {point.levels for point in raced}
    assert [point.levels for point in finalists] == [point.levels for point in raced[:2]]
    assert decision.chosen == min(finalists, key=lambda point: point.loss).levels
    names = {path.name for path in (folder / "state").glob("train-*")}
    assert names == {f"train-{'-'.join(map(str, point.levels))}" for point in finalists}
    assert result.training.total == 18 and {point.figure for point in finalists} >= {result.after}


def test_the_predictor_alone_decides_where_nothing_is_raced(tmp_path):
    options = replace(OPTIONS, axes=("depth", "width"), candidates=1, mixed=0, rounds=1)
    result = prune_scale(RESNET, tmp_path / "out.onnx", options)
    assert not result.decision.candidates and [p.levels for p in result.finalists] == [result.decision.chosen]


def test_the_report_holds_what_a_figure_of_the_fits_needs(pruned):
    plain = json.loads(json.dumps(pruned[0].as_dict()))["predictor"]
    assert [fit["axis"] for fit in plain["fits"]] == ["depth", "width", "resolution"]
    for fit in plain["fits"]:
        assert len(fit["sizes"]) == len(fit["figures"]) == 3 and len(fit["coefficients"]) == fit["degree"] + 1
        assert np.polynomial.polynomial.polyval(1.0, fit["coefficients"]) == pytest.approx(plain["base"])
    assert len(plain["check"]["axes"]) == 3 and plain["chosen"] and plain["points"][0]["name"] == "depth-3-0-0"


def test_progress_says_how_long_it_takes(pruned):
    said = [now for now in pruned[2] if now.total]
    assert said[0].total == 10 and said[-1].done == said[-1].total and said[-1].seconds_left == 0
    assert said[-1].total == 6 + len(pruned[0].decision.candidates)  # the mixed point is one of them
    assert all(now.seconds_left > 0 for now in said[2:9])  # neighbours of the best may follow


def test_a_stopped_run_goes_on_to_the_same_file(pruned, tmp_path):
    options = replace(OPTIONS, checkpoint=tmp_path / "state")

    def stop(now):
        if now.done == 3:
            raise Stop

    with pytest.raises(Stop):
        prune_scale(RESNET, tmp_path / "out.onnx", options, progress=stop)
    assert len(list((tmp_path / "state").glob("*.onnx"))) == 3 and not (tmp_path / "out.onnx").exists()

    def stop_training(now):
        if now.step == 9:
            raise Stop

    short = replace(options, training=replace(options.training, checkpoint_every=4))
    with pytest.raises(Stop):
        prune_scale(RESNET, tmp_path / "out.onnx", short, steps=stop_training)
    first = (tmp_path / "state" / "points.json").stat().st_mtime_ns
    result = prune_scale(RESNET, tmp_path / "out.onnx", short)
    assert (tmp_path / "state" / "points.json").stat().st_mtime_ns == first  # nothing was made again
    assert result.training.resumed_from == 8
    assert [p.figure for p in result.decision.points] == [p.figure for p in pruned[0].decision.points]
    assert (tmp_path / "out.onnx").read_bytes() == (pruned[1] / "out.onnx").read_bytes()
    with pytest.raises(RecipeError, match=r"are of another run: rounds was 2, now 3; --no-resume starts anew"):
        prune_scale(RESNET, tmp_path / "out.onnx", replace(short, rounds=3))


def test_processes_make_the_same_points(pruned, tmp_path):
    found = prune_scale(RESNET, tmp_path / "out.onnx", replace(OPTIONS, axes=("depth",), jobs=2))
    alone = [point.figure for point in pruned[0].decision.points if point.axis == "depth"]
    assert [point.figure for point in found.decision.points] == alone
    assert found.decision.off_axis_error is None  # there is one axis
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx"]


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("name", ["mobilenetv2_mini", "deit_mini"])
def test_blocks_that_read_one_another_go_in_any_order(name, step):
    options = replace(OPTIONS, calibration=64, limit=200)
    with Given(FOLDER / f"{name}_digits.onnx", options) as given:
        blocks, whole = residual_blocks(given.graph)
        pairs = [(a, b) for a, b in itertools.pairwise(blocks) if b.source == a.output]
        ladders = Ladders(blocks=pairs[0][::step], block_count=whole)
        first = prune(given, ladders, (1, 0, 0))
        second = prune(given, ladders, (2, 0, 0), held=first, at=(1, 0, 0))
        there = {node.name for node in second.nodes}
        assert not there & {name for block in pairs[0] for name in (block.add, *block.nodes)}
        table = count_all(given.graph, ladders, count(given.graph).macs)
        assert [count(graph).macs for graph in (first, second)] == [table.cost((n, 0, 0)) for n in (1, 2)]


@pytest.mark.slow
def test_a_dask_cluster_makes_the_same_file(tmp_path):
    distributed = pytest.importorskip("distributed")
    options = replace(OPTIONS, axes=("depth", "width"), rounds=1, candidates=2, finalists=1, limit=300)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        prune_scale(RESNET, tmp_path / "there.onnx", replace(options, dask=cluster.scheduler_address))
    prune_scale(RESNET, tmp_path / "here.onnx", options)
    assert (tmp_path / "there.onnx").read_bytes() == (tmp_path / "here.onnx").read_bytes()


def test_a_smaller_input_gives_the_same_as_a_resize_inside(tmp_path):
    chosen = (0, 0, 1)
    goal = Goal("macs", 0.9, True)
    options = replace(OPTIONS, goal=goal, axes=("resolution",), training=replace(OPTIONS.training, epochs=0.5))
    inside = prune_scale(RESNET, tmp_path / "inside.onnx", options, chosen=chosen)
    outside = prune_scale(RESNET, tmp_path / "outside.onnx", replace(options, native=True), chosen=chosen)
    assert outside.after == inside.after and outside.decision is None
    graphs = [onnx.load(tmp_path / f"{name}.onnx").graph for name in ("inside", "outside")]
    sizes = [[dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim[2:]] for graph in graphs]
    assert sizes == [[8, 8], [inside.pixels[1]] * 2] and inside.pixels == (8, 7)
    assert [sum(node.op_type == "Resize" for node in graph.node) for graph in graphs] == [1, 0]


def test_without_labels_it_learns_from_the_original(tmp_path):
    images = np.random.default_rng(0).uniform(size=(160, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", **{onnx.load(RESNET).graph.input[0].name: images})
    options = replace(
        OPTIONS,
        data=str(tmp_path / "images.npz"),
        val=str(tmp_path / "images.npz"),
        axes=("depth", "width"),
        depth_ranking="fits",
        rounds=1,
        training=TrainSettings(epochs=1, batch=32, device="cpu"),
    )
    result = prune_scale(RESNET, tmp_path / "out.onnx", options)
    assert result.metric == "agreement" and result.learned_from == "the teacher's logits"
    assert result.before == 1.0 and result.decision.base == 1.0 and result.pixels == (1, 1)
    with pytest.raises(OnnxCompressError, match="probes need: take fits"):
        prune_scale(RESNET, tmp_path / "out.onnx", replace(options, depth_ranking="probes"))


def test_latency_is_measured_on_the_result(tmp_path):
    options = replace(OPTIONS, goal=Goal("latency", 0.95, True), axes=("depth",), rounds=1)
    result = prune_scale(RESNET, tmp_path / "out.onnx", options)
    assert 1 / result.latency.high <= 0.95 and result.deleted
    assert result.decision.limit == pytest.approx(0.95)
    assert all(1e5 < point.macs < result.figures_before.macs for point in result.decision.points)  # no milliseconds


def test_a_goal_out_of_reach_says_what_is_in_reach(tmp_path):
    options = replace(OPTIONS, goal=Goal("macs", 0.1, True), axes=("depth",))
    with pytest.raises(BudgetError, match=r"all that can go from depth, macs is 0\.\d+x, allowed 0\.100x"):
        prune_scale(RESNET, tmp_path / "out.onnx", options)
    assert BudgetError.exit_code == 1 and not (tmp_path / "out.onnx").exists()


def test_a_goal_that_merging_alone_reaches_takes_nothing_away(tmp_path):
    """Merged, the network of linear branches has 0.44x of its multiply-accumulates."""
    with pytest.raises(RecipeError, match=r"0\.5x of the macs is reached without pruning: onnxcompress optimize does"):
        prune_scale(FOLDER / "digits.onnx", tmp_path / "out.onnx", replace(OPTIONS, axes=("width",)))
    assert not (tmp_path / "out.onnx").exists()


def test_triples_that_merges_make_dearer_are_passed_over_together(tmp_path, monkeypatch):
    """Where blocks have gone, one Conv of two may have more MACs than both had, at some widths only."""
    options = replace(OPTIONS, goal=Goal("macs", 0.12, True), axes=("depth", "width"))
    monkeypatch.setattr(Space, "merged", lambda space, levels: levels)
    with Given(FOLDER / "mobilenetv2_mini_digits.onnx", options) as given:
        ladders = kept_ladders(given, options.goal, tmp_path / "ladders.json", lambda line: None)
        plain = count_all(given.graph, ladders, float(given.figures.macs))
        dear, counted = plain.costs.shape[0] - 2, []  # with so many blocks gone

        def macs(levels):
            counted.append(levels)
            return SimpleNamespace(macs=int(plain.cost(levels) * (1.3 if levels[0] == dear and levels[1] else 1.0)))

        monkeypatch.setattr("onnxcompress.train.scale.space.count", macs)
        job = Job(given, tmp_path)
        table = job.space.table
        assert np.array_equal(table.costs, plain.costs)  # what two axes do together is not seen on one
        points = axis_points(table, job.space.ends(), options)
        deepest = SimpleNamespace(best=lambda sizes, places: int(np.argmin(np.abs(places[:, 0] - place))))
        for preferred, factor in ((dear, 1.3), (dear - 1, 1.0)):
            place = job.space.coordinates([(preferred, 0, 0)])[1][0, 0]
            counted.clear()
            chosen = job.decider._choose(deepest, points)
            assert chosen[0] == preferred and factor * table.cost(chosen) <= job.space.limit
            assert len(counted) <= 4, "not one after the other"
            wider = (chosen[0], chosen[1] - 1, chosen[2])
            assert table.cost(wider) * factor > job.space.limit, "no more goes than needed"
        triples = job.space.triples(points)
        over = max((one for one in triples if one[0] == dear), key=table.cost)
        gone = set(triples) - set(job.space.without(triples, over))
        assert over in gone and {levels[0] for levels in gone} == {dear}, "those of other depths stay"


def test_merged_multiply_accumulates_are_estimated_from_the_axes(tmp_path):
    """The 1x1 convolutions before the pooling of a DenseNet go behind it."""
    options = replace(OPTIONS, goal=Goal("macs", 0.3, True), axes=("width", "resolution"))
    with Given(FOLDER / "densenet_mini_digits.onnx", options) as given:
        job = Job(given, tmp_path)
        space, table = job.space, job.space.table
        plain = count_all(given.graph, job.ladders, float(given.figures.macs))
        ends = np.array(table.costs.shape) - 1
        kept = json.loads((tmp_path / "macs.json").read_text())["figures"]
        assert len(kept) == 9 and set(kept) > {"0-0-0", f"0-{ends[1]}-0", f"0-0-{ends[2]}"}
        off = []
        for levels in [(0, 0, 0), (0, ends[1], 0), (0, 0, ends[2]), (0, 3, 1), (0, ends[1] // 3, ends[2] // 2)]:
            real = count(space.merged(levels)).macs
            assert space.real_cost(levels) == real
            off.append((abs(plain.cost(levels) / real - 1), abs(table.cost(levels) / real - 1)))
        by_count, estimated = (max(column) for column in zip(*off, strict=True))
        assert by_count > 0.05 and estimated < 0.01, off
        held = (tmp_path / "macs.json").stat().st_mtime_ns
        again = Job(given, tmp_path).space.table
        assert np.array_equal(again.costs, table.costs) and (tmp_path / "macs.json").stat().st_mtime_ns == held


def test_an_axis_that_a_model_does_not_have_is_left_out(tmp_path):
    rng = np.random.default_rng(0)
    flat = model(
        "g (float[N,1,8,8] x) => (float[N,10] y) { a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) f = Flatten(b) "
        "y = Gemm(f, m) }",
        w=rng.normal(size=(32, 1, 3, 3)).astype(np.float32),
        m=rng.normal(size=(2048, 10)).astype(np.float32) / 50,
    )
    save(load(flat), tmp_path / "flat.onnx")
    plan = plan_scale(tmp_path / "flat.onnx", replace(OPTIONS, goal=Goal("macs", 0.8, True)))
    assert plan.axes["depth"]["refusal"] == "none of 0 residual blocks can be deleted"
    assert "Flatten" in plan.axes["resolution"]["refusal"] or "Gemm" in plan.axes["resolution"]["refusal"]
    assert {point.axis for point in plan.points} == {"width"} and plan.mixed == 0 and plan.candidates == 1
    with pytest.raises(RecipeError, match="there is nothing to prune: none of 0 residual blocks"):
        plan_scale(tmp_path / "flat.onnx", replace(OPTIONS, axes=("depth",)))


def test_a_plan_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_scale(RESNET, OPTIONS)
    assert len(plan.points) == 6 and plan.mixed == 1 and plan.triples > 100
    assert set(plan.seconds) == {"points", "mixed", "race", "train"}
    assert all(seconds > 0 for seconds in plan.seconds.values())
    assert not list(tmp_path.iterdir()) and json.dumps(plan.as_dict())


def test_axes_are_read():
    assert parse_axes("r, d") == ("depth", "resolution")
    for text in ("", "x", "d,d"):
        with pytest.raises(RecipeError, match="choose some of d"):
            parse_axes(text)


RUN = [str(RESNET), "-o", "out.onnx", "--data", "sklearn:digits:train", "--val", "sklearn:digits"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*RUN], "there is nothing to reach: give --macs 0.5x"),
        ([*RUN, "--macs", "0.5x", "--latency", "0.5x"], "--macs and --latency are two goals"),
        ([*RUN, "--macs", "2x"], "--macs '2x': expected 0.7x or 300M"),
        ([*RUN, "--macs", "0.5x", "--axes", "d,h"], "axes 'd,h': choose some of d (depth)"),
        ([*RUN, "--macs", "10M"], "is reached without pruning"),
        ([*RUN, "--macs", "0.5x", "--only", "nothing*"], "'nothing*' is the name or kind of no residual block"),
        ([*RUN, "--macs", "0.5x", "--batch", "1"], "BatchNormalization would see 1 sample at a time"),
        ([*RUN, "--macs", "0.5x", "--report", "out.txt"], "must end in"),
        ([*RUN, "--macs", "0.5x", "--dry-run", "--report", "out.md"], "--report is for a run"),
        ([*RUN[:3], "--macs", "0.5x"], "give --data and --val"),
        ([str(RESNET), "--macs", "0.5x"], "there is no output: give -o OUT"),
        (["missing.onnx", *RUN[1:], "--macs", "0.5x"], "missing.onnx"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--rank-channels", "magnitude", "--rank-blocks", "probes", "--calibration", "64"]
    result = CliRunner().invoke(cli, ["prune-scale", *arguments, *quick])
    assert isinstance(result.exception, OnnxCompressError), result.output
    assert text in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "out.onnx").exists()


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(cli, ["prune-scale", *RUN, "--macs", "0.5x"])
    assert "pip install onnxcompress[train]" in str(result.exception) and result.exception.exit_code == 2


def test_the_command_writes_model_and_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wishes = ["--macs", "0.6x", "--axes", "d,w", "--rounds", "2", "--mixed", "1", "--round-epochs", "0.2"]
    wishes += ["--epochs", "0.3", "--limit", "400", "--rank-channels", "magnitude", "--calibration", "64"]
    result = CliRunner().invoke(cli, ["prune-scale", *RUN, *wishes, "--jobs", "1", "--report", "out.md", "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["figures_after"]["macs"] <= 0.6 * found["figures_before"]["macs"]
    assert found["goal"] == "0.6x of the macs" and len(found["predictor"]["fits"]) == 2
    text = (tmp_path / "out.md").read_text()
    assert "chosen of" in text and "## Conditions of Karush, Kuhn and Tucker" in text and "| mixed-" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.md", "out.onnx"]


def test_the_command_plans(tmp_path):
    wishes = ["--macs", "0.5x", "--axes", "d", "--dry-run", "--rank-blocks", "probes"]
    result = CliRunner().invoke(cli, ["prune-scale", str(RESNET), *RUN[3:], *wishes])
    assert result.exit_code == 0, result.exception
    assert "depth-2-0-0" in result.stdout and "nothing is written" in result.stdout
    assert "points on the axes, 0 off them" in result.stdout


def test_a_network_that_settles_to_nan_keeps_its_statistics(monkeypatch, caplog):
    options = ScaleOptions(
        data="sklearn:digits:train", val="sklearn:digits", goal=Goal("macs", 0.5, True), calibration=32, limit=64
    )
    monkeypatch.setattr("onnxcompress.train.scale.given._relative_error", lambda wanted, found: float("nan"))
    with Given(RESNET, options) as given:
        assert not given.settles
    assert "keeps the statistics of the file" in caplog.text


@pytest.mark.parametrize("kind", ["own", "other", "frozen"])
def test_statistics_of_other_data_than_the_network_knows_are_left_alone(tmp_path, caplog, kind):
    """Digits as they are, or brighter than what the network was trained on."""
    data = "sklearn:digits:train"
    if kind == "other":
        images = np.random.default_rng(0).normal(3, 2, size=(96, 1, 8, 8)).astype(np.float32)
        data = str(tmp_path / "other.npz")
        np.savez(data, image=images)
    options = ScaleOptions(
        data=data,
        val=data,
        goal=Goal("macs", 0.5, True),
        calibration=64,
        limit=96,
        training=TrainSettings(device="cpu", batch=32, epochs=1, freeze_statistics=kind == "frozen"),
    )
    with Given(RESNET, options) as given:
        assert given.settles == (kind == "own")
        assert ("keeps the statistics of the file" in caplog.text) == (kind == "other")
        blocks, whole = residual_blocks(given.graph)
        graph = prune(given, Ladders(blocks=tuple(blocks[-1:]), block_count=whole), (1, 0, 0))
        made = train_graph(given, graph, options.training)
        trained = {norm.mean: made.twin.get_buffer(norm.mean) for norm in made.twin.batch_normalizations}
        start = given.original
        same = [torch.equal(held, start.get_buffer(name)) for name, held in trained.items()]
        assert all(same) if kind != "own" else not any(same)
