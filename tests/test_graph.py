"""Edits of the graph that passes rely on."""

from onnxcompress.graph import bodies
from onnxcompress.testing import graph_of, model


def test_removing_a_node_unlinks_what_its_subgraphs_read():
    graph = graph_of(
        model("""g (bool b, float[1] x) => (float[1] z) {
        w = Relu(x)
        y = If (b) <
            then_branch = t () => (float[1] p) {
                p = If (b) <then_branch = tt () => (float[1] q) { q = Neg(w) },
                            else_branch = te () => (float[1] r) { r = Abs(w) }>
            },
            else_branch = e () => (float[1] s) { s = Identity(w) }
        >
        z = Neg(x)
    }""")
    )
    relu, branch, _ = graph.nodes
    inner = [g for body in bodies(branch) for g in body.walk()]
    assert len(inner) == 4 and len(relu.outputs[0].outputs) == 3
    graph.remove(branch)
    assert list(relu.outputs[0].outputs) == []
    assert [list(g.nodes) for g in inner] == [[]] * 4
