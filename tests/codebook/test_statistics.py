"""Statistics of layers against brute force: the whole net run at once, rows unfolded naively."""

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcompress.codebook.activations import Activations
from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.moments import Sums, add_batch, chosen
from onnxcompress.codebook.narrow import to_int8
from onnxcompress.codebook.rows import RowSource
from onnxcompress.codebook.statistics import Calibration
from onnxcompress.errors import QuantizationError
from onnxcompress.model_io import load, to_proto
from onnxcompress.runtime import Runtime
from onnxcompress.testing import graph_of, model, run

RNG = np.random.default_rng(0)
EVERY_ROW = 1 << 30


def rand(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as one:
        yield one


NET = """g (float[N,4,10,9] x) => (float[?,?] y) {
    a = Conv<pads = [1, 1, 1, 1], strides = [2, 1]>(x, W1, b1)
    r = Relu(a)
    b = Conv<pads = [1, 1, 1, 1], group = 2>(r, W2)
    s = Add(b, r)
    c = Conv(s, W3, b3)
    d = ConvTranspose<strides = [2, 2]>(s, W4)
    e = GlobalAveragePool(c)
    f = GlobalAveragePool(d)
    h = Add(e, f)
    k = Flatten(h)
    m = MatMul(k, W5)
    n = Add(m, b5)
    l = Tanh(n)
    y = Gemm<transB = 1>(l, W6)
}"""


def net_weights():
    return {
        "W1": rand(6, 4, 3, 3) / 6,
        "b1": rand(6),
        "W2": rand(6, 3, 3, 3) / 5,
        "W3": rand(8, 6, 1, 1),
        "b3": rand(8),
        "W4": rand(6, 8, 2, 2),
        "W5": rand(8, 5),
        "b5": rand(5),
        "W6": rand(3, 5),
    }


def naive_rows(x, kernel=(1, 1), strides=(1, 1), pads=(0, 0), groups=1):
    """(groups, n, D) one patch at a time."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (pads[0],) * 2, (pads[1],) * 2])
    rows = []
    for sample in x:
        for i in range(0, sample.shape[1] - kernel[0] + 1, strides[0]):
            for j in range(0, sample.shape[2] - kernel[1] + 1, strides[1]):
                patch = sample[:, i : i + kernel[0], j : j + kernel[1]]
                rows.append(patch.reshape(groups, -1))
    return np.array(rows).transpose(1, 0, 2)


def spread(x, stride):
    wide = np.zeros((*x.shape[:2], *(stride * (n - 1) + 1 for n in x.shape[2:])))
    wide[:, :, ::stride, ::stride] = x
    return wide


# Input tensor of each layer of NET, and its rows.
ROWS = {
    "W1": ("x", lambda x: naive_rows(x, (3, 3), (2, 1), (1, 1))),
    "W2": ("r", lambda x: naive_rows(x, (3, 3), (1, 1), (1, 1), groups=2)),
    "W3": ("s", naive_rows),
    # The kernel turned round, so that its first position meets the last pixel.
    "W4": ("s", lambda x: naive_rows(spread(x, 2), (2, 2), (1, 1), (1, 1)).reshape(1, -1, 6, 2, 2)[..., ::-1, ::-1]),
    "W5": ("k", lambda x: x[None].astype(np.float64)),
    "W6": ("l", lambda x: x[None].astype(np.float64)),
}


def tensor_of(proto, name, feeds):
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    if name in feeds:
        return feeds[name]
    exposed.graph.output.append(onnx.ValueInfoProto(name=name))
    return run(exposed, feeds)[-1]


def brute_force(proto, quantized, layer, samples):
    tensor, unfold = ROWS[layer.name]
    q, f = (
        np.concatenate([unfold(tensor_of(m, tensor, x)).reshape(layer.groups, -1, layer.length) for x in samples], 1)
        for m in (quantized, proto)
    )
    return q, f


def assert_moments(found, q, f, rel=2e-6):
    """Measured 4e-7 at worst: the rows are multiplied in float32."""

    def close(actual, expected):
        assert np.abs(actual - expected).max() <= rel * np.abs(expected).max()

    assert found.rows == q.shape[1]
    close(found.gram, q.transpose(0, 2, 1) @ q)
    close(found.mean, q.mean(axis=1))
    if found.cross is None:
        np.testing.assert_array_equal(q, f)
        return
    close(found.cross, q.transpose(0, 2, 1) @ f)
    close(found.float_gram, f.transpose(0, 2, 1) @ f)
    close(found.float_mean, f.mean(axis=1))


def skipped(proto, quantized, name, layer, samples, axis=1):
    """(groups, n, outputs / group) of what the output is added to, in both nets, outputs on an axis."""
    both = []
    for net in (quantized, proto):
        values = [np.moveaxis(tensor_of(net, name, x), axis, -1).reshape(-1, layer.outputs) for x in samples]
        rows = np.concatenate(values).astype(np.float64)
        both.append(rows.reshape(len(rows), layer.groups, -1).transpose(1, 0, 2))
    return both


def assert_skip(found, q, f, s_q, s_f, rel=2e-6):
    """Measured 5e-7 at worst."""
    c = s_f - s_q
    for actual, expected in (
        (found.skip.cross, q.transpose(0, 2, 1) @ c),
        (found.skip.float_cross, f.transpose(0, 2, 1) @ c),
        (found.skip.mean, c.mean(axis=1)),
        (np.array(found.skip.power), np.array((c**2).sum())),
    ):
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= rel * np.abs(expected).max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_statistics_are_those_of_both_nets(runtime, batch, memory):
    """Two quantized forms stand in a model written anew at each stage, which is run as a whole."""
    weights = net_weights()
    proto = model(NET, **weights)
    graph, written = graph_of(proto), graph_of(model(NET, **weights))
    layers, _ = find_layers(graph)
    later = {layer.name: layer for layer in find_layers(written)[0]}
    samples = [{"x": rand(batch, 4, 10, 9)} for _ in range(4)]
    seen = []
    with Calibration(
        graph, layers, samples, runtime=runtime, rows_per_input=EVERY_ROW, memory_limit_bytes=memory
    ) as calibration:
        for stage in calibration.stages():
            seen.append([layer.name for layer in stage])
            quantized_net = to_proto(written)
            for layer in stage:
                for part, numbers in calibration._parts.items():
                    own = [samples[i] for i in numbers]
                    found = calibration.statistics(layer, part)
                    rows = brute_force(proto, quantized_net, layer, own)
                    assert_moments(found, *rows)
                    assert (found.cross is None) == (layer.name == "W1")
                    assert (found.skip is None) == (layer.name != "W2")
                    if found.skip is not None:
                        assert_skip(found, *rows, *skipped(proto, quantized_net, "r", layer, own))
            for layer in stage:
                form = to_int8(layer.matrix() * np.float32(1.05), rand(layer.outputs) if layer.has_bias else None)
                encode(written, later[layer.name], form)
                encode(graph, layer, form)  # the calibration does not see it
                calibration.replace(layer, form.decode(), form.bias)
        assert seen == [["W1"], ["W2"], ["W3", "W4"], ["W5"], ["W6"]]
        # Nothing runs before the first stage; four segments of each net follow, for each sample.
        assert calibration.runs == (4 + 4) * 4


def test_tensors_beyond_the_limit_go_to_files(tmp_path):
    store = Activations(150_000, tmp_path)
    first, second = rand(30_000), rand(40_000)
    store.put("a", 0, first)
    store.put("b", 0, second)
    store.put("b", 1, rand(4))
    assert store.memory_bytes == 120_000 and store.file_bytes == 160_000 and store.peak_memory_bytes == 120_000
    np.testing.assert_array_equal(store.get("b", 0), second)
    (path,) = tmp_path.glob("*/*.bin")
    store.drop("b")
    assert not path.exists() and store.names() == {"a"} and store.file_bytes == 0
    store.put("c", 0, second)
    store.close()
    assert not list(tmp_path.iterdir())


def test_one_input_is_summed_once(runtime):
    text = """g (float[N,5,6] x) => (float[?,?,?] y) {
        q = MatMul(x, Wq)  k = MatMul(x, Wk)  v = MatMul(x, Wv)  t = Add(q, k)  y = Mul(t, v)
    }"""
    graph = graph_of(model(text, Wq=rand(6, 4), Wk=rand(6, 4), Wv=rand(6, 4)))
    layers, _ = find_layers(graph)
    with Calibration(graph, layers, [{"x": rand(2, 5, 6)}], runtime=runtime) as calibration:
        (stage,) = calibration.stages()
        del stage
    with Calibration(graph, layers, [{"x": rand(2, 5, 6)}], runtime=runtime) as calibration:
        for stage in calibration.stages():
            first, *others = (calibration.statistics(layer) for layer in stage)
            assert len(others) == 2 and all(other is first for other in others)
            assert calibration.statistics(stage[0], "held_out") is None  # there is one sample
            assert calibration.runs == 0


def test_shared_weight_sums_both_inputs(runtime):
    text = "g (float[N,6] x) => (float[?,?] y) { a = MatMul(x, W)  b = Tanh(a)  y = MatMul(b, W) }"
    weight = rand(6, 6)
    proto = model(text, W=weight)
    graph = graph_of(proto)
    layers, _ = find_layers(graph)
    x = rand(7, 6)
    with Calibration(graph, layers, [{"x": x}], runtime=runtime) as calibration:
        stages = []
        for stage in calibration.stages():
            stages.append([layer.name for layer in stage])
            found = calibration.statistics(stage[0])
            both = np.concatenate([x, np.tanh(x @ weight)]).astype(np.float64)
            assert found.rows == 14
            np.testing.assert_allclose(found.gram[0], both.T @ both, rtol=1e-5, atol=1e-5)  # measured 2e-7
        assert stages == [["W"]]


def test_what_follows_a_shared_weight_waits_for_it(runtime):
    """V reads late in one place and early in another; Z depends on both, U on the early one alone."""
    text = """g (float[N,6] x, float[N,6] z) => (float[?,?] y, float[?,?] e) {
        a = MatMul(x, W)  b = MatMul(a, V)  c = MatMul(z, V)  d = Add(b, c)  e = MatMul(c, U)  y = MatMul(d, Z)
    }"""
    weights = {name: rand(6, 6) for name in "WVUZ"}
    graph = graph_of(model(text, **weights))
    layers, _ = find_layers(graph)
    x, z = rand(4, 6), rand(4, 6)
    with Calibration(graph, layers, [{"x": x, "z": z}], runtime=runtime) as calibration:
        names = []
        for stage in calibration.stages():
            names.append([layer.name for layer in stage])
            for layer in stage:
                if layer.name == "Z":
                    q = x @ (2 * weights["W"]) @ (2 * weights["V"]) + z @ weights["V"]
                    f = x @ weights["W"] @ weights["V"] + z @ weights["V"]
                    assert_moments(calibration.statistics(layer), *(v[None].astype(np.float64) for v in (q, f)))
                calibration.replace(layer, layer.matrix() * 2)
        assert names == [["W", "U"], ["V"], ["Z"]]


MODELS = {
    "sequence": """g (float[N,6] x) => (float[?,?] y) {
        a = MatMul(x, W)  s = SplitToSequence<axis = 1>(a)  zero = Constant<value_int = 0>()  b = MatMul(a, V)
        u = SequenceAt(s, zero)  z = Mul(u, b)  y = MatMul(z, U)
    }""",
    "loop": """g (float[N,6] x) => (float[?,?] y) {
        a = MatMul(x, W)  n = Constant<value_int = 2>()  t = Constant<value = bool {1}>()
        b = Loop(n, t, a) <body = l (int64 i, bool p, float[?,?] v) => (bool q, float[?,?] w) {
            q = Identity(p)  r = MatMul(v, V)  w = Add(r, a)
        }>
        y = MatMul(b, U)
    }""",
    "random": """g (float[N,6] x) => (float[?,?] y) {
        r = RandomNormalLike(x)  d = Add(x, r)  a = MatMul(d, W)  b = Relu(a)  e = Add(b, r)  y = MatMul(e, V)
    }""",
    "function": """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N,6] x) => (float[A,B] y) { a = MatMul(x, W)  b = local.f(a)  y = MatMul(b, V) }
        <domain: "local", opset_import: ["" : 17]> f (p) => (q) { q = Relu(p) }""",
}


@pytest.mark.parametrize("name", MODELS)
def test_what_crosses_a_cut(runtime, name):
    """Sequences, captured tensors, random numbers that both nets must share, functions of the model."""
    if name == "function":
        proto = onnx.parser.parse_model(MODELS[name])
        proto.graph.initializer.extend(numpy_helper.from_array(rand(6, 6) / 3, w) for w in "WV")
    else:
        proto = model(MODELS[name], **{w: rand(6, 6) / 3 for w in "WVU" if f", {w})" in MODELS[name]})
    graph = graph_of(proto)
    layers, _ = find_layers(graph)
    samples = [{"x": rand(4, 6)} for _ in range(3)]
    with Calibration(graph, layers, samples, runtime=runtime) as calibration:
        for stage in calibration.stages():
            for layer in stage:
                found = calibration.statistics(layer)
                assert (found is None) == layer.in_body
                if (
                    layer is [one for one in layers if not one.in_body][-1]
                ):  # weights are the same in both nets: so must be the rows
                    np.testing.assert_allclose(found.gram, found.cross, rtol=1e-6, atol=1e-6)  # measured 0
                calibration.replace(layer, layer.matrix())


def test_integers_dynamic_sizes_and_ids(runtime):
    """Samples of different lengths, a mask computed from shapes, an embedding whose ids are counted."""
    text = """g (int64[N,L] ids, int64[N,L] mask) => (float[?,?,?] y) {
        e = Gather(E, ids)  f = Cast<to = 1>(mask)  two = Constant<value_ints = [2]>()  u = Unsqueeze(f, two)
        p = Mul(e, u)  s = Shape(p)  z = Expand(one, s)  q = Add(p, z)  y = MatMul(q, W)
    }"""
    table = rand(20, 6)
    proto = model(text, E=table, W=rand(6, 4), one=np.array([1.0], np.float32))
    graph = graph_of(proto)
    layers, _ = find_layers(graph)
    samples = [{"ids": RNG.integers(-20, 20, (1, n)), "mask": RNG.integers(0, 2, (1, n))} for n in (3, 7, 5, 4, 6)]
    with Calibration(graph, layers, samples, runtime=runtime, held_out_fraction=0.4) as calibration:
        for stage in calibration.stages():
            (layer,) = stage
            if layer.kind == "Gather":
                assert calibration.statistics(layer) is None and "ids" in calibration.why_no_statistics(layer)
                counts = sum(calibration.counts(layer, part) for part in ("fit", "held_out"))
                expected = np.bincount(np.concatenate([s["ids"][0] % 20 for s in samples]), minlength=20)
                np.testing.assert_array_equal(counts, expected)
                calibration.replace(layer, layer.matrix() + 1)
                continue
            found = [calibration.statistics(layer, part) for part in ("fit", "held_out")]
            q = [((table + 1)[s["ids"]] * s["mask"][..., None] + 1).reshape(-1, 6).astype(np.float64) for s in samples]
            f = [(table[s["ids"]] * s["mask"][..., None] + 1).reshape(-1, 6).astype(np.float64) for s in samples]
            for statistics, part in zip(found, ("fit", "held_out"), strict=True):
                numbers = calibration._parts[part]
                assert_moments(statistics, *(np.concatenate([rows[i] for i in numbers])[None] for rows in (q, f)))


def recurrent_model(omit_states=False):
    weights = {"W": rand(2, 16, 5), "R": rand(2, 16, 4), "V": rand(8, 3)}
    outputs = ["", "h"] if omit_states else ["y", "h"]
    nodes = [
        helper.make_node("Tanh", ["x"], ["t"]),
        helper.make_node("Expand", ["zero", "size"], ["start"]),
        helper.make_node(
            "LSTM", ["t", "W", "R", "", "", "start"], outputs, "cell", hidden_size=4, direction="bidirectional"
        ),
        helper.make_node("Transpose", ["h"], ["k"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["k", "flat"], ["r"]),
        helper.make_node("MatMul", ["r", "V"], ["out"]),
    ]
    init = {**weights, "zero": np.float32(0.5), "size": np.array([2, 2, 4]), "flat": np.array([2, 8])}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [3, 2, 5])],
        [helper.make_tensor_value_info("out", 1, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in init.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("omit_states", [False, True])
def test_recurrence(runtime, omit_states):
    proto = recurrent_model(omit_states)
    graph = load(proto)
    layers, _ = find_layers(graph)
    x = rand(3, 2, 5)
    with_states = onnx.ModelProto()
    with_states.CopyFrom(proto)
    with_states.graph.node[2].output[:] = ["all_states", "h"]
    states = tensor_of(with_states, "all_states", {"x": x}).astype(np.float64)
    before = np.full((3, 2, 2, 4), 0.5)  # (steps, directions, batch, hidden)
    before[1:, 0], before[:-1, 1] = states[:-1, 0], states[1:, 1]
    with Calibration(graph, layers, [{"x": x}], runtime=runtime) as calibration:
        stages = []
        for stage in calibration.stages():
            stages.append([layer.kind for layer in stage])
            for layer in stage:
                found = calibration.statistics(layer)
                if layer.kind == "LSTM W":
                    assert_moments(found, *[np.tanh(x).reshape(1, 6, 5).astype(np.float64)] * 2)
                elif layer.kind == "LSTM R":
                    assert_moments(found, *[before.transpose(1, 0, 2, 3).reshape(2, 6, 4)] * 2)
                else:
                    assert found.cross is not None
            for layer in stage:
                calibration.replace(
                    layer, layer.matrix() * np.float32(1.1), rand(layer.outputs) if layer.has_bias else None
                )
        assert stages == [["LSTM W", "LSTM R"], ["MatMul"]]


def test_body_is_data_free_and_its_inputs_are_there(runtime):
    text = """g (bool c, float[N,6] x) => (float[?,?] y) {
        a = MatMul(x, W)
        b = If (c) <then_branch = t () => (float[?,?] u) { u = MatMul(a, V) },
                    else_branch = e () => (float[?,?] v) { v = Add(a, k) }>
        y = MatMul(b, Z)
    }"""
    graph = graph_of(model(text, W=rand(6, 6), V=rand(6, 6), Z=rand(6, 6), k=rand(6)))
    layers, _ = find_layers(graph)
    samples = [{"c": np.array(i % 2 == 0), "x": rand(3, 6)} for i in range(4)]
    with Calibration(graph, layers, samples, runtime=runtime) as calibration:
        names = []
        for stage in calibration.stages():
            names.append([layer.name for layer in stage])
            for layer in stage:
                assert (calibration.statistics(layer) is None) == (layer.name == "V")
                if layer.name == "V":
                    assert "body" in calibration.why_no_statistics(layer)
                calibration.replace(layer, layer.matrix() * 2)
        assert names == [["V"], ["W"], ["Z"]]


def test_sizes_that_depend_on_values(runtime):
    """Rows that exist in one net only: the float net's rows have no partners, and are left out."""
    text = """g (float[N,6] x) => (float[?,?] y) {
        a = Gemm(x, W)  m = ReduceMax<axes = [1], keepdims = 0>(a)  p = Greater(m, zero)  r = Compress<axis = 0>(a, p)
        y = Gemm(r, V)
    }"""
    graph = graph_of(model(text, W=rand(6, 6), V=rand(6, 3), zero=np.float32(0.5)))
    layers, _ = find_layers(graph)
    with Calibration(graph, layers, [{"x": rand(40, 6)}], runtime=runtime) as calibration:
        for stage in calibration.stages():
            found = calibration.statistics(stage[0])
            if stage[0].name == "V":
                assert found.cross is None and found.rows < 40
            calibration.replace(stage[0], stage[0].matrix() * np.float32(0.5))


