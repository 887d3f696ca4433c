"""onnxruntime in a child process: what it returns, what it refuses, and how it dies."""

import contextlib
import gc
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, TypeProto, helper
from onnx.reference import ReferenceEvaluator

from onnxcompress.errors import RuntimeFailure
from onnxcompress.runtime import RunOptions, Runtime, ValueInfo, geomean_ratio, median_ratio, peak_memory_bytes
from onnxcompress.runtime_worker import turn
from onnxcompress.testing import model

F32 = np.float32
posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")
# The only crash that a valid model of stock operators is known to cause: INT64_MIN / -1 traps there, and nowhere else.
traps = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="integer overflow traps on x86 only")


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60) as it:
        yield it


def serialized(text, **weights):
    return model(text, opset=21, ir_version=10, **weights).SerializeToString()


def unchecked(text):
    return helper.make_model(
        onnx.parser.parse_graph(text), ir_version=10, opset_imports=[helper.make_opsetid("", 18)]
    ).SerializeToString()


RELU = serialized("g (float[n] x) => (float[n] y) { y = Relu(x) }")
DIVIDE = serialized("g (int64[n] a, int64[n] b) => (int64[n] y) { y = Div(a, b) }")
OVERFLOW = {"a": np.array([-(2**63)]), "b": np.array([-1])}
ENDLESS = serialized(
    "g (float[n] x) => (float[n] y) { "
    "n = Constant<value_int: int = 4611686018427387904>() on = Constant<value: tensor = bool {1}>() "
    "y = Loop(n, on, x) <body = b (int64 i, bool go, float[n] v) => (bool go2, float[n] w) "
    "{ go2 = Identity(go) w = Relu(v) }> }"
)
X = {"x": np.array([-1, 2], F32)}


def value_info(name, kind):
    return helper.make_value_info(name, kind)


def identity(kind):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [value_info("x", kind)], [value_info("y", kind)]
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString()


def tensor_type(dtype):
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)


# What comes back


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int32", "int64", "uint32", "uint64", "int8", "bool"]
)
def test_run_equals_the_reference_evaluator(runtime, dtype):
    kind = helper.tensor_dtype_to_string(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))).split(".")[1].lower()
    text = f"g ({kind}[a,b] x, {kind}[a,b] z) => ({kind}[b,a] y, {kind}[b] r) {{ c = Concat<axis=0>(x, z) "
    text += "s = Slice(c, one, three) y = Transpose(s) r = Gather(c, zero) }"
    proto = model(text, opset=17, one=np.array([1]), three=np.array([3]), zero=np.array(0))
    rng = np.random.default_rng(0)
    feeds = [{name: rng.integers(0, 3, (2, size)).astype(dtype) for name in "xz"} for size in (3, 5)]
    for feed, actual in zip(feeds, runtime.run(proto.SerializeToString(), feeds), strict=True):
        for expected, value in zip(ReferenceEvaluator(proto).run(None, feed), actual, strict=True):
            assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
            assert value.tobytes() == expected.tobytes()


