"""The parts of tools/bench_optimize.py, and one run of the whole with the control arm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # the scripts import each other as they do when run

import bench_inputs  # noqa: E402
import bench_judge  # noqa: E402
import bench_model  # noqa: E402
import bench_optimize  # noqa: E402
import bench_peers  # noqa: E402
import bench_process  # noqa: E402
import bench_tables  # noqa: E402

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "own" : 1]>'
AFFINE = "g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, -2, 3, 0.5}> { a = Mul(x, w) y = Relu(a) }"
NESTED = """
g (float[N] x, bool c) => (float[N] y) {
    k = Constant<value_float = 2.0>()
    y = If(c) <
        then_branch = t () => (float[N] p) { one = Constant<value_float = 1.0>() s = Add(x, one) p = Mul(s, k) },
        else_branch = e () => (float[N] q) { q = com.microsoft.FastGelu(x) }
    >
}
"""
WITH_FUNCTION = "g (float[N] x) => (float[N] y) { h = own.Twice(x) y = own.Missing(h) }"
TWICE = '<domain: "own", opset_import: ["" : 17]> Twice (u) => (v) { v = Add(u, u) }'


def model(graph: str) -> onnx.ModelProto:
    return parser.parse_model(f"{HEAD} {graph}")


def interface(graph: str) -> bench_model.Interface:
    return bench_model.interface_of(model(graph))


# Nodes and interface


def test_nodes_in_subgraphs_count_and_constants_do_not():
    counted = bench_model.count_nodes(model(NESTED))
    assert counted["nodes"] == 4
    assert counted["constant_nodes"] == 2
    assert counted["operators"] == {"If": 1, "Add": 1, "Mul": 1, "com.microsoft:FastGelu": 1}
    assert counted["foreign_nodes"] == 1


@pytest.mark.parametrize(("opset", "foreign"), [(12, 1), (17, 0)])
def test_an_operator_newer_than_the_opset_is_foreign(opset, foreign):
    early = model("g (float[N, 4] x, float[4] s) => (float[N, 4] y) { y = LayerNormalization(x, s) }")
    early.opset_import[0].version = opset
    assert bench_model.count_nodes(early)["foreign_nodes"] == foreign


def test_a_call_of_the_models_own_function_is_not_foreign():
    with_function = model(WITH_FUNCTION)
    with_function.functions.append(parser.parse_function(TWICE))
    counted = bench_model.count_nodes(with_function)
    assert counted["nodes"] == 3  # two calls and one body
    assert counted["foreign_nodes"] == 1  # own.Missing has no body here


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("float[N, 4] x) => (float[N, 4] y", "float[N, 4] x) => (float[N, 4] y", "equal"),
        ("float[N, 4] x) => (float[N, 4] y", "float[1, 4] x) => (float[N, 4] y", "changed"),
        ("float[N, 4] x) => (float[N, 4] y", "float[M, 4] x) => (float[N, 4] y", "changed"),
        ("float[N, 4] x) => (float[N, 4] y", "float[N, 4] x) => (float[1, 4] y", "changed"),
        ("float[N, 4] x) => (float[N, 4] y", "double[N, 4] x) => (float[N, 4] y", "changed"),
        ("float[N, 4] x) => (float[N, 4] y", "float[N, 4] x) => (float[N, 4] z", "changed"),
        ("float[N, 4] x) => (float[?, 4] y", "float[N, 4] x) => (float[N, 4] y", "refined"),
        ("float[N, 4] x) => (float[] y", "float[N, 4] x) => (float[N, 4] y", "refined"),  # [] states no shape
        ("float[N, 4] x) => (float y", "float[N, 4] x) => (float[N, 4] y", "changed"),
        ("float[?, 4] x) => (float[N, 4] y", "float[N, 4] x) => (float[N, 4] y", "refined"),
        ("float[N, 4] x) => (float[N, out0] y", "float[N, 4] x) => (float[N, 4] y", "refined"),  # no input has out0
        ("float[N, 4] x) => (float[N, out0] y", "float[N, 4] x) => (float[N, ?] y", "changed"),
        ("float[?, 4] x) => (float[N, 4] y", "float[1, 4] x) => (float[N, 4] y", "changed"),
        ("float[N, 4] x, float u) => (float[N, 4] y", "float[N, 4] x) => (float[N, 4] y", "changed"),
        ("float[2] x, float[2] u) => (float[2] y", "float[2] u, float[2] x) => (float[2] y", "changed"),
    ],
)
def test_interface_verdicts(before, after, verdict):
    old, new = (interface(f"g ({text}) {{ y = Relu(x) }}") for text in (before, after))
    compared = bench_model.compare_interfaces(old, new)
    assert compared["verdict"] == verdict
    assert bool(compared["differences"]) == (verdict != "equal")


@pytest.mark.parametrize(("ir_version", "verdict"), [(3, "equal"), (8, "changed")])
def test_dropping_an_overridable_default_matters_from_ir_4_on(ir_version, verdict):
    listed = model("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    dropped = model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    listed.ir_version = dropped.ir_version = ir_version
    compared = bench_model.compare_interfaces(bench_model.interface_of(listed), bench_model.interface_of(dropped))
    assert compared["verdict"] == verdict


def test_external_data_counts(tmp_path):
    stored = model(AFFINE)
    weight = stored.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight), "w"))  # raw bytes, which alone can move out
    onnx.save(stored, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.bin", size_threshold=0)
    facts = bench_model.facts(tmp_path / "m.onnx")
    assert bench_model.external_files(tmp_path / "m.onnx") == [tmp_path / "m.bin"]
    assert facts["bytes"] == (tmp_path / "m.onnx").stat().st_size + (tmp_path / "m.bin").stat().st_size
    assert facts["checker"] == "ok"
    assert facts["gzip_bytes"] > 0
    bench_peers.run_copy(tmp_path / "m.onnx", tmp_path / "copied" / "m.onnx")
    assert (tmp_path / "copied" / "m.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()


# Inputs


@pytest.mark.parametrize(
    "spec",
    [
        {"shape": [2, 48, 64, 3], "dist": "image", "low": -120, "high": 150, "layout": "nhwc"},
        {"shape": [2, 3, 48, 64], "dist": "image", "low": -1, "high": 1},
        {"shape": [2, 3, 48, 160], "dist": "text", "low": -2.1, "high": 2.6},
        {"shape": [3, 400], "dist": "normal", "std": 0.5, "low": -1.2, "high": 1.6},
        {"shape": [2, 48], "dtype": "int64", "dist": "randint", "low": 0, "high": 256},
        {"shape": [2, 576], "dist": "audio", "low": -0.5, "high": 0.5},
    ],
    ids=lambda spec: spec["dist"],
)
def test_inputs_have_shape_type_and_range_and_follow_the_seed(spec):
    (first,), (again,), (other,) = (bench_inputs.make_inputs({"x": spec}, seed).values() for seed in (0, 0, 1))
    assert list(first.shape) == spec["shape"]
    assert first.dtype == spec.get("dtype", "float32")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.min() >= spec["low"]
    assert first.max() <= spec["high"]
    # It uses its range: a distribution stuck at one end would hide most mistakes.
    assert np.ptp(first) > 0.8 * (spec["high"] - spec["low"])


def test_a_scalar_stays_a_scalar():
    made = bench_inputs.make_inputs({"sr": {"shape": [], "dtype": "int64", "dist": "const", "value": 16000}}, 0)
    assert made["sr"].shape == ()
    assert made["sr"].dtype == np.int64
    assert made["sr"] == 16000


def test_one_more_input_does_not_move_the_others():
    spec = {"shape": [4], "dist": "normal"}
    alone, both = bench_inputs.make_inputs({"x": spec}, 0), bench_inputs.make_inputs({"w": spec, "x": spec}, 0)
    assert np.array_equal(alone["x"], both["x"])
    assert not np.array_equal(both["w"], both["x"])


def test_unknown_distribution_is_named():
    with pytest.raises(ValueError, match=r"'x'.*'cauchy'"):
        bench_inputs.make_inputs({"x": {"shape": [1], "dist": "cauchy"}}, 0)


def test_generic_inputs_are_signed_with_ties_and_zeros():
    specs = bench_inputs.generic_specs(
        interface("g (float[N, 3, H, W] x) => (float[N, 3, H, W] y) { y = Relu(x) }")["inputs"]
    )
    (values,) = bench_inputs.make_inputs(specs, 0).values()
    assert values.shape == (1, 3, 224, 224)
    assert (values < 0).any()
    assert (values == 0).any()
    assert len(np.unique(values)) < values.size / 100


def test_cases_vary_batch_and_size_by_symbol():
    inputs = interface("g (float[N, T, 8] x, int64[N] n, float[4, N] s) => (float[N, T, 8] y) { y = Relu(x) }")[
        "inputs"
    ]
    switch = {"shape": [1], "dtype": "int64", "dist": "const", "value": 16000}
    specs = {"x": {"shape": [1, 48, 8]}, "n": switch, "s": {"shape": [4, 1]}}
    made = bench_inputs.cases(specs, inputs)
    shapes = {case["label"]: [spec["shape"] for spec in case["specs"].values()] for case in made}
    assert shapes == {
        "seed 0": [[1, 48, 8], [1], [4, 1]],
        "seed 1": [[1, 48, 8], [1], [4, 1]],
        "larger batch": [[2, 48, 8], [2], [4, 2]],
        "larger size": [[1, 64, 8], [1], [4, 1]],
        "half": [[1, 24, 8], [1], [4, 1]],
    }
    values = {case["label"]: bench_inputs.make_inputs(case["specs"], 0)["n"].tolist() for case in made}
    assert values["seed 0"] == [16000]
    assert values["half"] == [8000]


# Judgement


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([np.inf, 2.0], [np.inf, 1.0], 0.5),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([np.nan, 2.0], [0.0, 2.0], None),
        ([np.inf, 2.0], [-np.inf, 2.0], None),
        ([0.0, 0.0], [0.0, 1e-9], None),
        ([1.0], [1.0, 1.0], None),
    ],
)
def test_relative_error(expected, actual, error):
    measured, mismatch = bench_judge.relative_error(np.array(expected), np.array(actual))
    assert measured == error
    assert (mismatch is None) == (error is not None)


def judged(tmp_path: Path, before: str, after: str) -> tuple[dict, dict]:
    """The reference of one graph and the comparison of another against it, as two records."""
    for name, graph in [("before", before), ("after", after)]:
        onnx.save(model(graph), str(tmp_path / f"{name}.onnx"))
    reference = bench_judge.reference(str(tmp_path / "before.onnx"), None, str(tmp_path), threads=1)
    facts = bench_model.facts(tmp_path / "after.onnx")
    record = {
        "optimize": {"wall_s": 1.0, "cpu_s": 1.0, "peak_mb": 1.0},
        "facts": facts,
        "compare": bench_judge.compare(str(tmp_path / "after.onnx"), reference, threads=1),
        "interface": {"verdict": "equal", "differences": []},
    }
    return {"facts": bench_model.facts(tmp_path / "before.onnx"), "reference": reference}, record


RELU_AFTER_SCALE = AFFINE.replace("{1, -2, 3, 0.5}", "{1, -2, 3, 0.75}")
FROZEN_BATCH = AFFINE.replace(
    "<float[4] w = {1, -2, 3, 0.5}>", "<float[4] w = {1, -2, 3, 0.5}, int64[2] s = {1, 4}>"
).replace("y = Relu(a)", "r = Reshape(a, s) y = Relu(r)")
ONE_OPERATOR = AFFINE.replace("y = Relu(a)", "z = Constant<value_float = 0.0>() y = Max(a, z)")


def test_an_equal_model_is_ok(tmp_path):
    original, record = judged(tmp_path, AFFINE, ONE_OPERATOR)
    assert [case["label"] for case in original["reference"]["cases"]] == ["seed 0", "seed 1", "larger batch"]
    assert record["compare"]["error"] == 0.0
    assert bench_tables.status(record, original) == "ok"


def test_another_weight_differs(tmp_path):
    original, record = judged(tmp_path, AFFINE, RELU_AFTER_SCALE)
    assert 1e-3 < record["compare"]["error"] < 1
    assert bench_tables.status(record, original) == "differs"


def test_a_frozen_batch_is_found_by_the_larger_batch(tmp_path):
    original, record = judged(tmp_path, AFFINE, FROZEN_BATCH)
    outcome = {case["label"]: case["error"] for case in record["compare"]["cases"]}
    assert outcome == {"seed 0": 0.0, "seed 1": 0.0, "larger batch": None}
    assert bench_tables.status(record, original) == "fails"
    assert "larger batch" in record["compare"]["message"]


def test_a_file_that_does_not_load_fails(tmp_path):
    original, record = judged(tmp_path, AFFINE, AFFINE.replace("y = Relu(a)", "y = own.Missing(a)"))
    assert record["compare"]["loads"] is False
    assert bench_tables.status(record, original) == "fails"


def test_a_case_that_the_original_cannot_run_is_dropped(tmp_path):
    original, _ = judged(tmp_path, FROZEN_BATCH, AFFINE)
    assert [case["label"] for case in original["reference"]["cases"]] == ["seed 0", "seed 1"]
    assert list(original["reference"]["dropped"]) == ["larger batch"]


# Statistics


def example_records() -> tuple[dict, dict]:
    reference = {"cases": [{"label": "seed 0"}], "noise": 1e-3, "sensitivity": 0.0}
    originals = {
        name: {
            "facts": {"nodes": 100, "bytes": 1000, "gzip_bytes": 500, "foreign_nodes": 0, "checker": "ok"},
            "reference": reference,
        }
        for name in "abcd"
    }

    def record(nodes: int, size_bytes: int, foreign: int, error: float, wall_s: float) -> dict:
        return {
            "optimize": {"wall_s": wall_s, "cpu_s": wall_s, "peak_mb": 10 * wall_s},
            "facts": {
                "nodes": nodes,
                "bytes": size_bytes,
                "gzip_bytes": 500,
                "foreign_nodes": foreign,
                "checker": "ok",
            },
            "compare": {"loads": True, "runs": True, "error": error, "message": None},
            "interface": {"verdict": "equal", "differences": []},
            "latency": {"ratio_p50": 2.0, "ratio_p10": 1.9, "ratio_p90": 2.1, "ratio_fast": 1.5, "control_p50": 1.0},
        }

    failed = {"optimize": {"wall_s": 4.0, "cpu_s": 4.0, "peak_mb": 99.0}, "failure": "exit code 1"}
    results = {
        "a": record(25, 1000, 0, 1e-3, 1.0),
        "b": record(100, 1011, 5, 2e-3, 2.0),
        "c": record(1, 10, 0, 2.1e-3, 3.0),
        "d": failed,
    }
    return originals, results


def test_summary_leaves_wrong_files_out_of_the_means():
    originals, results = example_records()
    summary = bench_tables.summarize(results, originals)
    assert (summary["ok"], summary["differs"], summary["fails"]) == (2, 1, 1)
    assert summary["nodes_kept"] == pytest.approx(0.5)  # a and b
    assert summary["standard_nodes_kept"] == pytest.approx(0.25)  # a alone
    assert (summary["grown"], summary["non_standard"]) == (1, 1)
    assert (summary["median_wall_s"], summary["max_wall_s"], summary["max_peak_mb"]) == (2.5, 4.0, 99.0)
    assert summary["latency_ratio"] == pytest.approx(2.0)
    assert summary["fast_latency_ratio"] == pytest.approx(1.5)


def test_tables_have_a_row_per_arm_and_a_cell_per_column():
    originals, results = example_records()
    summary = bench_tables.summary_row("x", bench_tables.summarize(results, originals))
    assert len(summary) == len(bench_tables.SUMMARY_HEADER)
    rows = [bench_tables.model_row("x", results[name], originals[name]) for name in originals]
    assert {len(row) for row in rows} == {len(bench_tables.MODEL_HEADER)}
    assert rows[1][2] == "100 (5 non-standard)"
    assert rows[3][1] == "fails"
    assert rows[3][-1] == "exit code 1"


# Processes

PARENT = """
import subprocess, sys, time
held = bytearray(60 << 20)
child = subprocess.Popen([sys.executable, "-c", "import time; held = bytearray(60 << 20); time.sleep({seconds})"])
print("child", child.pid, flush=True)
child.wait()
"""


def test_memory_is_that_of_the_tree():
    run = bench_process.run_limited([sys.executable, "-c", PARENT.format(seconds=0.5)], limit_s=30)
    assert run.ok
    assert run.processes == 2
    assert 0.5 < run.wall_s < 10
    assert run.peak_mb > 120  # 60 in the parent, 60 in the child
    assert run.peak_rss_mb >= 0.99 * run.peak_mb


def test_the_time_limit_stops_the_whole_tree():
    run = bench_process.run_limited(
        [sys.executable, "-c", PARENT.format(seconds=60)], limit_s=3
    )  # the child has said its number by then
    assert run.timed_out
    assert not run.ok
    assert run.wall_s < 10
    assert "time limit" in run.failure
    child = int(run.message.split()[1])
    assert bench_process.has_ended(child)


def test_a_process_has_ended_though_nobody_waited_for_it():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not bench_process.has_ended(process.pid)
    bench_process.kill_all([process.pid])
    assert "Z" in Path(f"/proc/{process.pid}/stat").read_text()
    assert bench_process.has_ended(process.pid)
    process.communicate()
    assert bench_process.has_ended(process.pid)


def test_killing_waits_for_the_end_but_not_for_ever(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_process.os, "kill", lambda pid, signal: None)
    monkeypatch.setattr(bench_process, "has_ended", lambda pid: asked.append(pid) or len(asked) > 3)
    bench_process.kill_all([7])
    assert asked == [7] * 4
    monkeypatch.setattr(bench_process, "has_ended", lambda pid: False)
    monkeypatch.setattr(bench_process, "ENDING_S", 0.1)
    bench_process.kill_all([7])


def test_a_failure_keeps_the_last_words():
    run = bench_process.run_limited([sys.executable, "-c", "raise KeyError('axis')"], limit_s=30)
    assert run.failure == "exit code 1: KeyError: 'axis'"


# The whole


def test_end_to_end_with_the_control_arm(tmp_path, capsys):
    models = tmp_path / "models"
    models.mkdir()
    onnx.save(model(AFFINE), str(models / "affine.onnx"))
    manifest = {"models": [{"name": "affine", "inputs": {"x": {"shape": [3, 4], "dist": "normal"}}}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    arguments = [str(models), "--manifest", str(tmp_path / "manifest.json"), "--arms", "copy", "--threads", "1"]
    arguments += ["--cache", str(tmp_path / "cache.json"), "--json", str(tmp_path / "out.json")]
    assert bench_optimize.main([*arguments, "--latency-seconds", "0.2"]) == 0
    tables = capsys.readouterr()
    assert "### affine" in tables.out
    assert "affine: copy ok" in tables.err

    report = json.loads((tmp_path / "out.json").read_text())
    record = report["results"]["copy"]["affine"]
    assert record["facts"]["nodes"] == 2
    assert record["compare"]["error"] == 0.0
    assert record["interface"] == {"verdict": "equal", "differences": []}
    assert [case["shapes"]["x"] for case in report["originals"]["affine"]["reference"]["cases"]] == [
        [3, 4],
        [3, 4],
        [4, 4],
    ]
    assert record["latency"]["rounds"] >= bench_judge.MIN_ROUNDS
    assert 0.2 < record["latency"]["ratio_p50"] < 5
    assert (report["summary"]["copy"]["ok"], report["summary"]["copy"]["bytes_kept"]) == (1, 1.0)

    assert bench_optimize.main([*arguments, "--latency-seconds", "0.2"]) == 0  # everything comes from the cache
    assert capsys.readouterr() == (tables.out, "")


def test_a_folder_without_models_is_bad_usage(tmp_path, capsys):
    assert bench_optimize.main([str(tmp_path)]) == 2
    assert "no .onnx file" in capsys.readouterr().err