def test_without_data():
    graph = graph_of(model(NET, **net_weights()))
    layers, _ = find_layers(graph)
    with Calibration(graph, layers, None, runtime=None) as calibration:
        (stage,) = calibration.stages()
        assert stage == layers
        assert all(calibration.statistics(layer) is None for layer in stage)
        assert calibration.why_no_statistics(stage[0]) == "there are no samples"
        calibration.replace(stage[0], stage[0].matrix())


def test_limits_and_mistakes(runtime):
    graph = graph_of(model(NET, **net_weights()))
    layers, _ = find_layers(graph)
    samples = [{"x": rand(1, 4, 10, 9)}] * 2
    with Calibration(graph, layers, samples, runtime=runtime, gram_limit_bytes=24 * 36**2 - 1) as calibration:
        stage = next(calibration.stages())
        assert calibration.statistics(stage[0]) is None and "31104 bytes" in calibration.why_no_statistics(stage[0])
        with pytest.raises(ValueError, match="not of the present stage"):
            calibration.statistics(layers[-1])
    with pytest.raises(ValueError, match="held_out_fraction"):
        Calibration(graph, layers, samples, runtime=runtime, held_out_fraction=1.0)
    plain = graph_of(model("g (float[N,6] x) => (float[?,?] y) { y = MatMul(x, W) }", W=rand(6, 4)))
    layers, _ = find_layers(plain)
    with Calibration(plain, layers, [{"x": rand(2, 6)}], runtime=runtime) as calibration:
        next(calibration.stages())
        with pytest.raises(QuantizationError, match="no place for a bias"):
            calibration.replace(layers[0], layers[0].matrix(), rand(4))


