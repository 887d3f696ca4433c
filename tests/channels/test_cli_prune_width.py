"""`onnxcompress prune-width` as a user meets it: exit codes, one line on stderr, budgets kept, nothing half-written."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from onnxcompress.channels.options import WidthOptions, parse_goal
from onnxcompress.channels.pruning import prune_width
from onnxcompress.cli import main
from onnxcompress.cost import count
from onnxcompress.errors import RecipeError
from onnxcompress.testing import graph_of, model, relative_error, run

RNG = np.random.default_rng(2)


def normal(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def network() -> onnx.ModelProto:
    """Two convolutions with BatchNormalization and a head; half of the channels repeat the others."""
    text = """
      g (float[N,3,8,8] image) => (float[N,5] scores) {
        a = Conv<pads=[1,1,1,1]>(image, w1) n = BatchNormalization(a, s1, b1, m1, v1) r = Relu(n)
        c = Conv<pads=[1,1,1,1]>(r, w2) o = BatchNormalization(c, s2, b2, m2, v2) q = Relu(o)
        p = GlobalAveragePool(q) f = Flatten(p) scores = Gemm<transB=1>(f, w3, b3)
      }
    """
    weights = {"w1": normal(32, 3, 3, 3), "w2": normal(32, 32, 3, 3), "w3": normal(5, 32), "b3": normal(5)}
    for number in (1, 2):
        weights[f"w{number}"][16:] = weights[f"w{number}"][:16]
        weights |= {f"s{number}": np.ones(32, np.float32), f"v{number}": np.ones(32, np.float32)}
        weights |= {f"b{number}": np.zeros(32, np.float32), f"m{number}": np.zeros(32, np.float32)}
    return model(text, **weights)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    onnx.save(network(), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", image=RNG.normal(size=(64, 3, 8, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["prune-width", *arguments])
    said = capsys.readouterr()
    return int(stop.value.code), said.out, said.err


def test_a_budget_is_kept_and_the_report_tells_how(folder, capsys):
    code, out, err = call(
        "m.onnx", "-o", "p.onnx", "--macs", "0.5x", "--data", "x.npz", "--json", "--report", "r.md", capsys=capsys
    )
    assert code == 0, err
    found = json.loads(out)
    before, after = (count(graph_of(onnx.load(name))).macs for name in ("m.onnx", "p.onnx"))
    assert found["macs"] == [before, after] and after <= 0.5 * before
    assert found["contract_error"] < 1e-5 and found["ranking"] == "data" and len(found["fits"]) >= 2
    # The channels that go are those that others repeat, and those make up for them.
    assert found["quality"]["error"] < 0.1
    sample = {"image": RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)}
    assert relative_error(run(onnx.load("m.onnx"), sample)[0], run(onnx.load("p.onnx"), sample)[0]) < 0.1
    report = (folder / "r.md").read_text()
    assert "make up for what went" in report and "output 'scores' of the model" in report
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "p.onnx", "r.md", "x.npz"]


def test_without_data_scales_rank_and_the_note_says_what_is_missing(folder, capsys):
    code, out, err = call("m.onnx", "-o", "p.onnx", "--macs", "0.7x", capsys=capsys)
    assert code == 0, err
    assert "ranked by weights alone" in out and "finetune p.onnx --teacher m.onnx --distill" in out
    ops = {node.op_type for node in onnx.load("p.onnx").graph.node}
    assert "BatchNormalization" not in ops  # the ordinary passes ran


def test_batchnorm_stays_for_training_without_the_passes(folder, capsys):
    code, _, err = call("m.onnx", "-o", "p.onnx", "--macs", "0.7x", "--no-optimize", "-q", capsys=capsys)
    assert code == 0, err
    assert [node.op_type for node in onnx.load("p.onnx").graph.node].count("BatchNormalization") == 2


def test_groups_are_listed_with_reasons(folder, capsys):
    code, out, _ = call("m.onnx", "--list-groups", capsys=capsys)
    assert code == 0 and "stays: scores (5 channels): output 'scores' of the model" in out
    assert len([line for line in out.splitlines() if line.split()[1:2] == ["32"]]) == 2
    code, out, _ = call("m.onnx", "--list-groups", "--json", capsys=capsys)
    assert [group["channels"] for group in json.loads(out)["groups"]] == [32, 32, 5]


def test_a_dry_run_writes_nothing_and_says_the_same_macs(folder, capsys):
    _, dry, _ = call("m.onnx", "--macs", "0.6x", "--dry-run", "--json", capsys=capsys)
    call("m.onnx", "-o", "p.onnx", "--macs", "0.6x", capsys=capsys)
    assert json.loads(dry)["macs"][1] == count(graph_of(onnx.load("p.onnx"))).macs
    assert json.loads(dry)["output"] is None


def test_what_is_skipped_stays(folder, capsys):
    code, out, _ = call("m.onnx", "--macs", "0.8x", "--dry-run", "--json", "--skip", "a", capsys=capsys)
    kept = {group["name"]: group["kept"] for group in json.loads(out)["groups"]}
    assert code == 0 and kept["a"] == 32 and kept["c"] < 32
    code, out, _ = call("m.onnx", "--macs", "0.8x", "--dry-run", "--json", "--only", "a", capsys=capsys)
    kept = {group["name"]: group["kept"] for group in json.loads(out)["groups"]}
    assert code == 0 and kept["a"] < 32 and kept["c"] == 32


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["m.onnx", "-o", "p.onnx", "--macs", "0.001x"], 1, ["cannot be reached", "is the least of"]),
        (["m.onnx", "-o", "p.onnx", "--macs", "1.5x"], 2, ["1.5x", "below 1x"]),
        (["m.onnx", "-o", "p.onnx", "--macs", "lots"], 2, ["lots", "expected 0.7x or 300M"]),
        (["m.onnx", "-o", "p.onnx"], 2, ["no goal", "--macs 0.7x"]),
        (["m.onnx", "--macs", "0.7x"], 2, ["no output", "-o OUT"]),
        (["m.onnx", "-o", "p.onnx", "--macs", "0.7x", "--latency", "0.7x"], 2, ["two goals"]),
        (["m.onnx", "-o", "p.onnx", "--macs", "0.7x", "--skip", "nothing*"], 2, ["nothing*", "--list-groups"]),
        (["m.onnx", "-o", "p.onnx", "--macs", "0.7x", "--ranking", "data"], 2, ["needs --data"]),
        (["m.onnx", "-o", "p.onnx", "--macs", "0.7x", "--metric", "top1"], 2, ["needs --val"]),
        (["m.onnx", "-o", "no/p.onnx", "--macs", "0.7x"], 2, ["does not exist"]),
        (["none.onnx", "-o", "p.onnx", "--macs", "0.7x"], 2, ["none.onnx"]),
        (["m.onnx", "-o", "p.onnx", "--macs", "0.7x", "--report", "r.txt"], 2, [".json or .md"]),
    ],
)
def test_failures_are_one_line_and_leave_nothing(folder, capsys, arguments, code, words):
    found, out, err = call(*arguments, capsys=capsys)
    assert found == code and not out
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("onnxcompress: ")
    for word in words:
        assert word in lines[0]
    assert not (folder / "p.onnx").exists()


def test_importance_from_outside(folder):
    costs = {"a": np.arange(32.0), "c": np.full(32, 1e9)}
    wishes = WidthOptions(goal=parse_goal("macs", "0.8x"))
    found = prune_width(folder / "m.onnx", None, wishes, importance=costs)
    kept = {row.name: row.kept for row in found.groups}
    assert kept["c"] == 32 and kept["a"] < 32 and found.macs[1] <= 0.8 * found.macs[0]


def test_latency_is_measured_on_the_pruned_graph(folder):
    wishes = WidthOptions(goal=parse_goal("latency", "0.95x"), round_to=16)
    found = prune_width(folder / "m.onnx", None, wishes)
    assert found.latency is not None and found.latency.ratio >= 1 / 0.95
    assert found.macs[1] < found.macs[0]


def test_goals():
    assert parse_goal("macs", "300M").limit(1e9) == 3e8
    assert parse_goal("macs", "0.25X").limit(1e9) == 2.5e8
    assert parse_goal("latency", "3.5ms").limit(9.0) == 3.5
    for kind, text in (("macs", "0x"), ("macs", "nan"), ("latency", "3.5"), ("macs", "-1")):
        with pytest.raises(RecipeError):
            parse_goal(kind, text)


def test_a_stream_under_layer_normalization_is_pruned_only_where_it_is_named(tmp_path):
    text = """
      g (float[N,6,8] x) => (float[N,6,4] y) {
        a = MatMul(x, w1) n = LayerNormalization(a, s, b) h = MatMul(n, w2) r = Relu(h) i = MatMul(r, w3) o = Add(a, i)
        m = LayerNormalization(o, s, b) y = MatMul(m, w4)
      }
    """
    sizes = {"w1": normal(8, 16), "w2": normal(16, 64), "w3": normal(64, 16), "w4": normal(16, 4)}
    ones = {"s": np.ones(16, np.float32), "b": np.zeros(16, np.float32)}
    onnx.save(model(text, **sizes, **ones), tmp_path / "m.onnx")
    goal = {"goal": parse_goal("macs", "0.7x"), "round_to": 4}
    found = prune_width(tmp_path / "m.onnx", None, WidthOptions(**goal))
    assert [(row.name, row.kept < row.channels) for row in found.groups[:2]] == [("a", False), ("h", True)]
    assert any("1 groups stay that only --only prunes, a among them" in note for note in found.notes)
    named = prune_width(tmp_path / "m.onnx", None, WidthOptions(only=("a",), **goal))
    assert [(row.name, row.kept < row.channels) for row in named.groups[:2]] == [("a", True), ("h", False)]
    assert any("counts otherwise than with zeros" in note for note in named.notes)
