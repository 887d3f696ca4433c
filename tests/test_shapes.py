"""What shape inference may believe of a file."""

from onnxcompress.testing import graph_of, model


def shapes(text, **options):
    graph = graph_of(model(text, **options))
    return {t.name: t.shape for g in graph.walk() for t in [*g.inputs, *(t for n in g.nodes for t in n.outputs)]}


def test_placeholders_are_not_names():
    """Exporters write "?" or "None" on every unknown axis, which does not make the sizes equal."""
    before = model("g (float[None,3,None,N] x, float[N] z) => (float[a,b,c,d] y) { y = Relu(x) }")
    dims = before.graph.input[0].type.tensor_type.shape.dim
    graph = graph_of(before)
    x, y = graph.inputs[0].shape, graph.outputs[0].shape
    assert x == y
    assert len({x[0], x[2], "None"}) == 3
    assert x[3] == "N" == graph.inputs[1].shape[0]
    dims[0].dim_param, dims[2].dim_param = "?", "?"
    assert len(set(graph_of(before).outputs[0].shape)) == 4


def test_unnamed_and_negative_sizes_are_unknown_but_linked():
    before = model("g (float[N,3,M] x) => (float[a,b,c] y) { y = Relu(x) }")
    dims = before.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = -1
    dims[2].Clear()
    graph = graph_of(before)
    shape = graph.outputs[0].shape
    assert shape == graph.inputs[0].shape
    assert isinstance(shape[0], str) and shape[1] == 3 and isinstance(shape[2], str) and shape[0] != shape[2]


def test_declared_output_shape_is_not_believed():
    assert shapes("g (float[N,3] x) => (float[1,3] y) { y = Relu(x) }")["y"] == ["N", 3]


def test_declared_loop_state_shape_is_not_believed():
    """The state doubles from turn to turn, although body and model say [N,3]."""
    found = shapes("""g (float[N,3] x, int64 n, bool c) => (float[N,3] y) {
        y = Loop(n, c, x) <body = b (int64 i, bool ci, float[N,3] s) => (bool co, float[N,3] t) {
            co = Identity(ci)
            r = Relu(s)
            t = Concat<axis = 0>(r, r)
        }>
    }""")
    assert found["s"] is None and found["r"] is None and found["t"] is None and found["y"] is None


def test_computed_target_makes_the_rank_known():
    """Up to opset 12 onnx's inference gives up at the Reshape; what comes after it needs the rank."""
    text = """g (float[N,M,8] x) => (float[a,b,c] y) <int64[1] i = {0}, int64[1] j = {1}, int64[1] minus = {-1}> {
        s = Shape(x) n = Slice(s, i, j) t = Concat<axis = 0>(n, minus) r = Reshape(x, t)
        u = Unsqueeze<axes = [1]>(r) v = Transpose(u) y = Relu(v)
    }"""
    found = shapes(text, opset=12)
    assert len(found["r"]) == 2 and found["r"][0] == "N"
    assert len(found["y"]) == 3 and found["y"][1:] == [1, "N"]