def test_overridable_input_at_its_default(runtime):
    proto = model("g (float[N,6] x, float[1] s) => (float[?,?] y) { a = Mul(x, s)  y = MatMul(a, W) }", W=rand(6, 4))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([3.0], np.float32), "s"))
    graph = graph_of(proto)
    layers, _ = find_layers(graph)
    x = rand(5, 6)
    for sample, factor in (({"x": x}, 3), ({"x": x, "s": np.array([2.0], np.float32)}, 2)):
        with Calibration(graph, layers, [sample], runtime=runtime) as calibration:
            for stage in calibration.stages():
                assert_moments(calibration.statistics(stage[0]), *[factor * x[None].astype(np.float64)] * 2)


def test_fixed_part_of_the_rows():
    numbers = chosen(1000, 100, np.random.default_rng(0))
    assert len(numbers) == 100 and (numbers // 10 == np.arange(100)).all()
    np.testing.assert_array_equal(chosen(7, 9, np.random.default_rng(0)), np.arange(7))
    source = RowSource("last axis", "x")
    x, y = rand(1000, 3), rand(1000, 3)
    sums = Sums(1, 3, paired=True)
    add_batch(sums, source, [x], [y], 100, np.random.default_rng(0))
    assert_moments(sums.statistics(), x[None, numbers].astype(np.float64), y[None, numbers].astype(np.float64))


def test_pieces_give_the_sum(monkeypatch):
    """More rows than one piece holds, in both nets."""
    monkeypatch.setattr("onnxcompress.codebook.moments.PIECE_ROWS", 7)
    source = RowSource("last axis", "x")
    batches = [(rand(n, 3), rand(n, 3)) for n in (10, 3, 26)]
    sums = Sums(1, 3, paired=True)
    for x, y in batches:
        add_batch(sums, source, [x], [y], EVERY_ROW, np.random.default_rng(0))
    q, f = (np.concatenate(side)[None].astype(np.float64) for side in zip(*batches, strict=True))
    assert_moments(sums.statistics(), q, f)
    assert Sums(1, 3, paired=False).statistics() is None


def test_same_seed_same_statistics(runtime):
    graph = graph_of(model(NET, **net_weights()))
    layers, _ = find_layers(graph)
    samples = [{"x": rand(2, 4, 10, 9)} for _ in range(3)]
    grams = []
    for seed in (0, 0, 1):
        with Calibration(graph, layers, samples, runtime=runtime, seed=seed) as calibration:
            stage = next(calibration.stages())
            grams.append(calibration.statistics(stage[0]).gram)
    same, other = (np.array_equal(grams[0], gram) for gram in grams[1:])
    assert same and not other
    assert len(list(itertools.chain(*calibration._parts.values()))) == 3


# -- what an output is added to --------------------------------------------------------------------------------------

ONE, SQUARE = (6, 4, 1, 1), (6, 6, 1, 1)
PATCHES = (6, 3, 3, 3)


def last(x):
    return x.reshape(1, -1, x.shape[-1]).astype(np.float64)


def grouped(x):
    return naive_rows(x, (3, 3), (1, 1), (1, 1), groups=2)


def turned(x):
    return grouped(x).reshape(2, -1, 3, 3, 3)[..., ::-1, ::-1].reshape(2, -1, 27)


SKIPS = {  # nodes, weights, rows of B and of what tensor, the tensor that is added and its axis of outputs
    "right": ("a = Conv(x, A) y = Conv(a, B) z = Add(y, a)", {"A": ONE, "B": SQUARE}, naive_rows, "a", "a", 1),
    "left": ("a = Conv(x, A) y = Conv(a, B) z = Add(a, y)", {"A": ONE, "B": SQUARE}, naive_rows, "a", "a", 1),
    "groups": (
        "a = Conv(x, A) y = Conv<group = 2, pads = [1, 1, 1, 1]>(a, B) z = Add(y, a)",
        {"A": ONE, "B": PATCHES},
        grouped,
        "a",
        "a",
        1,
    ),
    "ConvTranspose": (
        "a = Conv(x, A) y = ConvTranspose<group = 2, pads = [1, 1, 1, 1]>(a, B) z = Add(y, a)",
        {"A": ONE, "B": PATCHES},
        turned,
        "a",
        "a",
        1,
    ),
    "MatMul": (
        "a = MatMul(x, A) t = Tanh(a) y = MatMul(t, B) z = Add(y, a)",
        {"A": (5, 6), "B": (6, 6)},
        last,
        "t",
        "a",
        3,
    ),
    "bias": (
        "a = MatMul(x, A) t = Tanh(a) y = MatMul(t, B) u = Add(y, v) z = Add(a, u)",
        {"A": (5, 6), "B": (6, 6), "v": (6,)},
        last,
        "t",
        "a",
        3,
    ),
    "projection": (
        "p = Conv(x, A) h = Conv(x, C) r = Relu(h) y = Conv(r, B) z = Add(y, p)",
        {"A": ONE, "B": (6, 8, 1, 1), "C": (8, 4, 1, 1)},
        naive_rows,
        "r",
        "p",
        1,
    ),
    "input untouched": (
        "p = Conv(x, A) s = Relu(p) w = Conv(s, C) y = Conv(x, B) u = Add(w, y) z = Relu(u)",
        {"A": ONE, "C": SQUARE, "B": ONE},
        naive_rows,
        "x",
        None,
        1,
    ),
}


def skips(runtime, body, weights, look):
    """Call ``look(layer, statistics, quantized net, own samples)`` for each layer; each is disturbed after it."""
    text = f"g (float[N,4,6,5] x) => (float[?,?,?,?] z) {{ {body} }}"
    graph, changed = graph_of(model(text, **weights)), graph_of(model(text, **weights))
    layers, _ = find_layers(graph)
    later = {layer.name: layer for layer in find_layers(changed)[0]}
    samples = [{"x": rand(2, 4, 6, 5)} for _ in range(4)]
    with Calibration(graph, layers, samples, runtime=runtime, rows_per_input=EVERY_ROW) as calibration:
        own = [samples[i] for i in calibration._parts["fit"]]
        for stage in calibration.stages():
            net = to_proto(changed)
            for layer in stage:
                look(layer, calibration.statistics(layer), net, own)
            for layer in stage:
                form = to_int8(layer.matrix() * np.float32(1.05))
                encode(changed, later[layer.name], form)
                calibration.replace(layer, form.decode())


@pytest.mark.parametrize("name", SKIPS)
def test_what_the_output_is_added_to(runtime, name):
    body, shapes, unfold, source, skip, axis = SKIPS[name]
    weights = {key: rand(*shape) for key, shape in shapes.items()}
    proto = model(f"g (float[N,4,6,5] x) => (float[?,?,?,?] z) {{ {body} }}", **weights)
    found = {}

    def look(layer, statistics, net, own):
        found[layer.name] = statistics.skip is not None
        if layer.name == "B" and skip is not None:
            q, f = (np.concatenate([unfold(tensor_of(m, source, x)) for x in own], 1) for m in (net, proto))
            assert_moments(statistics, q, f)
            assert_skip(statistics, q, f, *skipped(proto, net, skip, layer, own, axis))

    skips(runtime, body, weights, look)
    # Where both operands come from layers, the one that is quantized last knows of the other.
    assert [key for key, given in found.items() if given] == (["B"] if skip is not None else ["C"])


NO_SKIP = {
    "another reader": ("a = Conv(x, A) y = Conv(a, B) r = Relu(y) u = Add(y, a) z = Add(u, r)", {}),
    "not a sum": ("a = Conv(x, A) y = Conv(a, B) z = Mul(y, a)", {}),
    "broadcast": ("a = Conv(x, A) m = GlobalAveragePool(a) y = Conv(a, B) z = Add(y, m)", {}),
    "output is broadcast": ("a = Conv(x, A) m = GlobalAveragePool(a) y = Conv(m, B) z = Add(y, a)", {}),
    "same in both nets": ("a = Conv(x, A) y = Conv(a, B) z = Add(y, s)", {"s": (1, 6, 6, 5)}),
    "twice": ("a = Conv(x, A) y = Conv(a, B) z = Add(y, y)", {}),
    "an activation between": ("a = Conv(x, A) y = Conv(a, B) r = Relu(y) z = Add(r, a)", {}),
}


@pytest.mark.parametrize("name", NO_SKIP)
def test_no_skip(runtime, name):
    body, more = NO_SKIP[name]
    weights = {"A": rand(*ONE), "B": rand(*SQUARE), **{key: rand(*shape) for key, shape in more.items()}}
    seen = []

    def look(layer, statistics, net, own):
        assert statistics.skip is None
        seen.append(layer.name)

    skips(runtime, body, weights, look)
    assert seen == ["A", "B"]


@pytest.mark.parametrize("paired", [False, True])
def test_what_hardly_varies_keeps_its_variance(paired):
    rng = np.random.default_rng(0)
    spread = np.array([1.0, 0.05, 0.05, 1.0])
    rows = rng.normal(size=(1, 4000, 4)) * spread + np.array([0.5, 400.0, -900.0, 3.0])
    mixed = rows @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.2, 0, 0, 1.0]])
    quantized, floats = mixed.astype(np.float32), (mixed + 0.03 * rng.normal(size=mixed.shape)).astype(np.float32)
    skip = (quantized[:, :, :2] - floats[:, :, :2]).astype(np.float32)
    sums = Sums(1, 4, paired, 2 if paired else 0)
    for at in range(0, 4000, 1000):
        piece = slice(at, at + 1000)
        sums.add(quantized[:, piece], floats[:, piece] if paired else None, skip[:, piece] if paired else None)
        sums._flush()
    found = sums.statistics()
    x, y, c = (value[0].astype(np.float64) for value in (quantized, floats, skip))

    def off(gram, a, b):
        # Of the covariance, in units of the spreads: measured 2e-7 at most, 37 without the shift.
        exact = np.cov(a.T, b.T, bias=True)[: a.shape[1], a.shape[1] :]
        mean = np.outer(a.mean(axis=0), b.mean(axis=0))
        return np.abs((gram / 4000 - mean - exact) / np.outer(a.std(axis=0), b.std(axis=0))).max()

    assert found.rows == 4000 and np.abs(found.mean[0] - x.mean(axis=0)).max() < 1e-9
    assert off(found.gram[0], x, x) < 2e-6
    if paired:
        assert np.abs(found.float_mean[0] - y.mean(axis=0)).max() < 1e-9
        assert off(found.cross[0], x, y) < 2e-6 and off(found.float_gram[0], y, y) < 2e-6
        assert off(found.skip.cross[0], x, c) < 2e-6 and off(found.skip.float_cross[0], y, c) < 2e-6
    assert np.linalg.eigvalsh(found.gram[0] / 4000 - np.outer(found.mean[0], found.mean[0])).min() > 0
