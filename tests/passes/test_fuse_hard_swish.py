"""Decomposed HardSwish: the order of operands, both opset forms, near misses."""

import numpy as np
import onnx
import pytest

from onnxcompress.passes.fuse_hard_swish import FuseHardSwish
from onnxcompress.testing import apply, assert_equivalent, graph_of, model, ops

F = np.float32
VALUES = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "half": 0.5, "k": 0.476}
CONSTANTS = {k: F(v) for k, v in VALUES.items()} | {
    "sixth": F(1 / 6),
    "vector": np.full(8, 3, F),
    "six1": np.full(1, 6, F),
}
X, Y = "float[N,3,4,8] x", "float[N,3,4,8] y"


def make(nodes, *, opset=14, x=X, y=Y, **constants):
    known = {**CONSTANTS, **constants}
    text = f"g ({x}) => ({y}) {{ {nodes} }}"
    read = {name for node in onnx.parser.parse_graph(text).node for name in node.input}
    return model(text, opset=opset, ir_version=10, **{k: v for k, v in known.items() if k in read})


GATE = "a = Add(x, three) c = Clip(a, zero, six)"
FORMS = {
    "paddle": f"{GATE} m = Mul(x, c) y = Div(m, six)",
    "gate first": f"{GATE} g = Div(c, six1) y = Mul(x, g)",
    "x first": f"{GATE} z = Div(x, six) y = Mul(c, z)",
    "times a sixth": f"{GATE} m = Mul(c, x) y = Mul(sixth, m)",
    "line of slope 1 / 6": "z = Mul(x, sixth) a = Add(half, z) c = Clip(a, zero, one) y = Mul(c, x)",
    "hard sigmoid": "c = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(c, x)",
    "hard sigmoid by default": "z = Div(x, six) w = Mul(z, five) c = HardSigmoid(w) y = Mul(x, c)",
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_every_form(form):
    before = make(FORMS[form])
    after, result = apply(FuseHardSwish(), before)
    assert result.rewrites == 1 and ops(after) == ["HardSwish"]
    assert_equivalent(before, after, rel=6e-7, sizes={"N": 5})  # measured 7.8e-8


@pytest.mark.parametrize("opset", [7, 10, 11, 12, 13])
@pytest.mark.parametrize("form", [form for form in FORMS if "sigmoid" not in form])
def test_old_opsets_get_a_hard_sigmoid(form, opset):
    nodes = FORMS[form]
    if opset < 11:
        nodes = nodes.replace("Clip(a, zero, six)", "Clip<min=0.0, max=6.0>(a)")
        nodes = nodes.replace("Clip(a, zero, one)", "Clip<min=0.0, max=1.0>(a)")
    before = make(nodes, opset=opset)
    after, result = apply(FuseHardSwish(), before)
    assert result.rewrites == 1 and ops(after) == ["HardSigmoid", "Mul"]
    assert_equivalent(before, after, rel=7e-7)  # measured 8.5e-8


def test_old_opset_with_a_hard_sigmoid_stays():
    before = make(FORMS["hard sigmoid"], opset=13)
    after, result = apply(FuseHardSwish(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


@pytest.mark.parametrize("opset", [12, 14])
def test_a_factor_that_follows_stays(opset):
    before = make(f"{FORMS['paddle'].replace('y =', 'w =')} y = Mul(k, w)", opset=opset)
    after, result = apply(FuseHardSwish(), before)
    assert result.rewrites == 1 and result.misses == []
    assert ops(after) == (["HardSwish", "Mul"] if opset == 14 else ["HardSigmoid", "Mul", "Mul"])
    assert_equivalent(before, after, rel=7e-7)  # measured 8.9e-8


@pytest.mark.parametrize("opset", [12, 14])
def test_half_precision(opset):
    constants = {k: v.astype(np.float16) for k, v in CONSTANTS.items()}
    before = make(FORMS["paddle"], opset=opset, x=f"float16{X[5:]}", y=f"float16{Y[5:]}", **constants)
    _, result = apply(FuseHardSwish(), before)
    assert result.rewrites == 1
    after, _ = apply(FuseHardSwish(), before)
    assert_equivalent(before, after, rel=2e-3)  # two units of float16; measured 0


WHOLE = FORMS["paddle"]
NEAR_MISSES = {
    "divided by 5": (WHOLE.replace("Div(m, six)", "Div(m, five)"), {}, "goes up to 1.2"),
    "not divided": (f"{GATE} y = Mul(x, c)", {}, "goes up to 6"),
    "plus 2": (WHOLE.replace("three", "two"), {}, "0.1666667 x + 0.3333333, not"),
    "default HardSigmoid": ("c = HardSigmoid(x) y = Mul(c, x)", {}, "0.2 x + 0.5, not"),
    "gate is an output": (WHOLE, {"y": f"{Y}, float[N,3,4,8] c"}, "'c', which would go, is a model output"),
    "product is read elsewhere": (
        f"{WHOLE} z = Neg(m)",
        {"y": f"{Y}, float[N,3,4,8] z"},
        "'m', which would go, is read",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_left_alone(case):
    nodes, options, reason = NEAR_MISSES[case]
    before = make(nodes, **options)
    after, result = apply(FuseHardSwish(), before)
    assert result.rewrites == 0 and ops(after) == ops(before)
    assert len(result.misses) == 1 and reason in result.misses[0].reason
    assert_equivalent(before, after)


OTHER_THINGS = {
    "another factor": f"{GATE} z = Abs(x) m = Mul(z, c) y = Div(m, six)",
    "sum": f"{GATE} m = Add(x, c) y = Div(m, six)",
    "from 1 on": WHOLE.replace("zero", "one"),
    "vector": WHOLE.replace("three", "vector"),
    "squared": f"{GATE} d = Mul(c, c) m = Mul(x, d) y = Div(m, six)",
    "plus x": f"{GATE} d = Add(c, x) m = Mul(x, d) y = Div(m, six)",
    "square inside": f"z = Mul(x, x) {GATE.replace('Add(x', 'Add(z')} m = Mul(x, c) y = Div(m, six)",
    "relu": f"{GATE.replace('Clip(a, zero, six)', 'Relu(a)')} m = Mul(x, c) y = Div(m, six)",
}


@pytest.mark.parametrize("case", OTHER_THINGS)
def test_another_thing_is_left_alone(case):
    before = make(OTHER_THINGS[case])
    after, result = apply(FuseHardSwish(), before)
    assert result.rewrites == 0 and result.misses == [] and ops(after) == ops(before)


def test_a_type_that_is_not_known_is_left_alone():
    text = f"""<ir_version: 9, opset_import: ["" : 14, "ours" : 1]>
    g ({X}0) => ({Y}) {{ x = ours.Thing(x0) {FORMS["hard sigmoid"]} }}"""
    assert FuseHardSwish().apply(graph_of(model(text))).rewrites == 0


def test_double_has_no_kernel():
    constants = {k: np.float64(VALUES.get(k, 1 / 6)) for k in ("zero", "three", "six")}
    before = make(WHOLE, x=f"double{X[5:]}", y=f"double{Y[5:]}", **constants)
    result = FuseHardSwish().apply(graph_of(before))
    assert result.rewrites == 0 and "float64" in result.misses[0].reason