FOREIGN = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
@pytest.mark.parametrize("dtype", FOREIGN)
def test_types_that_numpy_lacks(runtime, dtype, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(getattr(ml_dtypes, dtype))
    [[y]] = runtime.run(identity(tensor_type(x.dtype)), [{"x": x}])
    assert (y.dtype, y.shape, y.tobytes()) == (x.dtype, x.shape, x.tobytes())


def test_int4_goes_in_and_out(runtime):
    text = "g (int4[n] x, float[m] q) => (float[n] y, int4[m] z) "
    text += "{ y = DequantizeLinear(x, s) z = QuantizeLinear(q, s, o) }"
    zero = np.array(0, ml_dtypes.int4)
    x, q = np.array([-8, -1, 0, 3, 7], ml_dtypes.int4), np.array([0.5, -4, 3.5], F32)
    [[y, z]] = runtime.run(serialized(text, s=F32(0.5), o=zero), [{"x": x, "q": q}])
    assert y.tolist() == [-4, -0.5, 0, 1.5, 3.5]
    assert z.dtype == ml_dtypes.int4
    assert z.astype(int).tolist() == [1, -8, 7]


def test_outputs_come_in_the_order_asked(runtime):
    text = "g (float[n] x) => (float[n] y, bfloat16[n] z, float[n] w) { y = Neg(x) z = Cast<to=16>(x) w = Abs(x) }"
    [[w, z, y]] = runtime.run(serialized(text), [X], outputs=["w", "z", "y"])
    assert (w.tolist(), y.tolist()) == ([1, 2], [1, -2])
    assert z.dtype == ml_dtypes.bfloat16
    assert z.astype(F32).tolist() == [-1, 2]


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_strings(runtime, shape):
    x = np.resize(np.array(["", "a\0b", "naïve ☃"], object), shape)
    [[y]] = runtime.run(identity(helper.make_tensor_type_proto(TensorProto.STRING, None)), [{"x": x}])
    assert (y.dtype, y.shape, y.tolist()) == (object, x.shape, x.tolist())


def test_sequences(runtime):
    kind = helper.make_sequence_type_proto(tensor_type(F32))
    for x in ([np.ones(2, F32), np.zeros((1, 3), F32)], []):
        [[y]] = runtime.run(identity(kind), [{"x": x}])
        assert [(v.shape, v.tolist()) for v in y] == [(v.shape, v.tolist()) for v in x]


def test_a_sequence_beside_a_type_that_numpy_lacks(runtime):
    text = "g (float[n] x) => (bfloat16[n] b, seq(float[n]) s) { b = Cast<to=16>(x) s = SequenceConstruct(x, x) }"
    [[b, s]] = runtime.run(serialized(text), [X])
    assert b.astype(F32).tolist() == [-1, 2]
    assert [v.tolist() for v in s] == [[-1, 2]] * 2


@pytest.mark.parametrize("inner", [tensor_type(F32), helper.make_sequence_type_proto(tensor_type(F32))])
def test_an_optional_without_a_value(runtime, inner):
    [[y]] = runtime.run(identity(helper.make_optional_type_proto(inner)), [{"x": None}])
    assert y is None


def test_an_optional_with_a_value(runtime):
    [[y]] = runtime.run(identity(helper.make_optional_type_proto(tensor_type(F32))), [X])
    assert y.tolist() == [-1, 2]


def map_type(key):
    kind = TypeProto()
    kind.map_type.key_type = key
    kind.map_type.value_type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    return kind


def ml_model(node, x, y):
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph([node], "g", [x], [y])
    return helper.make_model(graph, ir_version=8, opset_imports=imports).SerializeToString()


@pytest.mark.parametrize(
    ("key", "labels"),
    [(TensorProto.INT64, {"classlabels_int64s": [3, 5]}), (TensorProto.STRING, {"classlabels_strings": ["a", "b"]})],
)
def test_a_sequence_of_maps_comes_out(runtime, key, labels):
    [names] = labels.values()
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", **labels)
    kind = helper.make_sequence_type_proto(map_type(key))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])
    data = ml_model(node, x, value_info("y", kind))
    [[y]] = runtime.run(data, [{"x": np.array([[0.1, 0.9], [1, 0]], F32)}])
    assert y == [{names[0]: float(F32(0.1)), names[1]: float(F32(0.9))}, {names[0]: 1.0, names[1]: 0.0}]


def test_a_map_goes_in(runtime):
    node = helper.make_node("DictVectorizer", ["x"], ["y"], domain="ai.onnx.ml", string_vocabulary=["a", "b", "c"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    [[vector]] = runtime.run(
        ml_model(node, value_info("x", map_type(TensorProto.STRING)), y), [{"x": {"c": 1.5, "a": F32(2)}}]
    )
    assert vector.tolist() == [[2, 0, 1.5]]


def test_interface(runtime):
    text = "g (float[n,3] x, int64 s, seq(float[k]) q) => (float[n,3] y) { y = Identity(x) }"
    inputs, outputs = runtime.interface(serialized(text))
    assert inputs == [
        ValueInfo("x", "tensor(float)", ("n", 3)),
        ValueInfo("s", "tensor(int64)", ()),
        ValueInfo("q", "seq(tensor(float))", ()),
    ]
    assert outputs == [ValueInfo("y", "tensor(float)", ("n", 3))]


def test_external_data_is_found_beside_the_path(runtime, tmp_path):
    proto = model("g (float[4] x) => (float[4] y) { y = Add(x, w) }", w=np.arange(4, dtype=F32))
    proto.ir_version = 10
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert (tmp_path / "m.data").exists()
    [[y]] = runtime.run(tmp_path / "m.onnx", [{"x": np.ones(4, F32)}])
    assert y.tolist() == [1, 2, 3, 4]


def test_feeds_may_be_a_generator_and_returned_arrays_are_writable(runtime):
    results = runtime.run(RELU, ({"x": np.full(size, size, F32)} for size in (1, 2)))
    results[1][0][0] = 7
    assert [y.tolist() for [y] in results] == [[1], [7, 2]]


def test_options_reach_onnxruntime(runtime):
    options = RunOptions(session_config={"session.load_model_format": "ORT"})
    with pytest.raises(RuntimeFailure, match="ORT model"):
        runtime.run(RELU, [X], options=options)
    with pytest.raises(ValueError, match="optimization 'most'"):
        RunOptions("most")


# What it refuses


def test_an_unknown_operator_is_named_on_one_line(runtime):
    data = unchecked("g (float[n] x) => (float[n] y) { [first] y = Foo(x) }")
    with pytest.raises(RuntimeFailure) as caught:
        runtime.run(data, [X])
    message = (
        "onnxruntime cannot load the model: node 'first' (Foo): No Op registered for Foo with domain_version of 18"
    )
    assert str(caught.value) == message
    assert (caught.value.stage, caught.value.kind) == ("load", "refused")


def test_a_newer_ir_version_is_told_with_the_limit(runtime, tmp_path):
    proto = onnx.load_from_string(RELU)
    proto.ir_version = 99
    (tmp_path / "new.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(
        RuntimeFailure, match=r"cannot load new.onnx: Unsupported model IR version: 99, max supported IR"
    ):
        runtime.interface(tmp_path / "new.onnx")


@pytest.mark.parametrize(
    ("feed", "reason"),
    [
        ({}, r"Required inputs \(\['x'\]\)"),
        ({"x": np.zeros(2)}, "Unexpected input data type"),
        ({"x": np.zeros((1, 2), F32)}, "Invalid rank for input: x"),
        ({"x": np.zeros(2, F32), "q": np.zeros(2, F32)}, "Invalid input name: q"),
    ],
)
def test_a_wrong_feed_is_refused(runtime, feed, reason):
    with pytest.raises(RuntimeFailure, match=rf"cannot run the model, feed 1: {reason}") as caught:
        runtime.run(RELU, [X, feed])
    assert caught.value.stage == "run"
    assert runtime.run(RELU, [X])[0][0].tolist() == [0, 2]


def test_a_value_without_an_onnx_type_is_the_callers_mistake(runtime):
    with pytest.raises(TypeError, match="input 'x': an array of datetime64"):
        runtime.run(RELU, [{"x": np.zeros(1, "M8[s]")}])
    assert runtime.run(RELU, [X])[0][0].tolist() == [0, 2]


def test_a_combination_that_onnxruntime_cannot_take(runtime):
    text = "g (string[n] t, float[n] x) => (string[n] u, bfloat16[n] b) { u = Identity(t) b = Cast<to=16>(x) }"
    with pytest.raises(RuntimeFailure, match="input 't', which is no numeric tensor"):
        runtime.run(serialized(text), [{"t": np.array(["a", "b"]), **X}])


def test_nothing_leaks_to_the_terminal(capfd):
    with Runtime() as own:
        for data in (b"rubbish", unchecked("g (float[n] x) => (float[n] y) { y = Foo(x) }")):
            with pytest.raises(RuntimeFailure):
                own.run(data, [X])
    assert capfd.readouterr() == ("", "")


# How it dies


@traps
def test_a_crash_in_a_run_is_survived(runtime):
    with pytest.raises(RuntimeFailure) as caught:
        runtime.run(DIVIDE, [{"a": np.array([6]), "b": np.array([-1])}, OVERFLOW])
    assert str(caught.value) == "onnxruntime crashed (SIGFPE), asked to run the model, feed 1"
    assert (caught.value.stage, caught.value.kind) == ("run", "crashed")
    assert runtime.run(RELU, [X])[0][0].tolist() == [0, 2]


@traps
def test_a_crash_in_constant_folding_is_a_crash_at_load(runtime):
    data = serialized("g (int64[1] x) => (int64[1] y) { q = Div(a, b) y = Add(q, x) }", **OVERFLOW)
    stages = []
    for disabled in ((), ("ConstantFolding",)):
        with pytest.raises(RuntimeFailure) as caught:
            runtime.run(data, [{"x": np.array([0])}], options=RunOptions("all", disabled_optimizers=disabled))
        stages.append(caught.value.stage)
    assert stages == ["load", "run"]


@pytest.fixture
def custom_ops(tmp_path):
    """A shared library that prints when it is loaded, and then aborts where OPS_ABORT is set."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "ops.c").write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n__attribute__((constructor)) static void loaded(void) {"
        'puts("welcome"); fputs("first\\nlicense expired\\n", stderr); if (getenv("OPS_ABORT")) abort(); }'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "ops.so", tmp_path / "ops.c"], check=True)
    return RunOptions(custom_ops=tmp_path / "ops.so")


@posix
def test_the_last_words_are_told(custom_ops, monkeypatch, capfd):
    monkeypatch.setenv("OPS_ABORT", "1")
    with Runtime() as own, pytest.raises(RuntimeFailure) as caught:
        own.run(RELU, [X], options=custom_ops)
    assert str(caught.value) == "onnxruntime crashed (SIGABRT), asked to load the model: license expired"
    assert capfd.readouterr() == ("", "")


@posix
@traps
def test_last_words_are_not_those_of_an_earlier_request(custom_ops):
    with Runtime() as own:
        with pytest.raises(RuntimeFailure, match="RegisterCustomOps"):
            own.run(RELU, [X], options=custom_ops)
        with pytest.raises(RuntimeFailure, match=r"asked to run the model$"):
            own.run(DIVIDE, [OVERFLOW])


@posix
def test_a_child_killed_between_requests_is_replaced(runtime):
    runtime.run(RELU, [X])
    process = runtime._child._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert runtime.run(RELU, [X])[0][0].tolist() == [0, 2]


@posix
def test_a_child_killed_in_a_run_is_replaced(runtime):
    runtime.run(RELU, [X])
    killer = threading.Timer(0.3, os.kill, (runtime._child._process.pid, signal.SIGSEGV))
    killer.start()
    with pytest.raises(RuntimeFailure, match=r"crashed \(SIGSEGV\), asked to run the model"):
        runtime.run(ENDLESS, [X])
    killer.join()
    assert runtime.run(RELU, [X])[0][0].tolist() == [0, 2]


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@posix
def test_a_timeout_ends_the_child():
    with Runtime(timeout_s=0.4) as own:
        own.run(RELU, [X])
        pid = own._child._process.pid
        start = time.monotonic()
        with pytest.raises(RuntimeFailure, match=r"did not run the model within 0.4 s") as caught:
            own.run(ENDLESS, [X])
        assert time.monotonic() - start < 10
        assert caught.value.kind == "timeout"
        assert gone(pid)
        assert own.run(RELU, [X])[0][0].tolist() == [0, 2]


@posix
def test_an_interrupt_leaves_nothing_in_the_pipe(runtime):
    runtime.run(RELU, [X])
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        runtime.run(ENDLESS, [X])
    assert runtime.run(RELU, [X])[0][0].tolist() == [0, 2]


@contextlib.contextmanager
def script(program, *arguments):
    """A Python program in a process group of its own, and the pid of its Runtime's child, which it prints first."""
    start = """
        import os, signal, sys, threading, time
        import numpy as np
        from onnxcompress.runtime import Runtime
        runtime, x = Runtime(), {"x": np.zeros(2, np.float32)}
        runtime.version
        print(runtime._child._process.pid, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(program), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, text=True, **pipes) as process:
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            for pid in (process.pid, child):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@posix
def test_ctrl_c_reaches_the_parent_alone(tmp_path):
    (tmp_path / "endless.onnx").write_bytes(ENDLESS)
    (tmp_path / "relu.onnx").write_bytes(RELU)
    program = """
        try:
            print("asleep", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            runtime.run(sys.argv[1], [x])
            print(runtime._child._process.pid, flush=True)
        runtime.run(sys.argv[2], [x])
    """
    with script(program, tmp_path / "relu.onnx", tmp_path / "endless.onnx") as (process, child):
        assert process.stdout.readline() == "asleep\n"
        os.killpg(process.pid, signal.SIGINT)
        assert int(process.stdout.readline()) == child  # it has not noticed
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert stderr.count("Traceback") == 1
        assert stderr.strip().endswith("KeyboardInterrupt")
        assert gone(child)


@posix
def test_the_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    (tmp_path / "endless.onnx").write_bytes(ENDLESS)
    program = """
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        runtime.run(sys.argv[1], [x])
    """
    with script(program, tmp_path / "endless.onnx") as (process, child):
        assert process.wait(20) == -signal.SIGKILL
        assert gone(child)


@posix
def test_closing_and_collecting_end_the_child():
    own, forgotten = Runtime(), Runtime()
    pids = [each._child._process.pid for each in (own, forgotten)]
    own.close()
    own.close()
    with pytest.raises(ValueError, match="closed"):
        own.run(RELU, [X])
    del forgotten
    gc.collect()
    assert all(gone(pid) for pid in pids)


def test_modules_in_the_working_folder_are_not_imported(tmp_path, monkeypatch):
    for name in ("json", "numpy", "ctypes", "site"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the working folder')")
    monkeypatch.chdir(tmp_path)
    with Runtime() as own:
        assert own.run(RELU, [X])[0][0].tolist() == [0, 2]


def test_an_onnxruntime_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with Runtime() as own, pytest.raises(RuntimeFailure) as caught:
        own.run(RELU, [X])
    assert caught.value.stage == "start"
    assert "ImportError: libgomp.so.1: cannot open shared object file" in str(caught.value)


# What it measures


def test_latency_takes_turns(runtime):
    work = serialized(
        "g (float[n,n] x) => (float[n,n] y) { "
        + " ".join(f"a{i} = MatMul(x, x)" for i in range(20))
        + " y = MatMul(x, x) }"
    )
    once = serialized("g (float[n,n] x) => (float[n,n] y) { y = MatMul(x, x) }")
    feed = {"x": np.eye(96, dtype=F32)}
    options = RunOptions("off", threads=1)
    slow, fast = runtime.latency([work, once], feed, options=options, min_runs=5, max_runs=30, budget_s=5)
    assert slow.shape == fast.shape == (30,)
    assert slow.dtype == np.float64
    assert (slow > 0).all()
    ratio, low, high = median_ratio(slow, fast)
    assert low <= ratio <= high
    assert ratio > 5  # 21 products for one: 9.9 to 11.2 on a busy machine, where the call itself costs as much as one


def test_latency_heeds_its_budget(runtime):
    [few] = runtime.latency([RELU], X, min_runs=7, budget_s=0)
    assert few.shape == (7,)
    with pytest.raises(ValueError, match="min_runs 9, max_runs 3"):
        runtime.latency([RELU], X, min_runs=9, max_runs=3)


def test_latency_of_a_model_that_is_refused(runtime):
    with pytest.raises(RuntimeFailure, match="Foo"):
        runtime.latency([RELU, unchecked("g (float[n] x) => (float[n] y) { y = Foo(x) }")], X)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_model_has_every_place_in_the_round_equally_often(count):
    rounds = [turn(number, count) for number in range(2 * count)]
    for place in range(count):
        assert sorted(order[place] for order in rounds) == sorted(list(range(count)) * 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_steady_drift_falls_on_all_models_alike_after_two_rounds(count):
    for first in range(0, 8, 2):
        runs = turn(first, count) + turn(first + 1, count)
        assert len({sum(time for time, model in enumerate(runs) if model == m) for m in range(count)}) == 1


def test_load_time(runtime, tmp_path):
    weights = np.zeros((1500, 1500), F32)
    heavy = serialized("g (float[n,1500] x) => (float[n,1500] y) { y = MatMul(x, w) }", w=weights)
    (tmp_path / "heavy.onnx").write_bytes(heavy)
    light_ms = runtime.load_time(RELU)
    assert 0 < light_ms < runtime.load_time(tmp_path / "heavy.onnx")  # 0.7 and 54 ms on a busy machine


def test_peak_memory():
    text = "g (int64[1] x) => (float[n] y) { y = ConstantOfShape(x) }"
    small, large = (peak_memory_bytes(serialized(text), {"x": np.array([size])}) for size in (1, 2**24))
    assert small < 2**25  # 9.2 MB
    assert 2**26 <= large - small < 1.1 * 2**26  # 64 MiB of zeros: 1.03 times that


def test_peak_memory_counts_nothing_that_came_before():
    data = serialized("g (bfloat16[n] x) => (int64[1] y) { y = Shape(x) }")
    feed = {"x": np.zeros(2**25, ml_dtypes.bfloat16)}  # 64 MiB, there twice for a moment while it is unpacked
    assert peak_memory_bytes(data, feed) < 2**25


def test_ratios():
    rng = np.random.default_rng(0)
    drift = np.exp(np.cumsum(rng.normal(scale=0.1, size=101)))  # the machine gets slower and faster
    a, b = 2 * drift * np.exp(rng.normal(scale=0.01, size=101)), drift
    for measure in (median_ratio, geomean_ratio):
        ratio, low, high = measure(a, b)
        assert 1.99 < low < ratio < high < 2.01
        assert measure(b, a)[0] == pytest.approx(1 / ratio, rel=1e-12)
        assert measure(a, a) == (1, 1, 1)
    assert geomean_ratio([2, 8], [1, 1])[0] == pytest.approx(4, rel=1e-12)
    assert median_ratio([1, 9, 100], [1, 3, 1])[0] == pytest.approx(3, rel=1e-12)
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        median_ratio([1, 2], [1, 2, 3])


def test_importing_the_package_imports_no_onnxruntime():
    code = "import sys, onnxcompress.runtime as r; r.Runtime().close(); sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_child_imports_little():
    code = "import sys, onnxcompress.runtime_worker; print(*[m for m in sys.modules if m.startswith(('onnx', 'ml_d'))])"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.split()
    assert loaded == ["onnxcompress", "onnxcompress.runtime_frames", "onnxcompress.runtime_worker"]
